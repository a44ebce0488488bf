"""Is one system better than another, on the same items?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from ...stats import PairedEstimate

NAN = float("nan")


@dataclass(frozen=True)
class Comparison(PairedEstimate):
    """A paired difference with its minimum detectable effect (80 % power at 5 %) and the p adjusted by Holm
    over the tasks compared together (p itself where there is one)."""

    mde: float = NAN
    p_holm: float = NAN

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "mde": self.mde, "p_holm": self.p_holm}


def compare(
    a: ArrayLike,
    b: ArrayLike,
    ids_a: Sequence[Hashable],
    ids_b: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """mean(a - b) over items joined on their ids. UserError when the id sets differ."""
    raise NotImplementedError


def compare_tasks(
    tasks: Mapping[str, tuple[ArrayLike, ArrayLike, Sequence[Hashable], Sequence[Hashable]]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """`compare` on every task, p-values adjusted by Holm."""
    raise NotImplementedError
