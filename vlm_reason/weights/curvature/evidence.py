"""The marginal likelihood of Laplace's approximation, and the prior precision that maximises it.

    log Z = log p(y | theta*) / T - 1/2 [ (theta* - theta_0)^T P_0 (theta* - theta_0) + log |P| - log |P_0| ]
    P = H / T + P_0

(MacKay 1992). With P_0 = delta 1 on a group of n weights whose curvature has eigenvalues h_i,

    d log Z / d log delta = 1/2 [ gamma(delta) - delta |theta* - theta_0|^2 ],    gamma = sum_i h_i / (h_i + delta)

which falls from n towards -infinity: one root, found by bisection, and no step size to choose. gamma is the number of
weights the data determine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError

SMALLEST, LARGEST = 1e-8, 1e12


@dataclass(frozen=True)
class Spectrum:
    """Of H / T on some of the weights. values [m], each `times` [m] times over, fp64; square: |theta* - theta_0|^2."""

    values: Tensor
    times: Tensor
    square: float

    @property
    def size(self) -> int:
        return int(self.times.sum())

    def effective(self, delta: float) -> float:
        """gamma"""
        return float((self.times * self.values / (self.values + delta)).sum())

    def evidence(self, delta: float) -> float:
        """Its share of log Z, without the likelihood: -1/2 [delta |theta|^2 + sum_i log(1 + h_i / delta)]."""
        return -(delta * self.square + float((self.times * (self.values / delta).log1p()).sum())) / 2


def together(spectra: Sequence[Spectrum]) -> Spectrum:
    return Spectrum(
        torch.cat([s.values for s in spectra]),
        torch.cat([s.times for s in spectra]),
        sum(s.square for s in spectra),
    )


def best_delta(spectrum: Spectrum) -> float:
    """The prior precision of highest evidence, to rounding; LARGEST for weights at their prior mean that the data say
    nothing of, SMALLEST for the opposite."""
    low, high = math.log(SMALLEST), math.log(LARGEST)

    def slope(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return spectrum.effective(delta) - delta * spectrum.square

    if slope(high) >= 0:
        return LARGEST
    if slope(low) <= 0:
        return SMALLEST
    while high - low > 1e-14 * max(1.0, abs(high)):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def best_deltas(spectra: Mapping[str, Spectrum], group_of: Mapping[str, str]) -> dict[str, float]:
    """Key -> delta, one for each group."""
    found = {}
    for group in sorted(set(group_of.values())):
        keys = [k for k in spectra if group_of[k] == group]
        delta = best_delta(together([spectra[k] for k in keys]))
        found.update({k: delta for k in keys})
    return found


def best_deltas_dense(
    hessian: Tensor, parts: Mapping[str, slice], squares: Mapping[str, float], group_of: Mapping[str, str]
) -> dict[str, float]:
    """The same where groups are correlated: MacKay's fixed point delta_g = gamma_g / |theta_g|^2 with
    gamma_g = n_g - delta_g tr_g(P^-1), until no delta moves by more than 1e-7 of itself."""
    groups = sorted(set(group_of.values()))
    index = {
        g: torch.cat([torch.arange(parts[k].start, parts[k].stop) for k in parts if group_of[k] == g])
        for g in groups
    }
    square = {g: sum(squares[k] for k in parts if group_of[k] == g) for g in groups}
    delta = {g: min(max(len(index[g]) / max(square[g], 1e-300), SMALLEST), LARGEST) for g in groups}
    for _ in range(2000):
        prior = torch.empty(len(hessian), dtype=torch.float64)
        for g in groups:
            prior[index[g]] = delta[g]
        variance = torch.cholesky_inverse(torch.linalg.cholesky(hessian + prior.diag())).diagonal()
        moved = 0.0
        for g in groups:
            gamma = len(index[g]) - delta[g] * float(variance[index[g]].sum())
            new = gamma / square[g] if square[g] > 0 else LARGEST
            new = min(max(new, SMALLEST), LARGEST)
            moved = max(moved, abs(math.log(new / delta[g])))
            delta[g] = new
        if moved < 1e-7:
            break
    return {k: delta[group_of[k]] for k in parts}


def groups(keys: Sequence[str], by: str) -> dict[str, str]:
    """Key -> group. by: global, kind (all A, all B) or tensor."""
    if by == "global":
        return dict.fromkeys(keys, "all")
    if by == "kind":
        return {k: "A" if ".lora_A" in k else "B" for k in keys}
    if by == "tensor":
        return {k: k for k in keys}
    raise UserError(f"groups must be global, kind or tensor, got {by!r}")
