"""The largest noise a set of examples tolerates: a root of excess(sigma) = bound in few forwards.

    theta_s(sigma) = m +- sigma w E_k      the same noise at every sigma; draws 2k and 2k + 1 lie opposite each other
    f_s(sigma)     = f(0) +- o_k(sigma) + e_k(sigma)                       odd and even part of a pair of draws

o / sigma and e / sigma^2 hardly change with sigma. So all draws at one sigma say, of every draw and example, what the
outputs are at other values, to third order; any criterion on outputs is a smooth curve in sigma that costs no forward.
Few examples find the region and how the parts bend further away; an evaluation of all is given up as soon as those it
has seen make the bound unlikely to hold. What is returned has been evaluated on all examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError

Evaluate = Callable[[float, int, int], Tensor]
"""(sigma, first, stop) -> outputs f [S, stop - first, C], fp64, of examples first to stop - 1."""
Measure = Callable[[Tensor], float]
"""Of outputs [S, n, C] of the first n examples."""

REACH = 4.0
"""How far beyond the largest sigma seen a prediction goes."""
GRID, MOST, CHUNKS = 48, 16, 4
"""Places a predicted curve is looked at; evaluations at each stage; parts of an evaluation on all examples."""


@dataclass
class Point:
    """Outputs [S, n, C] of the first n examples at one sigma."""

    sigma: float
    outputs: Tensor

    @property
    def rows(self) -> int:
        return self.outputs.shape[1]


@dataclass
class Found:
    """sigma: feasible, evaluated on all examples. excess: there. infeasible: the lowest sigma known not to be, inf if
    none. at_limit: `largest` is feasible. trail: (sigma, examples, excess) of every evaluation."""

    sigma: float
    excess: float
    infeasible: float
    at_limit: bool
    trail: list[tuple[float, int, float]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- prediction


def parts(point: Point, at_zero: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Odd and even part [S / 2, n, C]; at_zero [n, C] of the same rows."""
    up, down = point.outputs[0::2, rows], point.outputs[1::2, rows]
    return (up - down) / 2, (up + down) / 2 - at_zero


def joined(at_zero: Tensor, odd: Tensor, even: Tensor) -> Tensor:
    """f [S, n, C] from its parts."""
    return torch.stack((at_zero + even + odd, at_zero + even - odd), 1).flatten(0, 1)


def predict(at_zero: Tensor, points: Sequence[Point], sigma: float) -> Tensor:
    """f [S, n, C] at sigma, from at_zero [n, C] and points of all n rows: o / sigma and e / sigma^2 are a polynomial in
    sigma^2 through the points near by."""
    near = _near(points, sigma)
    odd, even = torch.zeros(()), torch.zeros(())
    for p in near:
        share = math.prod((sigma**2 - q.sigma**2) / (p.sigma**2 - q.sigma**2) for q in near if q is not p)
        o, e = parts(p, at_zero)
        odd, even = odd + share * sigma / p.sigma * o, even + share * (sigma / p.sigma) ** 2 * e
    return joined(at_zero, odd, even)


def _near(points: Sequence[Point], sigma: float) -> list[Point]:
    """The nearest point and up to two more within a factor of 2 that are apart enough; one far above all of them."""
    ordered = sorted(points, key=lambda p: abs(math.log(p.sigma / sigma)))
    chosen = ordered[:1]
    most = 1 if sigma > 1.5 * max(p.sigma for p in points) else 3
    for p in ordered[1:]:
        close = abs(math.log(p.sigma / sigma)) < math.log(2)
        if len(chosen) < most and close and all(abs(math.log(p.sigma / q.sigma)) > 0.03 for q in chosen):
            chosen.append(p)
    return chosen


def completed(point: Point, at_zero: Tensor, whole: Sequence[Point]) -> Point:
    """A point of the first rows as one of all: the others are what `whole` predicts, times how much larger the odd and
    the even part came out than predicted on the rows it has (least squares)."""
    known, predicted = slice(0, point.rows), Point(point.sigma, predict(at_zero, whole, point.sigma))
    actual = parts(point, at_zero[known])
    guess = parts(predicted, at_zero)
    scaled = [_ratio(a, g[:, known]) * g[:, point.rows :] for a, g in zip(actual, guess, strict=True)]
    rest = joined(at_zero[point.rows :], *scaled)
    return Point(point.sigma, torch.cat((point.outputs, rest), 1))


def _ratio(actual: Tensor, guess: Tensor) -> float:
    size = float(guess.square().sum())
    return float((actual * guess).sum()) / size if size > 0 else 1.0


# ----------------------------------------------------------------------------------------------------------- search


class NoiseScale:
    """Search for the largest sigma in (0, largest] with excess <= bound, to a relative `tolerance`.

    at_zero [N, C]: outputs without noise. start: where it begins. spread: grows as sigma^2; where it is `typical`, on
    the first quarter of `pilot` examples, all examples are evaluated first.
    """

    def __init__(
        self, evaluate: Evaluate, excess: Measure, at_zero: Tensor, bound: float, *, spread: Measure, typical: float,
        start: float, largest: float, pilot: int, tolerance: float,
    ) -> None:  # fmt: skip
        self.evaluate, self.excess, self.zero, self.bound = evaluate, excess, at_zero, bound
        self.spread, self.typical = spread, typical
        self.start, self.largest, self.tolerance = min(start, largest), largest, tolerance
        self.pilot = min(pilot, len(at_zero))
        self.points: list[Point] = []
        self.trail: list[tuple[float, int, float]] = []

    def run(self) -> Found:
        """UserError if nothing tried is feasible."""
        every = len(self.zero)
        self._at(self._region(), every)
        for _ in range(MOST):
            whole = {p.sigma: self.excess(p.outputs) for p in self.points if p.rows == every}
            bad = min((s for s, excess in whole.items() if excess > self.bound), default=math.inf)
            good = max((s for s in whole if s < bad), default=0.0)
            root = self._root()
            if good and good >= (1 - self.tolerance) * min(root, bad, self.largest):
                break
            self._unless_rejected(self._next(self._refined(root), good, bad))
        if not good:
            raise UserError(f"no noise is tolerated: down to sigma {min(whole):g} the examples do worse than the bound "
                            f"{self.bound:g} allows; raise the bound")  # fmt: skip
        return Found(good, whole[good], bad, good == self.largest, self.trail)

    def _region(self) -> float:
        sigma = self.start
        for _ in range(MOST):
            outputs = self._at(sigma, max(1, self.pilot // 4))
            spread = self.spread(outputs)
            factor = math.sqrt(self.typical / spread) if spread > 0 else 16.0
            if max(factor, 1 / factor) < 1.3 or (factor > 1 and sigma == self.largest):
                break
            sigma = min(self.largest, sigma * min(16.0, max(1 / 16, factor)))
        return sigma

    def _refined(self, root: float) -> float:
        """The predicted root, predicted again with the pilot examples evaluated there, until it stays."""
        for _ in range(3):
            if any(abs(math.log(p.sigma / root)) < 0.1 and p.rows >= self.pilot for p in self.points):
                break
            self._at(root, self.pilot)
            root = self._root()
        return root

    def _unless_rejected(self, sigma: float) -> None:
        """Evaluate in parts; stop when those seen, with the prediction for the others, are beyond the bound."""
        for part in range(1, CHUNKS + 1):
            self._at(sigma, max(self.pilot, len(self.zero) * part // CHUNKS))
            if self.excess(predict(self.zero, self._points(), sigma)) > self.bound:
                return

    def _next(self, root: float, good: float, bad: float) -> float:
        """A little below the predicted root, or inside (good, bad) where that is outside."""
        sigma = root if root >= self.largest else (1 - self.tolerance / 2) * root
        if good < sigma < bad:
            return sigma
        return bad / REACH if not good else math.sqrt(good * min(bad, REACH * good, self.largest))

    def _at(self, sigma: float, rows: int) -> Tensor:
        """Outputs at sigma of the first `rows`, or of more where there are more already. UserError where they are not
        finite: a NaN is beyond no bound."""
        point = next((p for p in self.points if p.sigma == sigma), None)
        if point is None:
            point = Point(sigma, self.evaluate(sigma, 0, rows))
            self.points.append(point)
        elif point.rows < rows:
            point.outputs = torch.cat((point.outputs, self.evaluate(sigma, point.rows, rows)), 1)
        else:
            return point.outputs
        if not bool(torch.isfinite(point.outputs).all()):
            raise UserError(f"outputs are not finite with noise of sigma {sigma:g}: give a smaller `largest`")
        self.trail.append((sigma, rows, self.excess(point.outputs)))
        return point.outputs

    def _points(self) -> list[Point]:
        whole = [p for p in self.points if p.rows == len(self.zero)]
        return whole + [completed(p, self.zero, whole) for p in self.points if p.rows < len(self.zero)]

    def _root(self) -> float:
        """Where the predicted excess first goes beyond the bound, looked for from a 32nd of the lowest sigma that all
        examples were evaluated at to REACH times the highest, but `largest`; one of these two where it lies outside."""
        points, sigmas = self._points(), [p.sigma for p in self.points if p.rows == len(self.zero)]

        def beyond(sigma: float) -> bool:
            return self.excess(predict(self.zero, points, sigma)) > self.bound

        low, high = min(sigmas) / 32, min(self.largest, REACH * max(sigmas))
        grid = torch.logspace(math.log10(low), math.log10(high), GRID, dtype=torch.float64).tolist()
        grid[-1] = high
        for n, sigma in enumerate(grid):
            if beyond(sigma):
                return low if n == 0 else _bisected(beyond, grid[n - 1], sigma)
        return high


def _bisected(beyond: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low
