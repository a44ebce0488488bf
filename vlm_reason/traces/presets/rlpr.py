"""RLPR: the mean probability of the reference answer's tokens, above what it is without a trace, as reward.

    R_k = max(0, mean_t pi(y*_t|x,z_k) - mean_t pi(y*_t|x)),   c = (1/K) ( R_k - mean R ) / ( std R + eps )

on the trace and on the answer that was sampled behind it. Questions whose reward spread is small against its
moving average are left out (the spread filter). Shaped reinforcement learning: not a bound, and sensitive to
answer length. Yu et al. 2025 (arXiv 2506.18254).
"""

from __future__ import annotations

from functools import partial

import torch

from ...types import Coefficients, Scores
from ..recipe import PRIOR, Evidence, Phase, Recipe, State
from ..weighing import drawn, every_answer, no_signal, rewards

EPS = 1e-6


def weigh(scores: Scores, state: State, *, spread: float, decay: float) -> tuple[Coefficients, State]:
    e, k = rewards(scores), drawn(scores)
    centred = (e - e.sum(1, keepdim=True) / k).masked_fill(~scores.mask, 0.0)
    std = (centred.square().sum(1, keepdim=True) / k).sqrt()
    mean_std = float(std.mean())
    threshold = spread * state.get("mean_std", mean_std)
    c = torch.where(std >= threshold, centred / (std + EPS) / k, torch.zeros_like(centred))
    moved = {"mean_std": decay * state.get("mean_std", mean_std) + (1 - decay) * mean_std}
    return Coefficients(c_z=c, c_y=every_answer(c, scores), null=no_signal(c)), moved


def recipe(spread: float = 0.5, decay: float = 0.99) -> Recipe:
    """spread: questions whose reward std is below this share of its moving average are left out (0 keeps all)."""
    phase = Phase(
        "rlpr",
        partial(weigh, spread=spread, decay=decay),
        proposal=PRIOR,
        evidence=Evidence("minus_no_trace"),
        targets="sampled",
    )
    return Recipe(
        "rlpr",
        (phase,),
        traces=8,
        least_traces=2,
        source="arXiv 2506.18254",
        optimises="shaped reward on mean p(y*_t)",
    )
