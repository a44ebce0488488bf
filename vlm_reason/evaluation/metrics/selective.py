"""Selective prediction: how well does uncertainty say which answers to withhold?

Items are answered in order of rising uncertainty. Within ties the order is unknown, so every curve and area here is
its expectation over a random order of ties: inside a tie group the cumulative loss L grows by the group's mean. No
number depends on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...errors import UserError
from ...stats import OnInvalid, cells, empty, in_blocks, resample, summarise
from ...types import Estimate
from .inputs import Array, Column, clean
from .prefixes import Prefixes, area_of_means, area_of_sums, coverage_within, prefixes, risk_at


@dataclass(frozen=True)
class RiskCoverage:
    """coverage [n] = i/n; risk [n] = L_i / i, the expected mean loss of the i least uncertain; oracle [n], the same
    with the losses in rising order; tie_low, tie_high [n], the least and greatest risk over the orders of ties;
    base_risk, the mean loss, which is the risk of withholding at random."""

    coverage: Array
    risk: Array
    oracle: Array
    tie_low: Array
    tie_high: Array
    base_risk: float


def risk_coverage(
    uncertainty: ArrayLike, loss: ArrayLike, *, on_invalid: OnInvalid = "raise"
) -> RiskCoverage:
    """The risk-coverage curve (El-Yaniv & Wiener 2010) of uncertainty [n] (higher: less sure) and loss [n] (0/1 or
    any finite number)."""
    [u, l], _ = _columns(uncertainty, loss, on_invalid)
    rank = np.arange(1, len(u) + 1)
    best, worst = (np.cumsum(l[np.lexsort((sign * l, u))]) / rank for sign in (1, -1))
    return RiskCoverage(
        rank / max(len(u), 1),
        _expected_sums(u, l) / rank,
        np.cumsum(np.sort(l)) / rank,
        best,
        worst,
        float(l.mean()) if len(l) else float("nan"),
    )


def aurc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Area under the risk-coverage curve (Geifman et al. 2019, arXiv 1805.08206), lower is better:

        AURC = (1/n) sum_i L_i / i,    L_i the expected loss of the i least uncertain of n

    It mixes accuracy and ranking: compare systems of different accuracy by `prr` or `augrc` too. SE and interval:
    bootstrap over items."""
    return _measure(uncertainty, loss, lambda u, _: area_of_means(u), "AURC", seed, on_invalid)


def e_aurc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """AURC - AURC*, AURC* with the losses in rising order (the oracle): 0 is a perfect ranking. Otherwise as `aurc`."""
    return _measure(
        uncertainty, loss, lambda u, best: area_of_means(u) - area_of_means(best), "E-AURC", seed, on_invalid
    )


def augrc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Area under the generalised risk-coverage curve (Traub et al. 2024, arXiv 2407.01032), (1/n) sum_i L_i / n: the
    expected loss of undetected failures, which does not overweight the first few items as AURC does. Lower is
    better."""
    return _measure(uncertainty, loss, lambda u, _: area_of_sums(u), "AUGRC", seed, on_invalid)


def prr(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Prediction rejection ratio (Malinin et al. 2017; the normalised form of lm-polygraph without its random
    shuffles):

        PRR = (mean(l) - AURC) / (mean(l) - AURC*)

    1 is the oracle, 0 is chance, negative is worse than chance. NaN with the flag `one class` when every loss is the
    same: there is nothing to rank."""
    return _measure(uncertainty, loss, _prr, "PRR", seed, on_invalid)


def risk_at_coverage(
    uncertainty: ArrayLike,
    loss: ArrayLike,
    coverage: float,
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Expected mean loss of the ceil(coverage n) least uncertain items."""
    if not 0 < coverage <= 1:
        raise UserError(f"coverage must be in (0, 1], got {coverage}")
    return _measure(
        uncertainty,
        loss,
        lambda u, _: risk_at(u, coverage),
        f"risk at coverage {coverage:g}",
        seed,
        on_invalid,
    )


def coverage_at_risk(
    uncertainty: ArrayLike, loss: ArrayLike, risk: float, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Largest i/n whose risk L_i / i is at most `risk`; 0 if there is none. It looks at the very losses that it bounds:
    to promise a risk on new items, choose the threshold on held-out ones."""
    if not np.isfinite(risk):
        raise UserError(f"risk must be a finite number, got {risk}")
    return _measure(
        uncertainty,
        loss,
        lambda u, _: coverage_within(u, risk),
        f"coverage at risk {risk:g}",
        seed,
        on_invalid,
    )


Measure = Callable[[Prefixes, Prefixes], Array]
"""The statistic of the items in order of uncertainty, and in order of loss; one value a resample."""


def _measure(
    uncertainty: ArrayLike, loss: ArrayLike, measure: Measure, name: str, seed: int, on_invalid: OnInvalid
) -> Estimate:
    [u, l], dropped = _columns(uncertainty, loss, on_invalid)
    method = f"{name}; bootstrap"
    if not len(u):
        return empty(method, dropped)
    each = np.ones((1, len(u)))
    value = float(measure(prefixes(u, l, each), prefixes(l, l, each))[0])
    if not np.isfinite(value):
        return summarise(value, np.empty(0), len(u), dropped=dropped, method=method, flags=("one class",))
    alike = cells(u, l)

    def of_weights(w: Array) -> Array:
        return measure(prefixes(alike.x, alike.y, w), prefixes(alike.y, alike.y, w))

    replicates = in_blocks(resample(alike.count, seed=seed), of_weights)
    return summarise(value, replicates, len(u), dropped=dropped, method=method)


def _prr(u: Prefixes, best: Prefixes) -> Array:
    base = u.base
    room = base - area_of_means(best)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(room > 1e-12 * np.abs(base), (base - area_of_means(u)) / room, np.nan)


def _expected_sums(u: Array, l: Array) -> Array:
    """[n]: L_1, ..., L_n."""
    _, code, count = np.unique(u, return_inverse=True, return_counts=True)
    mean = np.bincount(code.ravel(), weights=l) / count
    return np.cumsum(np.repeat(mean, count))


def _columns(uncertainty: ArrayLike, loss: ArrayLike, on_invalid: OnInvalid) -> tuple[list[Array], int]:
    columns = Column("uncertainty", uncertainty, "finite"), Column("loss", loss, "finite")
    return clean(*columns, on_invalid=on_invalid)
