"""Selective prediction: how well does uncertainty say which answers to withhold?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...stats import OnInvalid
from ...types import Estimate


@dataclass(frozen=True)
class RiskCoverage:
    """coverage [n] = i/n; risk [n] = mean loss of the i least uncertain, expected over ties; oracle [n] with
    the losses sorted; base_risk, the risk of answering at random."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    oracle: NDArray[np.float64]
    base_risk: float


def risk_coverage(
    uncertainty: ArrayLike, loss: ArrayLike, *, on_invalid: OnInvalid = "raise"
) -> RiskCoverage:
    """The risk-coverage curve."""
    raise NotImplementedError


def aurc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """(1/n) sum_i L_i / i."""
    raise NotImplementedError


def e_aurc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """AURC minus the AURC of the oracle."""
    raise NotImplementedError


def augrc(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """(1/n) sum_i L_i / n."""
    raise NotImplementedError


def prr(
    uncertainty: ArrayLike, loss: ArrayLike, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """(mean(l) - AURC) / (mean(l) - AURC*); NaN if all right or all wrong."""
    raise NotImplementedError


def risk_at_coverage(
    uncertainty: ArrayLike,
    loss: ArrayLike,
    coverage: float,
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Mean loss of the least uncertain share `coverage`."""
    raise NotImplementedError


def coverage_at_risk(
    uncertainty: ArrayLike, loss: ArrayLike, risk: float, *, seed: int = 0, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Largest i/n with r(i) <= risk; 0 if there is none."""
    raise NotImplementedError
