"""Self-consistency: the answer most samples agree on (Wang et al. 2022, arXiv 2203.11171).

Votes are cast on canonical answers. A sample that could not be read abstains: it never votes for "unreadable", and an
item without a readable sample is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import UserError
from ...stats import OnInvalid, group_sums
from ...types import Estimate
from .answers import UNREAD, Answers, Classes, Sampled, classes, sampled, unreadable
from .inputs import Array, Column, as_items, clean, one_item, ragged, same_sizes, spoilt, whole
from .majority import expected_majority, expected_weighted
from .repeats import over_items


@dataclass(frozen=True)
class Votes:
    """Arrays of one entry an item: the winning answer (None where nothing could be read), its share of all samples
    (0 there; unread samples stay in the denominator), and how many samples were unread."""

    answer: tuple[Any, ...]
    share: Array
    unparsed: NDArray[np.int64]


def vote_fraction(answers: Answers) -> Votes:
    """The winner of each item's vote and its share of the samples, the confidence of self-consistency. A tie goes to
    the answer that was sampled first, which is a draw at random as long as samples come in the order drawn; for the
    expected correctness of a vote with ties split evenly use `maj_at_k`."""
    samples = sampled(as_items(answers))
    found = classes(samples)
    order = np.lexsort((found.first, -found.count, found.item))
    item = found.item[order]
    best = order[np.flatnonzero(np.diff(item, prepend=-1))]
    share = np.zeros(len(samples.size))
    share[found.item[best]] = found.count[best] / samples.size[found.item[best]]
    winner: list[Any] = [None] * len(samples.size)
    for i, code in zip(found.item[best].tolist(), found.code[best].tolist(), strict=True):
        winner[i] = samples.names[code]
    return Votes(tuple(winner), share, samples.unread)


def maj_at_k(
    answers: Answers,
    gold: Sequence[Any] | NDArray[Any],
    k: int,
    weights: Sequence[ArrayLike] | None = None,
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Expected correctness of the majority of k of the n samples of an item, a U-statistic:

        mean over the C(n, k) subsets of (right answers among the winners) / (winners)

    answers[i] are the canonical answers of item i, gold[i] its right one, or a set of right ones (flat answers with
    one gold are one item). Without weights the mean is exact for up to 128 samples an item
    (`majority.expected_majority`), over 2,000 subsets drawn with `seed` beyond. weights[i] (reward, exp of the
    log-probability, min or product of step rewards; >= 0) are summed instead of counted: exact while C(n, k) <=
    20,000, else over 2,000 subsets (fewer an item beyond 1,000 such items: 2,000,000 in all).

    Mean and interval over items as `pass_at_k`; items with fewer than k samples are dropped and counted. An unread
    sample abstains (flag `unparsed`); a subset in which nobody votes is wrong. Not for answers that were not
    brought to a canonical form: "18", "18.0" and "$18" would be three candidates."""
    if one_item(answers):
        if not isinstance(gold, (str, set, frozenset)) and np.ndim(gold) > 0:
            raise UserError(f"answers are the samples of one item, so gold must be one answer, got {gold!r}")
        gold = [gold]
    weights = None if weights is None else as_items(weights)
    samples = sampled(as_items(answers))
    if len(gold) != len(samples.size):
        raise UserError(f"{len(samples.size)} items in answers but {len(gold)} in gold")
    found = classes(samples)
    return _majority(samples, found, _equal_to_gold(samples, found, gold), k, weights, seed, on_invalid)


def maj_at_k_judged(
    answers: Answers,
    correct: Sequence[ArrayLike],
    k: int,
    weights: Sequence[ArrayLike] | None = None,
    *,
    seed: int = 0,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """`maj_at_k` where a verifier judged every sample: correct[i], 0 or 1, is parallel to answers[i]. An answer is as
    right as its samples are on average (they differ only where the canonical form joins what the verifier keeps
    apart)."""
    samples, verdict = sampled(as_items(answers)), ragged("correct", as_items(correct))
    weights = None if weights is None else as_items(weights)
    same_sizes("answers", samples.size, "correct", verdict.size)
    clean(Column("correct", verdict.flat, "unit"), on_invalid=on_invalid)
    with np.errstate(invalid="ignore"):
        good = (verdict.flat >= 0) & (verdict.flat <= 1)
    found = classes(samples)
    read = (found.of_sample != UNREAD) & good
    right = group_sums(found.of_sample[read], verdict.flat[read], len(found.count))
    share = right / np.maximum(found.count, 1)
    return _majority(samples, found, share, k, weights, seed, on_invalid, spoilt(verdict, good))


def _majority(
    samples: Sampled,
    found: Classes,
    right: Array,
    k: int,
    weights: Sequence[ArrayLike] | None,
    seed: int,
    on_invalid: OnInvalid,
    bad: NDArray[np.bool_] | None = None,
) -> Estimate:
    """`bad` [n]: items to drop. An item with a weight that is not finite and >= 0 is one too, or an error."""
    k = whole("k", k)
    bad = np.zeros(len(samples.size), dtype=bool) if bad is None else bad
    if weights is None:
        values = expected_majority(samples, found, right, k, seed)
    else:
        weight = ragged("weights", weights)
        same_sizes("answers", samples.size, "weights", weight.size)
        clean(Column("weights", weight.flat, "finite"), on_invalid=on_invalid)
        with np.errstate(invalid="ignore"):
            good = np.isfinite(weight.flat) & (weight.flat >= 0)
        if on_invalid == "raise" and not good.all():
            lowest = weight.flat.min()
            raise UserError(f"weights must be >= 0, got {lowest}; pass exp or a sigmoid of such scores")
        values = expected_weighted(samples, found, right, np.where(good, weight.flat, 0.0), k, seed)
        bad = bad | spoilt(weight, good)
    estimate = over_items(np.where(bad, np.nan, values))
    unread = bool((samples.code == UNREAD).any())
    return replace(estimate, flags=(*estimate.flags, "unparsed")) if unread else estimate


def _equal_to_gold(samples: Sampled, found: Classes, gold: Sequence[Any] | NDArray[Any]) -> Array:
    """[C]: 1 for the classes that are their item's gold answer."""
    coded = isinstance(samples.names, np.ndarray)
    for i, answer in enumerate(gold):
        if unreadable(answer) or (coded and isinstance(answer, (int, np.integer)) and answer < 0):
            raise UserError(
                f"gold[{i}] is {answer!r}; an item without a right answer cannot be judged, leave it out"
            )
    if coded and isinstance(gold, np.ndarray):
        return (np.asarray(samples.names)[found.code] == gold[found.item]).astype(float)
    right = [x if isinstance(x, (set, frozenset)) else (x,) for x in gold]
    pairs = zip(found.item.tolist(), found.code.tolist(), strict=True)
    return np.fromiter((samples.names[c] in right[i] for i, c in pairs), dtype=float, count=len(found.code))
