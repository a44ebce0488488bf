"""Do confidences come true? Binned calibration errors of the chosen answer, beside what chance alone would read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from ...stats import OnInvalid, empty, in_blocks, resample, summarise
from ...types import Estimate
from .binning import Bins, BinSums, Scheme, bin_cells, bin_sums, make_bins, null_cells
from .inputs import Array, Column, clean, whole

NAN = float("nan")
NULL_DRAWS = 1000


@dataclass(frozen=True)
class CalibrationEstimate(Estimate):
    """A calibration error beside what perfectly calibrated answers with the same confidences would read: the mean of
    that, its central 95 % interval, and `p`, the share of such draws that are at least as large as the value. An
    error with p > 0.05 is not distinguishable from calibrated. `bin_n` is the size of the worst bin (MCE)."""

    null_mean: float = NAN
    null_ci: tuple[float, float] = (NAN, NAN)
    p: float = NAN
    bin_n: int | None = None

    def to_json(self) -> dict[str, Any]:
        null = {"null_mean": self.null_mean, "null_ci": list(self.null_ci), "p": self.p, "bin_n": self.bin_n}
        return {**super().to_json(), **null}


@dataclass(frozen=True)
class ReliabilityDiagram:
    """B bins, empty ones included (n = 0, the rest NaN): edges [B + 1], n, mean confidence and accuracy [B], the Wilson
    interval of the accuracy, and the 95 % band in which it would lie if the confidences were true."""

    scheme: Scheme
    edges: Array
    n: NDArray[np.int64]
    conf: Array
    acc: Array
    acc_low: Array
    acc_high: Array
    null_low: Array
    null_high: Array


@dataclass(frozen=True)
class NullBand:
    """ECE of perfectly calibrated answers with given confidences: mean, central 95 % and the sorted draws."""

    mean: float
    ci: tuple[float, float]
    draws: Array

    def p(self, value: float) -> float:
        """(1 + #{draws >= value}) / (1 + draws)."""
        return _p_value(self.draws, value)


def ece(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    debiased: bool = False,
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> CalibrationEstimate:
    """Expected calibration error (Naeini et al. 2015) of confidences [n] in [0, 1] and 0/1 correctness [n]:

        ECE = sum_b (n_b / n) |acc_b - conf_b|

    scheme "width": B right-closed bins of equal width, 0 in the first, 1.0 in the last. "mass": equal mass, equal
    confidences kept together, one bin a value where there are no more values than bins (vote fractions). `debiased`:
    the L2 error of Kumar et al. 2019 (arXiv 1909.10155),

        ECE_2^2 = sum_b (n_b / n) [ (acc_b - conf_b)^2 - acc_b (1 - acc_b) / (n_b - 1) ],

    no correction where n_b = 1; the root of max(0, .), flag `clipped` where that was negative.

    Perfectly calibrated answers do not read 0 (about 0.05 at n = 500): compare with `null_mean`, `null_ci` and `p`.
    SE and interval: bootstrap over items with the bins fixed, replicates moved to the value, since resampling adds
    its own upward bias. Not for ranking systems of different accuracy, nor as proof of calibration: a constant
    confidence equal to the accuracy reads 0."""
    statistic = _l2_debiased if debiased else _l1
    name = f"{'debiased L2' if debiased else 'ECE'}, {bins} bins of equal {scheme}"
    return _calibration(confidence, correct, bins, scheme, statistic, name, seed, on_invalid)


def mce(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> CalibrationEstimate:
    """Maximum calibration error: max over non-empty bins of |acc_b - conf_b|, with the size of that bin in `bin_n`
    (of the largest such bin). SE, interval and null as `ece`. Not to be read without `bin_n`: the worst bin is mostly
    the smallest."""
    name = f"MCE, {bins} bins of equal {scheme}"
    return _calibration(confidence, correct, bins, scheme, _largest, name, seed, on_invalid)


def reliability_diagram(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> ReliabilityDiagram:
    """The bins behind `ece`, with a Wilson interval for each accuracy and the band of calibrated answers (NULL_DRAWS
    draws of y ~ Bernoulli(c))."""
    [c, y], _ = _columns(confidence, correct, on_invalid)
    found = make_bins(c, bins, scheme)
    sums = bin_sums(found, c, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        acc, conf = sums.right / sums.n, sums.conf / sums.n
        low, high = _wilson(sums.right, sums.n)
        null = (
            _null_sums(found, c, NULL_DRAWS, seed).right / sums.n if len(c) else np.full((1, len(found)), NAN)
        )
    null_low, null_high = np.quantile(null, [0.025, 0.975], axis=0)
    return ReliabilityDiagram(
        scheme, found.edges, sums.n.astype(np.int64), conf, acc, low, high, null_low, null_high
    )


def null_band(
    confidence: ArrayLike, bins: int = 15, scheme: Scheme = "width", resamples: int = 1000, seed: int = 0
) -> NullBand:
    """ECE when every confidence is true: y ~ Bernoulli(c) drawn `resamples` times, bins as in `ece`."""
    [c], _ = clean(Column("confidence", confidence, "unit"))
    if not len(c):
        return NullBand(NAN, (NAN, NAN), np.empty(0))
    found = make_bins(c, bins, scheme)
    return _band(_l1(_null_sums(found, c, whole("resamples", resamples), seed)))


Statistic = Callable[[BinSums], Array]


def _l1(sums: BinSums) -> Array:
    return (np.abs(sums.right - sums.conf)).sum(axis=-1) / np.maximum(sums.n.sum(axis=-1), 1)


def _l2_squared(sums: BinSums) -> Array:
    acc = sums.right / np.maximum(sums.n, 1)
    correction = np.where(sums.n > 1, acc * (1 - acc) / np.maximum(sums.n - 1, 1), 0.0)
    return (sums.n * (sums.gap**2 - correction)).sum(axis=-1) / np.maximum(sums.n.sum(axis=-1), 1)


def _l2_debiased(sums: BinSums) -> Array:
    return np.sqrt(np.maximum(_l2_squared(sums), 0.0))


def _largest(sums: BinSums) -> Array:
    return np.abs(sums.gap).max(axis=-1)


def _calibration(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int,
    scheme: Scheme,
    statistic: Statistic,
    method: str,
    seed: int,
    on_invalid: OnInvalid,
) -> CalibrationEstimate:
    [c, y], dropped = _columns(confidence, correct, on_invalid)
    found = make_bins(c, bins, scheme)
    if not len(c):
        return _with_null(empty(method, dropped), NullBand(NAN, (NAN, NAN), np.empty(0)), None)
    sums = bin_sums(found, c, y)
    flags = ("clipped",) if statistic is _l2_debiased and _l2_squared(sums) < 0 else ()
    worst = np.abs(sums.gap)
    size = int(sums.n[worst >= worst.max() * (1 - 1e-12)].max()) if statistic is _largest else None
    alike, one_hot = bin_cells(found, c, y)

    def of_weights(w: Array) -> Array:
        return statistic(BinSums(w @ one_hot, (w * alike.y) @ one_hot, (w * alike.x) @ one_hot))

    estimate = summarise(
        float(statistic(sums)),
        in_blocks(resample(alike.count, seed=seed), of_weights),
        len(c),
        dropped=dropped,
        method=f"{method}; bootstrap",
        flags=flags,
        bounds=(0.0, 1.0),
        centre=True,
    )
    return _with_null(estimate, _band(statistic(_null_sums(found, c, NULL_DRAWS, seed))), size)


def _with_null(estimate: Estimate, null: NullBand, size: int | None) -> CalibrationEstimate:
    p = null.p(estimate.value) if len(null.draws) else NAN
    return CalibrationEstimate(
        estimate.value,
        estimate.se,
        estimate.ci,
        estimate.n,
        estimate.n_dropped,
        estimate.method,
        estimate.flags,
        null.mean,
        null.ci,
        p,
        size,
    )


def _null_sums(bins: Bins, confidence: Array, draws: int, seed: int) -> BinSums:
    """Bin sums [draws, B] when y ~ Bernoulli(c): one binomial for all items of one confidence (beyond 2,048
    confidences, of one bin and about one confidence)."""
    alike, one_hot = null_cells(bins, confidence)
    generator = np.random.default_rng([seed, 1])
    alone = bool((alike.count == 1).all())

    def draw(rows: int) -> Array:
        if alone:
            return (generator.random((rows, len(alike.x))) < alike.x) @ one_hot
        return generator.binomial(alike.count, alike.x, (rows, len(alike.x))) @ one_hot

    right = _in_rows(draws, len(alike.count), draw)
    n, conf = alike.count @ one_hot, (alike.count * alike.x) @ one_hot
    return BinSums(np.broadcast_to(n, right.shape), right, np.broadcast_to(conf, right.shape))


def _in_rows(rows: int, cost: int, draw: Callable[[int], Array]) -> Array:
    """draw(r) for r rows at a time, stacked, so that no temporary exceeds some ten MB."""
    size = max(1, 1_000_000 // max(cost, 1))
    return np.concatenate([draw(min(size, rows - i)) for i in range(0, rows, size)])


def _band(draws: Array) -> NullBand:
    low, high = np.quantile(draws, [0.025, 0.975])
    return NullBand(float(draws.mean()), (float(low), float(high)), np.sort(draws))


def _p_value(draws: Array, value: float) -> float:
    """Rounding must not turn a tie into a miss."""
    return float((1 + (draws >= value * (1 - 1e-12)).sum()) / (1 + len(draws)))


def _columns(confidence: ArrayLike, correct: ArrayLike, on_invalid: OnInvalid) -> tuple[list[Array], int]:
    columns = Column("confidence", confidence, "unit"), Column("correct", correct, "binary")
    return clean(*columns, on_invalid=on_invalid)


def _wilson(right: Array, n: Array) -> tuple[Array, Array]:
    """Wilson's interval of right / n, elementwise, NaN where n = 0."""
    z = float(norm.ppf(0.975))
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
