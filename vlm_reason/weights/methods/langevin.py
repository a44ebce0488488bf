"""Samples of the posterior along a Markov chain of one adapter: SGLD, SGHMC, or either's cyclical form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UserError, nearest
from ..chains import Settings, adapter_state, evenly, fit_chain, in_cycles
from ..job import FitReport, Job
from ..posterior import Posterior
from ..samplers import SGHMC, SGLD, CyclicalSchedule
from ..training import planned_steps

KINDS = ("sgld", "sghmc", "cyclical")


@dataclass(frozen=True)
class Langevin:
    """kind: sgld (Welling and Teh 2011), sghmc (Chen et al. 2014), cyclical (Zhang et al. 2020: SGHMC with restarts).
    The law is exp(-U / T), U = N l + prior_precision |theta|^2 / 2; see samplers.py for the steps.

    learning_rate    step size on the mean loss; SGHMC gets learning_rate * friction, and so goes as far. It stays where
                     it is after the warm-up (training.learning_rate and training.schedule are not used); cyclical: at
                     the start of a cycle
    temperature      T; 1 is the Bayesian posterior. Colder ones do better with few examples for many weights
    prior_precision  of N(0, I / p), on A and B alike
    burn_in          share of the steps before any state is kept; cyclical has `exploration` instead
    particles        states kept, at equal distances up to the end; each takes an adapter of memory
    friction         a of SGHMC
    cycles, exploration   of the cyclical schedule. The mean is then the last state: cycles may end in different modes

    Gradients are not clipped. When not to use it: short runs; a chain of a few hundred steps has seen little. Compare
    with an ensemble, which costs more and explores more. UserError for settings out of range.
    """

    kind: str = "sgld"
    learning_rate: float = 0.1
    temperature: float = 1e-2
    prior_precision: float = 1.0
    burn_in: float = 0.5
    particles: int = 10
    friction: float = 0.1
    cycles: int = 4
    exploration: float = 0.8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"langevin: kind must be one of {', '.join(KINDS)}, got {self.kind!r}{nearest(self.kind, KINDS)}"
            )
        check_chain("langevin", self.learning_rate, self.temperature, self.prior_precision, self.particles)
        if not 0 <= self.burn_in < 1:
            raise UserError(
                f"langevin: burn_in is a share of the steps, at least 0 and below 1, got {self.burn_in}"
            )
        if not 0 < self.friction <= 1:
            raise UserError(f"langevin: friction must be above 0 and at most 1, got {self.friction}")
        CyclicalSchedule(1.0, 1.0, max(1, self.cycles), self.cycles, self.exploration)

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        steps, cyclical = planned_steps(job), self.kind == "cyclical"
        settings: Settings
        if cyclical:
            schedule = CyclicalSchedule(self._lr, self.temperature, steps, self.cycles, self.exploration)
            settings, at = schedule.at, in_cycles(schedule, self.particles)
        else:
            warmup = round(job.training.warmup_share * steps)
            at = evenly(int(self.burn_in * steps), steps, self.particles)

            def settings(step: int) -> dict[str, float]:
                return {"lr": self._lr * min(1.0, (step + 1) / (warmup + 1))}

        return fit_chain(
            job, "langevin", self, lambda parameters, _: self._optimizer(job, parameters), settings, at,
            lambda: [adapter_state(job)], self.prior_precision, self.temperature,
            mean=len(at) - 1 if cyclical else None,
            details={"kind": self.kind},
        )  # fmt: skip

    @property
    def _lr(self) -> float:
        return self.learning_rate if self.kind == "sgld" else self.learning_rate * self.friction

    def _optimizer(self, job: Job, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        n, p, t = len(job.train), self.prior_precision, self.temperature
        if self.kind == "sgld":
            return SGLD(parameters, self._lr, n, p, t, job.seed)
        return SGHMC(parameters, self._lr, n, p, t, self.friction, job.seed)


def check_chain(
    name: str, learning_rate: float, temperature: float, prior_precision: float, particles: int
) -> None:
    if not 0 < learning_rate < math.inf:
        raise UserError(f"{name}: learning_rate must be > 0, got {learning_rate}")
    for what, value in (("temperature", temperature), ("prior_precision", prior_precision)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name}: {what} must be >= 0, got {value}")
    if particles < 1:
        raise UserError(f"{name}: particles must be >= 1, got {particles}")
