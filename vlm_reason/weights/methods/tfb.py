"""TFB: a posterior around any LoRA adapter, without training (Shi et al. 2024, arXiv 2412.05723).

    A' ~ N(diag(d) V^T A, sigma_q^2),  B' = U,  from B = U diag(d) V^T:    Delta W = s B A + s sigma_q U E
    sigma_q = the largest with  excess(sigma_q) <= bound  on anchor examples
    excess  = (L(sigma_q) - L(0)) / |L(0)|,   L = -mean_i log mean_s p(y_i | theta_s, x_i)          criterion "nll"
              share of anchors whose most probable label is another one than without noise        criterion "flips"

The same draws at every sigma_q, so excess is a smooth curve; see noise_scale.py for the search and column_basis.py for
the factors.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...errors import UserError, nearest
from ..continual import start_from
from ..examples import Example, make_batch
from ..held_out import held_out_nll, nll_of_outputs
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..noise_scale import Found, Measure, NoiseScale
from ..noisy_adapter import NoisyAdapter
from ..posterior import Posterior

Criterion = Literal["nll", "flips"]
Labels = Literal["given", "predicted"]
BOUNDS = {"nll": 0.003, "flips": 0.01}
BISECTION_STEPS = 5  # of the search in the paper's code, at the same number of draws and anchors


@dataclass(frozen=True)
class TFB:
    """Finds sigma_q for the adapter as it is, or for the mean of `job.start`.

    criterion, bound: see above; bound None is 0.003 for "nll" and 0.01 for "flips". anchors: how many examples, drawn
    from job.train (`source` "train") or job.held_out. labels: "predicted" takes what the adapter itself says without
    noise for the label (Choice only): for anchors without labels. draws: S, even, in opposite pairs. relative: sigma
    of a layer in proportion to the root mean square of its A', sigma_q being their mean. start: where the search
    begins. largest: where it ends. tolerance: sigma_q is feasible, and one larger by this share is expected not to be.
    pilot: anchors for what all anchors need not answer. tokens: of one forward, all draws together.

    When not to use it: the draws are as wide as the anchors bear, no more is claimed; correlations and scales of layers
    are not learnt. On training examples that the adapter fits almost perfectly, L(0) is near 0 and so is sigma_q: use
    held-out anchors or "flips". Compare with temperature scaling.
    """

    criterion: Criterion = "nll"
    bound: float | None = None
    anchors: int = 500
    source: Literal["train", "held_out"] = "train"
    labels: Labels = "given"
    draws: int = 10
    relative: bool = False
    start: float = 0.004
    largest: float = 1.0
    tolerance: float = 0.05
    pilot: int = 64
    tokens: int = 16_384

    def __post_init__(self) -> None:
        for name, known in (("criterion", get_args(Criterion)), ("labels", get_args(Labels)),
                            ("source", ("train", "held_out"))):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"tfb: {name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}"
                )
        if self.draws < 2 or self.draws % 2:
            raise UserError(
                f"tfb: draws come in opposite pairs, give an even number of at least 2, got {self.draws}"
            )
        if self.bound is not None and not self.bound > 0:
            raise UserError(f"tfb: bound must be > 0, got {self.bound}")
        if not 0 < self.start <= self.largest < math.inf:
            raise UserError(
                f"tfb: 0 < start <= largest must hold, got start {self.start}, largest {self.largest}"
            )
        if not 0 < self.tolerance < 1:
            raise UserError(f"tfb: tolerance must be in (0, 1), got {self.tolerance}")
        for name in ("anchors", "pilot", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"tfb: {name} must be at least 1, got {getattr(self, name)}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        """report.details: sigma, excess at it, bound, nll without noise and with, and what it cost: `example_forwards`
        (draws x examples, everything counted) beside those of a bisection of 5 steps, `trail` (sigma, examples,
        excess). `layer_share`: how much of the decoder those forwards ran, layers below the first with noise being
        run once for all draws.

        UserError without anchors, for an adapter whose update is 0, for factors that are not a product B A, and where
        the likelihood has no labels to predict or to flip.
        """
        started = time.perf_counter()
        start_from(job)
        job.model.eval()
        noisy = NoisyAdapter(job, chosen(self, job), self.draws, self.relative, self.tokens)
        try:
            found, details = self._search(noisy)
        except BaseException:
            noisy.restore()
            raise
        posterior = noisy.posterior(found.sigma)
        return posterior, FitReport(
            "tfb", posterior.family, len(job.train), 0, time.perf_counter() - started,
            held_out_nll=held_out_nll(posterior, job), details=details,
        )  # fmt: skip

    def _search(self, noisy: NoisyAdapter) -> tuple[Found, dict[str, Any]]:
        zero = noisy.at_mean()
        examples = labelled(noisy.examples, zero, self.labels)
        excess = (nll_excess if self.criterion == "nll" else flips)(zero, examples, noisy.job.likelihood)
        bound = BOUNDS[self.criterion] if self.bound is None else self.bound
        nll = _nll(zero[None], examples, noisy.job.likelihood)
        found = NoiseScale(
            noisy.outputs, excess, zero, bound, spread=_spread(zero, examples, noisy.job.likelihood),
            typical=1.5 * bound * (abs(nll) if self.criterion == "nll" else 1.0), start=self.start,
            largest=self.largest, pilot=self.pilot, tolerance=self.tolerance,
        ).run()  # fmt: skip
        if found.at_limit:
            warnings.warn(
                f"tfb: {len(examples)} anchors tolerate even the largest sigma, {self.largest:g}: they do not bound it "
                "(too few, or an adapter that hardly does anything for them); take more anchors, or labels='predicted'",
                stacklevel=3,
            )
        details = {
            "sigma": found.sigma, "excess": found.excess, "criterion": self.criterion, "bound": bound,
            "at_limit": found.at_limit, "infeasible": found.infeasible if math.isfinite(found.infeasible) else None,
            "nll_at_mean": nll, "anchors": len(examples),
            "draws": self.draws, "seed": noisy.job.seed, "example_forwards": noisy.forwards,
            "bisection_forwards": BISECTION_STEPS * self.draws * len(examples), "layer_share": noisy.layer_share(),
            "one_by_one": noisy.one_by_one, "trail": found.trail,
        }  # fmt: skip
        return found, details


def chosen(method: TFB, job: Job) -> list[Example]:
    """The anchors, in random order, so that the first few are like all."""
    source = job.train if method.source == "train" else job.held_out
    if not source:
        raise UserError("tfb: no anchors: source is 'held_out' and the job has no held-out examples")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(job.seed))
    return [source[n] for n in order[: method.anchors].tolist()]


def labelled(examples: Sequence[Example], zero: Tensor, labels: Labels) -> list[Example]:
    """With the adapter's own labels in place of the given ones where these are asked for; zero [N, C]."""
    if labels == "given":
        return list(examples)
    _check_classes(zero, "labels 'predicted' need")
    return [replace(e, target=c) for e, c in zip(examples, zero.argmax(-1).tolist(), strict=True)]


def _check_classes(zero: Tensor, what: str) -> None:
    if zero.shape[-1] < 2:
        raise UserError(f"tfb: {what} a likelihood with classes (Choice); this one has one output an example")


def _nll(f: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> float:
    return nll_of_outputs(f, examples[: f.shape[1]], likelihood)


def nll_excess(zero: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> Measure:
    """(L(f) - L(zero)) / |L(zero)| of outputs f [S, n, C] of the first n examples; zero [N, C]."""

    def excess(f: Tensor) -> float:
        before = _nll(zero[None, : f.shape[1]], examples, likelihood)
        if before == 0:
            raise UserError(
                "tfb: without noise the anchors have NLL 0, so no relative change: use criterion 'flips'"
            )
        return (_nll(f, examples, likelihood) - before) / abs(before)

    return excess


def _spread(zero: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> Measure:
    """Mean square of what noise adds to log p(y | x): near twice the excess of a single draw, in nats, for labels that
    the adapter itself might have given."""

    def spread(f: Tensor) -> float:
        batch, before = make_batch(examples[: f.shape[1]]), zero[: f.shape[1]]
        return float((likelihood.log_prob(f, batch) - likelihood.log_prob(before, batch)).square().mean())

    return spread


def flips(zero: Tensor, examples: Sequence[Example], likelihood: Likelihood) -> Measure:
    _check_classes(zero, "criterion 'flips' needs")
    first = zero.argmax(-1)

    def excess(f: Tensor) -> float:
        return float((f.softmax(-1).mean(0).argmax(-1) != first[: f.shape[1]]).double().mean())

    return excess
