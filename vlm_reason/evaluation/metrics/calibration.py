"""Do confidences come true?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...stats import OnInvalid
from ...types import Estimate

NAN = float("nan")
Scheme = Literal["width", "mass"]


@dataclass(frozen=True)
class CalibrationEstimate(Estimate):
    """A calibration error beside what perfectly calibrated data would read: `null_mean`, its central 95 %
    `null_ci`, and `p`, the share of null draws at least as large as the value. `bin_n` is the size of the
    worst bin (MCE)."""

    null_mean: float = NAN
    null_ci: tuple[float, float] = (NAN, NAN)
    p: float = NAN
    bin_n: int | None = None

    def to_json(self) -> dict[str, Any]:
        null = {"null_mean": self.null_mean, "null_ci": list(self.null_ci), "p": self.p, "bin_n": self.bin_n}
        return {**super().to_json(), **null}


@dataclass(frozen=True)
class ReliabilityDiagram:
    """B bins (empty ones included): edges [B + 1], n, conf, acc [B] (NaN where n = 0), the Wilson interval of
    acc, and the 95 % band of acc if the confidences were true."""

    scheme: Scheme
    edges: NDArray[np.float64]
    n: NDArray[np.int64]
    conf: NDArray[np.float64]
    acc: NDArray[np.float64]
    acc_low: NDArray[np.float64]
    acc_high: NDArray[np.float64]
    null_low: NDArray[np.float64]
    null_high: NDArray[np.float64]


@dataclass(frozen=True)
class NullBand:
    """ECE of perfectly calibrated answers with these confidences."""

    mean: float
    ci: tuple[float, float]
    draws: NDArray[np.float64]

    def p(self, value: float) -> float:
        """(1 + #{draws >= value}) / (1 + draws)."""
        raise NotImplementedError


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
    """sum_b (n_b / n) |acc_b - conf_b|; `debiased`: Kumar's L2 error."""
    raise NotImplementedError


def mce(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> CalibrationEstimate:
    """max over non-empty bins of |acc_b - conf_b|."""
    raise NotImplementedError


def reliability_diagram(
    confidence: ArrayLike,
    correct: ArrayLike,
    bins: int = 15,
    scheme: Scheme = "width",
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> ReliabilityDiagram:
    """The bins behind `ece`."""
    raise NotImplementedError


def null_band(
    confidence: ArrayLike, bins: int = 15, scheme: Scheme = "width", resamples: int = 1000, seed: int = 0
) -> NullBand:
    """ECE under y ~ Bernoulli(c)."""
    raise NotImplementedError
