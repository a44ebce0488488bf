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
    OnInvalid,
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
    on_invalid: OnInvalid = "raise",
) -> Comparison:
    """mean(a - b) over items, joined on their ids (positions mean nothing): SE = s(d)/sqrt(n), BCa bootstrap interval
    over items, exact McNemar where both are 0/1, else sign flips. An id that occurs several times has several
    samples, and its mean is compared (flag `averaged`). `on_invalid="drop"` leaves an item with a value that is not
    finite out on both sides.

    UserError when the two have not been run on the same items, naming how many ids are missing on either side: numbers
    over different items are not comparable. Not for many systems at once without `holm`, nor for a metric that is not
    a mean over items (AUROC, ECE)."""
    first, second, averaged, dropped = _joined(a, b, ids_a, ids_b, on_invalid)
    found = paired_values(first, second, resamples=whole("resamples", resamples), seed=seed)
    flags = (*found.flags, "averaged") if averaged else found.flags
    return Comparison(
        found.value,
        found.se,
        found.ci,
        found.n,
        dropped,
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
    tasks: Mapping[str, Systems],
    *,
    resamples: int = 2000,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> dict[str, Comparison]:
    """`compare` on every task (a, b, ids_a, ids_b), with p adjusted by Holm's step-down over the tasks: the chance of
    any false claim stays below 5 %. Tasks without an item are left out of the count."""
    found = {
        name: compare(a, b, ids_a, ids_b, resamples=resamples, seed=seed, on_invalid=on_invalid)
        for name, (a, b, ids_a, ids_b) in tasks.items()
    }
    counted = [name for name, c in found.items() if np.isfinite(c.p)]
    for name, p in zip(counted, holm([found[name].p for name in counted]), strict=True):
        found[name] = replace(found[name], p_holm=p)
    return found


def _joined(
    a: ArrayLike, b: ArrayLike, ids_a: Labels, ids_b: Labels, on_invalid: OnInvalid
) -> tuple[Array, Array, bool, int]:
    """Both sides item by item, whether an item had several samples, and the items dropped."""
    first, second = _values("a", a, ids_a, on_invalid), _values("b", b, ids_b, on_invalid)
    ids = [*_plain(ids_a), *_plain(ids_b)]
    codes, count = factorise(ids)
    code_a, code_b = codes[: len(first)], codes[len(first) :]
    in_a, in_b = np.bincount(code_a, minlength=count), np.bincount(code_b, minlength=count)
    only_a, only_b = int((in_b == 0).sum()), int((in_a == 0).sum())
    if only_a or only_b:
        example = ids[int(np.argmax((in_b == 0)[codes] if only_a else (in_a == 0)[codes]))]
        raise UserError(
            f"the two systems were not run on the same items: {only_a} ids only in the first, {only_b} only in the "
            f"second (such as {example!r}); compare them on the same items"
        )
    mean_a = group_sums(code_a, first, count) / np.maximum(in_a, 1)
    mean_b = group_sums(code_b, second, count) / np.maximum(in_b, 1)
    kept = np.isfinite(mean_a) & np.isfinite(mean_b)
    return mean_a[kept], mean_b[kept], bool((in_a > 1).any() or (in_b > 1).any()), int((~kept).sum())


def _values(name: str, values: ArrayLike, ids: Labels, on_invalid: OnInvalid) -> Array:
    clean(Column(name, values, "finite"), on_invalid=on_invalid)
    array = np.atleast_1d(np.asarray(values, dtype=float))
    if len(array) != len(ids):
        raise UserError(f"{len(array)} values in {name} but {len(ids)} ids; give the id of every value")
    return np.where(np.isfinite(array), array, np.nan)


def _plain(ids: Labels) -> list[Any]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
