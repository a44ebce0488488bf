"""Where a step stands in the run, and which problems its window holds: pure functions of counters.

Nothing here is state, so a resumed run finds its place from the step number alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engines.seeds import counter_seed
from .config import TraceConfig
from .recipe import Recipe


@dataclass(frozen=True)
class Place:
    """Step `step` is step `position` of `window`, which `phase` of `round` samples; all count over the run
    but `position` (within its window) and `phase` (within the recipe)."""

    step: int
    round: int
    phase: int
    window: int
    position: int


def place_of(step: int, config: TraceConfig, recipe: Recipe) -> Place:
    """The place of optimiser step `step` (from 0)."""
    per_window = config.steps_per_window()
    window, position = divmod(step, per_window)
    windows_per_round = sum(phase.windows for phase in recipe.phases)
    round_, within = divmod(window, windows_per_round)
    for index, phase in enumerate(recipe.phases):
        if within < phase.windows:
            return Place(step, round_, index, window, position)
        within -= phase.windows
    raise AssertionError("unreachable: windows of a round are covered by its phases")


def window_problems(window: int, size: int, n_problems: int, run_seed: int) -> list[tuple[int, int]]:
    """(problem index, visit) of each problem of window `window`. Problems are walked in a fresh random order each
    pass; visit counts the passes. A window may span two passes; phases of one round see different problems."""
    out: list[tuple[int, int]] = []
    orders: dict[int, np.ndarray] = {}
    for position in range(window * size, (window + 1) * size):
        visit, offset = divmod(position, n_problems)
        if visit not in orders:
            seed = counter_seed(run_seed, "order", 0, "problems", visit=visit)
            orders[visit] = np.random.default_rng(seed).permutation(n_problems)
        out.append((int(orders[visit][offset]), visit))
    return out


def step_members(
    position: int, n_groups: int, steps: int, epochs: int, window: int, run_seed: int
) -> list[int]:
    """Indices of the window's groups that step `position` trains on. Each epoch deals all groups to its
    steps / epochs steps as evenly as can be, in an order of its own (the first epoch keeps the window's order)."""
    per_epoch = steps // epochs
    epoch, slot = divmod(position, per_epoch)
    order = np.arange(n_groups)
    if epoch > 0:
        seed = counter_seed(run_seed, "order", 0, "window", visit=window, k=epoch)
        order = np.random.default_rng(seed).permutation(n_groups)
    bounds = [round(n_groups * i / per_epoch) for i in range(per_epoch + 1)]
    return [int(i) for i in order[bounds[slot] : bounds[slot + 1]]]
