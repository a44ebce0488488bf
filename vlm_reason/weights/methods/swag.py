"""SWAG: a Gaussian from the path of one training run (Maddox et al. 2019, arXiv 1902.02476; on LoRA, Onal et al. 2024,
arXiv 2405.03425).

After `start` of the run the step size no longer falls to 0, and every few steps the weights theta_i, i = 1..T, are
noted: their mean m, their variance v = mean (theta_i - m)^2, and the last K of them.

    draw   m + scale^1/2 [ (v / 2)^1/2 z1 + D z2 / (2 (K - 1))^1/2 ],      D's columns are the last K theta_i - m
    covariance   scale [ diag(v) / 2 + D D^T / (2 (K - 1)) ]

With K = T the second part is half the sample covariance. The paper takes each deviation from the mean so far, as it
does not keep iterates; here the last K are kept (the same memory), so deviations are from m itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from ...errors import UserError
from ..adapter import base_fingerprint, peft_config_dict
from ..artefact import Tree
from ..chains import SetEveryStep, adapter_state, check_method
from ..continual import start_from
from ..families.low_rank_plus_diagonal import LowRankPlusDiagonal
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..posterior import Origin, Posterior
from ..training import planned_steps, train

SCHEDULES = ("constant", "cyclic")


@dataclass(frozen=True)
class SWAG:
    """start: share of the training steps before anything is noted. learning_rate: after that; None is half of
    training.learning_rate. Until then the step size warms up and goes down to it in a straight line.

    schedule       constant, or cyclic: from training.learning_rate down to learning_rate between one note and the next
    collect_steps  steps between notes; None: an epoch, or less where that gives fewer than 2 * rank notes
    rank           K, how many of the last iterates are kept for the low-rank part; 0 for a diagonal alone
    scale          multiplies the covariance, once. The fit of the variance to the path of an optimiser is a heuristic:
                   choose scale, or `temper`, on held-out data

    Costs the training run and (K + 2) adapters of memory. When not to use it: if the second part of the run does not
    move (a step size near 0) there is nothing to measure, and if it does not stay in one basin a Gaussian is wrong.
    UserError for settings out of range and for runs too short for two notes.
    """

    start: float = 0.5
    learning_rate: float | None = None
    schedule: str = "constant"
    collect_steps: int | None = None
    rank: int = 10
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(f"swag: start is a share of the steps, at least 0 and below 1, got {self.start}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"swag: learning_rate must be > 0, got {self.learning_rate}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"swag: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.collect_steps is not None and self.collect_steps < 1:
            raise UserError(f"swag: collect_steps must be >= 1, got {self.collect_steps}")
        if self.rank < 0 or self.rank == 1:
            raise UserError(
                f"swag: rank must be 0 or at least 2 (one deviation has no spread), got {self.rank}"
            )
        if not 0 < self.scale < math.inf:
            raise UserError(f"swag: scale must be > 0, got {self.scale}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        notes = self.notes(job)
        start_from(job)
        path = PathMoments(job, notes, self)
        callbacks = [SetEveryStep(lambda step: {"lr": self.rate(job, notes, step)}), path]
        trained = train(job, callbacks=callbacks, name="swag")
        posterior = self.posterior(job, path)
        report = FitReport(
            "swag", posterior.family, len(job.train), trained.steps, trained.seconds, trained.final_loss,
            held_out_nll(posterior, job),
            {"notes": path.count, "rank": posterior.rank, "rms_sigma": _rms(posterior)},
        )  # fmt: skip
        posterior.write(job.model, posterior.mean(), job.adapter)
        return posterior, report

    def notes(self, job: Job) -> list[int]:
        """After which steps, counted from 1, the weights are noted."""
        total = planned_steps(job)
        first = int(self.start * total)
        epoch = -(-len(job.train) // job.training.batch_size)
        every = self.collect_steps or max(1, min(epoch, (total - first) // max(2, 2 * self.rank)))
        notes = sorted(range(total, first, -every))
        if len(notes) < 2:
            raise UserError(
                f"swag: {total} steps, start {self.start} and a note every {every} steps give {len(notes)} notes of "
                "the weights, at least 2 are needed: train for more epochs, or lower start or collect_steps"
            )
        return notes

    def rate(self, job: Job, notes: list[int], step: int) -> float:
        """Of step `step`, counted from 0."""
        high, total = job.training.learning_rate, planned_steps(job)
        low = high / 2 if self.learning_rate is None else self.learning_rate
        first = int(self.start * total)
        if step < first:
            warmup = round(job.training.warmup_share * total)
            fallen = high + (low - high) * step / first
            return fallen * min(1.0, (step + 1) / (warmup + 1))
        if self.schedule == "constant":
            return low
        before = max((n for n in notes if n <= step), default=first)
        after = min(n for n in notes if n > step)
        return high + (low - high) * (step - before) / max(1, after - before - 1)

    def posterior(self, job: Job, path: PathMoments) -> LowRankPlusDiagonal:
        """From what was noted."""
        half = self.scale / 2
        sigma = {key: (half * v / path.count).sqrt() for key, v in path.squares.items() if bool(v.any())}
        k = len(path.last)
        factor = {key: path.mean[key].new_zeros(k, *path.mean[key].shape) for key in sigma}
        for key, columns in factor.items():
            for column, tree in zip(columns, path.last, strict=True):
                column.copy_((tree[key] - path.mean[key]) * math.sqrt(half / (k - 1)))
        origin = Origin(base_fingerprint(job.model), data_size=len(job.train), updates=planned_steps(job))
        return LowRankPlusDiagonal(peft_config_dict(job.model, job.adapter), path.mean, sigma, factor, origin)


class PathMoments(TrainerCallback):
    """Mean and summed squared deviations of the noted weights (Welford's update), and the last `rank` of them."""

    def __init__(self, job: Job, notes: list[int], method: SWAG) -> None:
        self.job, self.notes, self.rank = job, frozenset(notes), method.rank
        self.method = replace(method, scale=1.0)  # which has no part in the run
        self.count = 0
        self.mean: Tree = {}
        self.squares: Tree = {}
        self.last: list[Tree] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.notes:
            self.note(adapter_state(self.job))

    def note(self, tree: Tree) -> None:
        self.count += 1
        for key, value in tree.items():
            if self.count == 1:
                self.mean[key], self.squares[key] = torch.zeros_like(value), torch.zeros_like(value)
            apart = value - self.mean[key]
            self.mean[key] += apart / self.count
            self.squares[key] += apart * (value - self.mean[key])
        self.last = [*self.last, tree][-self.rank :] if self.rank else []

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": repr(self.method), "count": self.count, "mean": self.mean, "squares": self.squares,
            "last": self.last,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_method(self.method, state["method"])
        self.count, self.mean, self.squares = state["count"], dict(state["mean"]), dict(state["squares"])
        self.last = list(state["last"])


def _rms(posterior: LowRankPlusDiagonal) -> float:
    """Root mean variance over all weights."""
    values = [v.double().reciprocal().flatten() for v in posterior.precision_diag().values()]
    return float(torch.cat(values).mean().sqrt())
