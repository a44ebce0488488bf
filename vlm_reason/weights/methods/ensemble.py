"""Deep ensembles: M adapters, each from an initialisation and an order of the data of its own, as M particles.

    p(y | x) = 1/M sum_m p(y | x, theta_m)

Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty estimation using deep ensembles", arXiv
1612.01474; for LoRA: Wang et al. 2023, arXiv 2310.00035. It costs M trainings and M adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict, whole
from ..artefact import Tree
from ..families.particles import Particles
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..posterior import Origin, Posterior
from ..training import train


@dataclass(frozen=True)
class Ensemble:
    """members: M. Each is trained as `map` would, with settings of its own seed: A of LoRA drawn anew, every other
    tensor as it was given; the first member keeps A as given too. Members resume one by one. The mean of the
    posterior, which stock PEFT loads, is its best member on held-out examples (the first without any).

    UserError for a start, and for an adapter that is trained already (some B is not 0): it belongs to its own A.

    When not to use it: where one adapter at a time has to serve; for continual learning (particles have no density).
    """

    members: int = 5

    def __post_init__(self) -> None:
        if self.members < 2:
            raise UserError(f"ensemble: members must be >= 2, got {self.members} (1 is method map)")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        if job.start is not None:
            raise UserError("ensemble: every member begins anew, so a start has no meaning: leave it out")
        given = untrained(job, "ensemble")
        trees: list[Tree] = []
        losses, steps, seconds = [], 0, 0.0
        for m in range(self.members):
            put(job, given if m == 0 else anew(given, member_seed(job.seed, m)))
            trained = train(replace(job, seed=member_seed(job.seed, m)), name=f"member{m:03d}")
            trees.append({k: whole(v) for k, v in adapter_tensors(job.model, job.adapter).items()})
            losses.append(trained.final_loss)
            steps, seconds = steps + trained.steps, seconds + trained.seconds
        origin = Origin(base_fingerprint(job.model), data_size=len(job.train))
        config = peft_config_dict(job.model, job.adapter)
        posterior = Particles(config, trees, origin, mean=_best(job, config, trees, origin))
        posterior.write(job.model, posterior.mean(), job.adapter)
        return posterior, FitReport(
            "ensemble", posterior.family, len(job.train), steps, seconds, sum(losses) / len(losses),
            held_out_nll(posterior, job, self.members), {"members": self.members, "train_nll": losses},
        )  # fmt: skip


def _best(job: Job, config: dict[str, Any], trees: Sequence[Tree], origin: Origin) -> int:
    """The member with the lowest NLL on held-out examples, the first without any: an average of factors of
    independent runs is no good model."""
    if not job.held_out:
        return 0
    scores = [held_out_nll(Particles(config, [tree], origin), job, 1) for tree in trees]
    return min(range(len(trees)), key=lambda m: scores[m] or 0.0)


def member_seed(seed: int, member: int) -> int:
    """The first member has the run's own seed: alone, it is what `map` gives."""
    if member == 0:
        return seed
    digest = hashlib.blake2b(f"member\x1f{seed}\x1f{member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def untrained(job: Job, method: str) -> Tree:
    """What the job's adapter holds. UserError where some B is not 0."""
    given = {k: whole(v) for k, v in adapter_tensors(job.model, job.adapter).items()}
    trained = next((k for k, v in given.items() if ".lora_B" in k and bool(v.any())), None)
    if trained is not None:
        raise UserError(
            f"{method}: members are independent runs from an A of their own, and the adapter is trained already "
            f"({trained!r} is not 0): give a new adapter"
        )
    return given


def anew(given: Tree, seed: int) -> Tree:
    """A ~ U(-b, b), b = 1 / sqrt(in), as PEFT draws it; a generator a matrix, seeded by (seed, key)."""
    tree = {k: v.clone() for k, v in given.items()}
    for key, value in tree.items():
        if ".lora_A" in key:
            digest = hashlib.blake2b(f"{seed}\x1f{key}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = value.shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
    return tree


def put(job: Job, tree: Tree) -> None:
    """The adapter's weights set to `tree`."""
    with torch.no_grad():
        for key, p in adapter_tensors(job.model, job.adapter).items():
            value: Tensor = tree[key]
            p.copy_(value)
