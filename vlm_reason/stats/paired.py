"""Is system A better than system B? Compared item by item, because most of the variance is between the
items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from ..errors import UserError
from ..types import Estimate
from .intervals import LEVEL, NAN, empty
from .resample import CELLS, cells, in_blocks, resample

SIGN_FLIPS = 10_000


@dataclass(frozen=True)
class PairedEstimate(Estimate):
    """Mean of a_i - b_i. `p` is two-sided, of `test`: exact McNemar for 0/1 items, sign flips otherwise.
    Items where A is above, below and equal to B are counted as wins, losses and ties."""

    p: float = NAN
    test: str = ""
    wins: int = 0
    losses: int = 0
    ties: int = 0

    def to_json(self) -> dict[str, Any]:
        paired = {"p": self.p, "test": self.test, "wins": self.wins, "losses": self.losses, "ties": self.ties}
        return {**super().to_json(), **paired}


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], *, resamples: int = 2000, seed: int = 0
) -> PairedEstimate:
    """Mean difference a - b over items, joined on their ids. SE = s(d) / sqrt(n); the interval is the BCa
    bootstrap over items (Efron 1987), seeded. With several samples an item, pass each item's mean.

    Raises UserError when the id sets differ (two systems are only comparable on the same items) and
    ValueError for a value that is not finite. No items: NaN with the flag `empty`. All differences equal:
    width 0, flag `degenerate`.
    """
    _check_ids(a, b)
    ids = sorted(a)
    first = np.array([a[i] for i in ids], dtype=float)
    second = np.array([b[i] for i in ids], dtype=float)
    for name, values in (("a", first), ("b", second)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}[{ids[int(np.argmin(np.isfinite(values)))]!r}] is not finite")
    return paired_values(first, second, resamples=resamples, seed=seed)


def paired_values(
    first: NDArray[np.float64], second: NDArray[np.float64], *, resamples: int = 2000, seed: int = 0
) -> PairedEstimate:
    """`paired_difference` of two finite arrays that are already item by item."""
    difference = first - second
    n = len(difference)
    if n == 0:
        nothing = empty("paired bootstrap")
        return PairedEstimate(nothing.value, nothing.se, nothing.ci, 0, 0, nothing.method, nothing.flags)
    value = float(difference.mean())
    se = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else NAN
    ci, flags = _bootstrap_ci(difference, resamples, seed)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    return PairedEstimate(
        value,
        se,
        ci,
        n,
        0,
        "paired bootstrap (BCa)",
        flags,
        p=_mcnemar(wins, losses) if binary else _sign_flip(difference, seed),
        test="mcnemar exact" if binary else "sign flip",
        wins=wins,
        losses=losses,
        ties=n - wins - losses,
    )


def _check_ids(a: Mapping[str, float], b: Mapping[str, float]) -> None:
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        example = only_a[0] if only_a else only_b[0]
        raise UserError(
            f"the two systems were not run on the same items: {len(only_a)} ids only in the first, "
            f"{len(only_b)} only in the second (such as {example!r}); compare them on the same problems"
        )


def _bootstrap_ci(
    difference: NDArray[np.float64], resamples: int, seed: int
) -> tuple[tuple[float, float], tuple[str, ...]]:
    value = float(difference.mean())
    if len(difference) == 1:
        return (NAN, NAN), ("single",)
    if np.ptp(difference) == 0:
        return (value, value), ("degenerate",)
    found = cells(difference, np.zeros(len(difference)))
    means = in_blocks(resample(found.count, resamples, seed), lambda w: w @ found.x / len(difference))
    return _bca(value, means, difference), ()


def _bca(value: float, replicates: NDArray[np.float64], sample: NDArray[np.float64]) -> tuple[float, float]:
    """Bias-corrected and accelerated interval of a mean (Efron 1987). The bias z_0 is the normal quantile of
    the share of replicates below the value (ties half); the acceleration of a mean has a closed form,

        sum_i (x_i - mean)^3 / (6 (sum_i (x_i - mean)^2)^(3/2))."""
    below = ((replicates < value).mean() + (replicates <= value).mean()) / 2
    half = 0.5 / len(replicates)
    bias = norm.ppf(np.clip(below, half, 1 - half))
    centred = sample - value
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    tail = bias + norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(replicates, norm.cdf(bias + tail / (1 - acceleration * tail)))
    return float(low), float(high)


def _mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact test that wins ~ Binomial(wins + losses, 1/2) (McNemar 1947); 1 without a discordant
    pair."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def _sign_flip(difference: NDArray[np.float64], seed: int) -> float:
    """Two-sided p that the mean is 0 under random signs. All 2^n signs where that is no more than SIGN_FLIPS;
    else (1 + #{|mean*| >= |mean|}) / (1 + flips), where m equal |d| have the sum |d| (2 Binomial(m, 1/2) -
    m)."""
    observed = abs(difference.sum()) * (1 - 1e-12)  # rounding must not turn a tie into a miss
    n = len(difference)
    if 2**n <= SIGN_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ difference) >= observed).mean())
    found = cells(np.abs(difference), np.zeros(n), CELLS if n <= CELLS else CELLS // 8)
    generator = np.random.default_rng(seed)
    hits, done = 0, 0
    while done < SIGN_FLIPS:
        rows = min(SIGN_FLIPS - done, max(1, 1_000_000 // len(found.count)))
        heads = generator.binomial(found.count, 0.5, size=(rows, len(found.count)))
        hits += int((np.abs((2.0 * heads - found.count) @ found.x) >= observed).sum())
        done += rows
    return (1 + hits) / (1 + SIGN_FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of m p-values (Holm 1979): adj_(i) = max_{j <= i} min(1, (m - j + 1)
    p_(j)), in the order given. Controls the chance of any false claim over several tasks."""
    m = len(p_values)
    adjusted, running = [0.0] * m, 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimum_detectable_effect(se: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference found with probability `power` by a two-sided test at `alpha`, given the
    standard error: (z_{1-alpha/2} + z_power) SE. Says what a comparison that found nothing could have
    found."""
    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * se
