"""How far the sampler's log-probabilities are from the scorer's under the same law: two programs, one distribution.

    d_t = log p_scorer(z_t | ...) - log p_sampler(z_t | ...)         at tokens that the sampler drew

    mean, max   of |d_t|
    kl          mean of e^{d_t} - d_t - 1, an unbiased, non-negative estimate of KL(sampler || scorer) per token
                (Schulman 2020, "Approximating KL divergence", k3)
    outside     tokens that the scorer's nucleus excludes (d = -inf); they are in none of the above

Where the two agree, sampler log-probabilities stand for scores and a scoring pass is saved. Kernels, dtypes, stale
weights and quantisation make them differ; a mean of a few hundredths of a nat is usual for bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mismatch:
    """Sums over tokens, so that parts of a window add up."""

    tokens: int = 0
    total: float = 0.0
    largest: float = 0.0
    kl: float = 0.0
    outside: int = 0

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            self.tokens + other.tokens,
            self.total + other.total,
            max(self.largest, other.largest),
            self.kl + other.kl,
            self.outside + other.outside,
        )

    def metrics(self) -> dict[str, float | int | None]:
        """None where nothing was compared."""
        n = self.tokens
        return {
            "mismatch/mean": self.total / n if n else None,
            "mismatch/max": self.largest if n else None,
            "mismatch/kl": self.kl / n if n else None,
            "mismatch/outside": self.outside,
            "mismatch/tokens": n,
        }


def compare(sampled: Iterable[Sequence[float]], scored: Iterable[Sequence[float]]) -> Mismatch:
    """Of sequences' token log-probabilities, pairwise."""
    gaps = [
        theirs - ours
        for own, other in zip(sampled, scored, strict=True)
        for ours, theirs in zip(own, other, strict=True)
    ]
    finite = [d for d in gaps if math.isfinite(d)]
    return Mismatch(
        len(finite),
        sum(abs(d) for d in finite),
        max((abs(d) for d in finite), default=0.0),
        sum(math.expm1(d) - d for d in finite),
        len(gaps) - len(finite),
    )
