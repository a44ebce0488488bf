"""A mixture from several runs of one method: of SWAG (Wilson and Izmailov 2020, arXiv 2002.08791), of Laplace
approximations (Eschenhagen et al. 2021, arXiv 2111.03577), of IVON runs.

    q = 1/M sum_m q_m,      q_m from a start and an order of the data of its own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...config import from_dict
from ...errors import UserError, nearest
from ..families.mixture import Mixture
from ..held_out import held_out_nll
from ..job import FitReport, Job, Method
from ..posterior import Posterior
from .ensemble import anew, member_seed, put, untrained

UNMIXED = {
    "temperature": "its logits are divided by a temperature of their own: give method temperature the mixture",
    "vbll": "it is uncertain of a head beside the adapter, and a mixture draws adapters alone",
}


@dataclass(frozen=True)
class MixtureOf:
    """method, options: what each member is fitted with. members: M. Each run starts as a member of `ensemble` does: A
    of LoRA drawn anew but for the first, and a seed of its own. Runs resume one by one, in folders of their own. The
    mean is that of the run with the lowest NLL on held-out examples (the first without any).

    Costs M runs. When not to use it: with `map`, which is an `ensemble`; with methods that start from a given posterior
    (laplace, tfb on job.start), whose runs would all be the same: UserError for a job with a start, and for an adapter
    that is trained already. Of `vbll` and `temperature` there are no mixtures: scale a mixture instead.
    """

    method: str = "swag"
    options: Mapping[str, Any] = field(default_factory=dict)
    members: int = 3

    def __post_init__(self) -> None:
        if self.members < 2:
            raise UserError(f"mixture: members must be at least 2, got {self.members}")
        self._build()

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        if job.start is not None:
            raise UserError("mixture: its runs have starts of their own; leave the start of the job out")
        method = self._build()
        given = untrained(job, "mixture")
        components: list[Posterior] = []
        reports: list[FitReport] = []
        for m in range(self.members):
            seed = member_seed(job.seed, m)
            put(job, given if m == 0 else anew(given, seed))
            folder = None if job.output_dir is None else job.output_dir / f"member{m:03d}"
            posterior, report = method.fit(replace(job, seed=seed, output_dir=folder))
            components.append(posterior)
            reports.append(report)
        scores = [r.held_out_nll for r in reports]
        best = min(range(self.members), key=lambda m: scores[m] or 0.0)
        mixture = Mixture(components, mean=best)
        losses = [r.train_nll for r in reports if r.train_nll is not None]
        report = FitReport(
            "mixture", mixture.family, len(job.train), sum(r.steps for r in reports),
            sum(r.seconds for r in reports), sum(losses) / len(losses) if losses else None,
            held_out_nll(mixture, job), {"of": self.method, "members": self.members, "held_out_nll": scores},
        )  # fmt: skip
        mixture.write(job.model, mixture.mean(), job.adapter)
        return mixture, report

    def _build(self) -> Method:
        from . import METHODS

        if self.method == "mixture" or self.method not in METHODS:
            raise UserError(f"mixture: unknown method {self.method!r}{nearest(self.method, METHODS)}")
        if self.method in UNMIXED:
            raise UserError(f"mixture: not of {self.method!r}: {UNMIXED[self.method]}")
        return from_dict(METHODS[self.method], self.options, f"options of {self.method}")
