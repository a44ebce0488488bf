"""Is one system better than another, on the same items?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import UserError
from ...stats import (
    Labels,
    PairedEstimate,
    factorise,
    group_sums,
    holm,
    minimum_detectable_effect,
    paired_values,
)
from .inputs import Array, Column, clean, whole

NAN = float("nan")
Systems = tuple[ArrayLike, ArrayLike, Labels, Labels]


@dataclass(frozen=True)
class Comparison(PairedEstimate):
    """A paired difference, with the smallest true difference it could have found (80 % power at 5 %) and the p
    adjusted by Holm over the tasks compared together (p itself for a single one)."""

    mde: float = NAN
    p_holm: float = NAN

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "mde": self.mde, "p_holm": self.p_holm}


def compare(
    a: ArrayLike,
    b: ArrayLike,
    ids_a: Labels,
    ids_b: Labels,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """mean(a - b) over items, joined on their ids (positions mean nothing): SE = s(d)/sqrt(n), BCa bootstrap interval
    over items, exact McNemar where both are 0/1, else sign flips. An id that occurs several times has several
    samples, and its mean is compared (flag `averaged`).

    UserError when the two have not been run on the same items, naming how many ids are missing on either side: numbers
    over different items are not comparable. Not for many systems at once without `holm`, nor for a metric that is not
    a mean over items (AUROC, ECE)."""
    first, second, averaged = _joined(a, b, ids_a, ids_b)
    found = paired_values(first, second, resamples=whole("resamples", resamples), seed=seed)
    flags = (*found.flags, "averaged") if averaged else found.flags
    return Comparison(
        found.value,
        found.se,
        found.ci,
        found.n,
        found.n_dropped,
        found.method,
        flags,
        found.p,
        found.test,
        found.wins,
        found.losses,
        found.ties,
        minimum_detectable_effect(found.se),
        found.p,
    )


def compare_tasks(
    tasks: Mapping[str, Systems], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Comparison]:
    """`compare` on every task (a, b, ids_a, ids_b), with p adjusted by Holm's step-down over the tasks: the chance of
    any false claim stays below 5 %. Tasks without an item are left out of the count."""
    found = {
        name: compare(a, b, ids_a, ids_b, resamples=resamples, seed=seed)
        for name, (a, b, ids_a, ids_b) in tasks.items()
    }
    counted = [name for name, c in found.items() if np.isfinite(c.p)]
    for name, p in zip(counted, holm([found[name].p for name in counted]), strict=True):
        found[name] = replace(found[name], p_holm=p)
    return found


def _joined(a: ArrayLike, b: ArrayLike, ids_a: Labels, ids_b: Labels) -> tuple[Array, Array, bool]:
    [first], _ = clean(Column("a", a, "finite"))
    [second], _ = clean(Column("b", b, "finite"))
    for name, values, ids in (("a", first, ids_a), ("b", second, ids_b)):
        if len(values) != len(ids):
            raise UserError(f"{len(values)} values in {name} but {len(ids)} ids; give the id of every value")
    codes, count = factorise([*_plain(ids_a), *_plain(ids_b)])
    in_a, in_b = (np.bincount(c, minlength=count) for c in (codes[: len(first)], codes[len(first) :]))
    only_a, only_b = int((in_b == 0).sum()), int((in_a == 0).sum())
    if only_a or only_b:
        missing = int(np.argmax(in_b == 0)) if only_a else int(np.argmax(in_a == 0))
        where = int(np.argmax(codes == missing))
        example = [*_plain(ids_a), *_plain(ids_b)][where]
        raise UserError(
            f"the two systems were not run on the same items: {only_a} ids only in the first, {only_b} only in the "
            f"second (such as {example!r}); compare them on the same items"
        )
    mean_a = group_sums(codes[: len(first)], first, count) / np.maximum(in_a, 1)
    mean_b = group_sums(codes[len(first) :], second, count) / np.maximum(in_b, 1)
    return mean_a, mean_b, bool((in_a > 1).any() or (in_b > 1).any())


def _plain(ids: Labels) -> list[Any]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
