"""Entropy-MCMC: a chain that a second copy of the weights keeps in wide valleys (Li and Zhang 2024, arXiv 2310.05401).

p(theta, theta_a) ~ exp( -[ U(theta) + |theta - theta_a|^2 / (2 eta) ] / T )
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UserError
from .. import samplers
from ..adapter import adapter_tensors, whole
from ..artefact import Tree
from ..chains import adapter_state, fit_chain, in_cycles
from ..job import FitReport, Job
from ..posterior import Posterior
from ..training import planned_steps
from .langevin import check_chain


@dataclass(frozen=True)
class EntropyMCMC:
    """SGLD on both copies (`samplers.EntropyMCMC`) under the cyclical schedule; theta and theta_a are both kept.

    eta            variance of the coupling: valleys narrower than its root are passed over
    learning_rate  the chain is unstable from N eta on, which is refused; None: 0.1, or N eta / 2 where that is less
    particles      states kept of each copy, so twice as many adapters
    others         as for `Langevin`; the mean is that of all of them

    Costs a second adapter of memory, no second gradient. When not to use it: as for `Langevin`.
    """

    learning_rate: float | None = None
    eta: float = 4e-4
    temperature: float = 1e-4
    prior_precision: float = 1.0
    particles: int = 5
    cycles: int = 4
    exploration: float = 0.8

    def __post_init__(self) -> None:
        rate = 0.1 if self.learning_rate is None else self.learning_rate
        check_chain("entropy_mcmc", rate, self.temperature, self.prior_precision, self.particles)
        samplers.CyclicalSchedule(1.0, 1.0, max(1, self.cycles), self.cycles, self.exploration)
        if not self.eta > 0:
            raise UserError(f"entropy_mcmc: eta must be > 0, got {self.eta}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        rate = self.learning_rate or min(0.1, len(job.train) * self.eta / 2)
        schedule = samplers.CyclicalSchedule(
            rate, self.temperature, planned_steps(job), self.cycles, self.exploration
        )
        chain: list[samplers.EntropyMCMC] = []

        def make(parameters: list[nn.Parameter], _: int) -> torch.optim.Optimizer:
            chain.append(
                samplers.EntropyMCMC(
                    parameters,
                    rate,
                    len(job.train),
                    self.eta,
                    self.prior_precision,
                    self.temperature,
                    job.seed,
                )  # fmt: skip
            )
            return chain[-1]

        def read() -> list[Tree]:
            guides = chain[-1].guides()
            guide = {
                key: whole(guides.get(p, p)) for key, p in adapter_tensors(job.model, job.adapter).items()
            }
            return [adapter_state(job), guide]

        at = in_cycles(schedule, self.particles)
        return fit_chain(
            job, "entropy_mcmc", self, make, schedule.at, at, read, self.prior_precision, self.temperature
        )
