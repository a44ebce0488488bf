"""What methods that keep several states of one run share: callbacks for `train` that set the step size and take states,
and the run of a Markov chain with them.

The callbacks hold to the number of the step alone, so a resumed run goes on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from ..errors import UserError
from .adapter import adapter_tensors, base_fingerprint, peft_config_dict, whole
from .artefact import Tree
from .continual import start_from
from .families.particles import Particles
from .held_out import held_out_nll
from .job import FitReport, Job
from .posterior import Origin
from .samplers import CyclicalSchedule
from .training import MakeOptimizer, train

Settings = Callable[[int], Mapping[str, float]]
"""Step, from 0 -> what the optimiser's groups hold during it, as {"lr": 0.1}."""


class SetEveryStep(TrainerCallback):
    """Settings of the optimiser's groups as a function of the step, in place of the trainer's own schedule."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        assert optimizer is not None
        for group in optimizer.param_groups:
            group.update(self.settings(state.global_step))


class TakeStates(TrainerCallback):
    """`read()` after each of the steps `at`, counted from 1; kept in `states`, which checkpoints hold too. method: the
    settings of the run, which a checkpoint must have been made with."""

    def __init__(self, at: Iterable[int], read: Callable[[], list[Tree]], method: object) -> None:
        self.at, self.read, self.method = frozenset(at), read, method
        self.states: list[Tree] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.at:
            self.states += self.read()

    def state_dict(self) -> dict[str, Any]:
        return {"method": repr(self.method), "states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_method(self.method, state["method"])
        self.states = list(state["states"])


def check_method(method: object, before: str) -> None:
    """UserError where a checkpoint was made with other settings."""
    if repr(method) != before:
        raise UserError(
            f"the checkpoint is of {before}, this run is {method!r}: choose another output_dir, or go back to those "
            "settings"
        )


def adapter_state(job: Job) -> Tree:
    """A copy of what the job's adapter holds now."""
    return {key: whole(p) for key, p in adapter_tensors(job.model, job.adapter).items()}


def evenly(first: int, last: int, count: int) -> list[int]:
    """`count` steps at equal distances (to rounding) in (first, last], the last one `last`; all of them if fewer."""
    count = min(count, last - first)
    return [last - (last - first) * k // count for k in reversed(range(count))]


def in_cycles(schedule: CyclicalSchedule, count: int) -> list[int]:
    """After which steps, counted from 1, to take `count` states: as many in each cycle, to rounding, spread evenly over
    its sampling stage and up to its end."""
    chosen: list[int] = []
    for cycle in range(schedule.cycles):
        share = count * (cycle + 1) // schedule.cycles - count * cycle // schedule.cycles
        steps = range(cycle * schedule.length, min((cycle + 1) * schedule.length, schedule.steps))
        first = next((step for step in steps if schedule.samples(step)), None)
        if first is not None and share:
            chosen += evenly(first, steps.stop, share)
    return chosen


def fit_chain(
    job: Job,
    name: str,
    method: object,
    make_optimizer: MakeOptimizer,
    settings: Settings,
    at: list[int],
    read: Callable[[], list[Tree]],
    prior_precision: float,
    temperature: float,
    mean: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> tuple[Particles, FitReport]:
    """Run a chain from the job's adapter (or the mean of job.start) and keep what `read` gives after the steps `at`, as
    equal particles. method: its settings. Gradients are not clipped: that would be the chain of another density. mean:
    as for `Particles`. The law is exp(-U / T), so the prior in it has precision prior_precision / T; at T = 0 there is
    no law."""
    if not at:
        raise UserError(
            f"{name}: the run is too short to keep a state: train for more epochs, or lower burn_in"
        )
    start_from(job)
    states = TakeStates(at, read, method)
    trained = train(
        replace(job, training=replace(job.training, max_grad_norm=0.0)),
        make_optimizer=make_optimizer, callbacks=[SetEveryStep(settings), states], name=name,
    )  # fmt: skip
    keys = adapter_tensors(job.model, job.adapter)
    prior = {} if temperature == 0 else {key: prior_precision / temperature for key in keys}
    origin = Origin(base_fingerprint(job.model), data_size=len(job.train), updates=trained.steps, prior=prior)
    posterior = Particles(peft_config_dict(job.model, job.adapter), states.states, origin, mean=mean)
    report = FitReport(
        name, posterior.family, len(job.train), trained.steps, trained.seconds, trained.final_loss,
        held_out_nll(posterior, job, len(posterior)),
        {"particles": len(posterior), "kept_after_steps": sorted(at), **(details or {})},
    )  # fmt: skip
    posterior.write(job.model, posterior.mean(), job.adapter)
    return posterior, report
