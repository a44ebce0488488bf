"""Do the members of a posterior answer differently? From the answers they wrote, not from probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy
from scipy.stats import norm, random_table

from ...errors import UserError
from ...stats import group_sums, mean_interval
from ...types import Estimate
from .answers import UNREAD, sampled
from .disagreement import Disagreement, clamp
from .inputs import Array, whole

MemberAnswers = Sequence[Sequence[Sequence[Hashable]]]
Pattern = tuple[tuple[int, ...], tuple[int, ...]]
_DEALT = 20_000_000
_MOST = 10_000
NAN = float("nan")


@dataclass(frozen=True)
class AnswerDisagreement(Disagreement):
    """The plug-in split, and per item [n] what it is worth: the Miller-Madow value, which can be negative; mean and
    standard deviation of the plug-in value when the samples are dealt to the members at random; `p`, the share of such
    deals with at least the value seen; and the number of unread samples. `null_error` is the standard deviation of
    mean(mutual_information) - mean(null_mean) under the null."""

    miller_madow: Array
    null_mean: Array
    null_sd: Array
    p: Array
    null_error: float
    unparsed: NDArray[np.int64]


@dataclass(frozen=True)
class AnswerInformation(Estimate):
    """Mean Miller-Madow mutual information, beside the mean plug-in value, the mean of its null, and the one-sided p of
    the plug-in value under the null (normal: it is a sum over items)."""

    plug_in: float = NAN
    null_mean: float = NAN
    p: float = NAN

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "plug_in": self.plug_in, "null_mean": self.null_mean, "p": self.p}


def answer_mutual_information(
    answers: MemberAnswers, *, resamples: int = 200, seed: int = 0
) -> AnswerInformation:
    """Mean over items of `answer_disagreement(...).miller_madow`, in nats, t interval over items; flag `unparsed` where
    samples could not be read. The correction still leaves some bias: whether the members differ at all is what `p`
    says, and a p above 0.05 means not distinguishable from samples of one model."""
    found = answer_disagreement(answers, resamples=resamples, seed=seed)
    basic = mean_interval(found.miller_madow)
    n = len(found.p)
    plug_in, null = (float(x.mean()) if n else NAN for x in (found.mutual_information, found.null_mean))
    sd = found.null_error
    p = NAN if n == 0 else float(norm.sf((plug_in - null) / sd)) if sd > 0 else 1.0
    flags = (*basic.flags, "unparsed") if found.unparsed.any() else basic.flags
    method = "answer mutual information, Miller-Madow, nats; t"
    return AnswerInformation(basic.value, basic.se, basic.ci, n, 0, method, flags, plug_in, null, p)


def answer_disagreement(answers: MemberAnswers, *, resamples: int = 200, seed: int = 0) -> AnswerDisagreement:
    """answers[i][m] are the S_m canonical answers of member m to item i; p_m is their histogram. The plug-in mutual
    information is biased up, by about (K - 1)(1 - 1/M) / (2 S): with few samples it is mostly that. So beside it

        miller_madow = MI + (K - 1) / (2 S_all) - mean_m (K_m - 1) / (2 S_m)       (Miller 1955),

    K and K_m the answers that occurred, 1 / S_all = (1/M) mean_m 1 / S_m, and the null of samples shuffled between the
    members: `resamples` deals an item (beyond 100,000 samples fewer, so that about 20 million are dealt, but at least
    20). Items with the same votes share their deals. An unread sample is an answer of its own kind, "none", the same
    for all members."""
    table = _Table.of(answers)
    share = table.votes / table.size[table.row]
    row_entropy = group_sums(table.row, -xlogy(share, share), len(table.size))
    members = np.bincount(table.item_of_row, minlength=table.items)
    aleatoric = table.mean_over_members(row_entropy)
    mean = group_sums(table.kind, share, len(table.item_of_kind)) / members[table.item_of_kind]
    total = group_sums(table.item_of_kind, -xlogy(mean, mean), table.items)
    information = clamp(total - aleatoric)
    kinds = np.bincount(table.item_of_kind, minlength=table.items)
    own_kinds = np.bincount(table.row, minlength=len(table.size))
    pooled = (kinds - 1) / 2 * table.mean_over_members(1.0 / table.size) / np.maximum(members, 1)
    own = table.mean_over_members((own_kinds - 1) / (2.0 * table.size))
    null_mean, null_sd, p, null_error = _null(table, information, whole("resamples", resamples), seed)
    corrected = information + pooled - own
    return AnswerDisagreement(
        total, aleatoric, information, corrected, null_mean, null_sd, p, null_error, table.unread
    )


@dataclass(frozen=True)
class _Table:
    """Votes as a sparse table. A row is a member of an item, a kind is an answer of an item; the entries [E] are the
    pairs that occurred."""

    items: int
    item_of_row: NDArray[np.int64]
    size: NDArray[np.int64]
    item_of_kind: NDArray[np.int64]
    row: NDArray[np.int64]
    kind: NDArray[np.int64]
    votes: NDArray[np.int64]
    unread: NDArray[np.int64]

    @classmethod
    def of(cls, answers: MemberAnswers) -> _Table:
        members = np.fromiter((len(x) for x in answers), dtype=np.int64, count=len(answers))
        if len(members) and members.min() == 0:
            raise UserError(f"item {int(np.argmin(members))} has no members; leave it out")
        samples = sampled(list(chain.from_iterable(answers)))
        item_of_row = np.repeat(np.arange(len(answers)), members)
        if len(samples.size) and samples.size.min() == 0:
            row = int(np.argmin(samples.size))
            item = int(item_of_row[row])
            raise UserError(
                f"member {row - int(members[:item].sum())} of item {item} has no answers; leave the item out"
            )
        width = len(samples.names) + 1
        code = np.where(samples.code == UNREAD, width - 1, samples.code)
        row_of_sample = samples.item
        kinds, kind_of_sample = np.unique(item_of_row[row_of_sample] * width + code, return_inverse=True)
        pairs, votes = np.unique(
            row_of_sample * max(len(kinds), 1) + kind_of_sample.ravel(), return_counts=True
        )
        unread = group_sums(item_of_row, samples.unread.astype(float), len(answers)).astype(np.int64)
        row, kind = pairs // max(len(kinds), 1), pairs % max(len(kinds), 1)
        return cls(len(answers), item_of_row, samples.size, kinds // width, row, kind, votes, unread)

    def mean_over_members(self, of_row: Array) -> Array:
        sums = group_sums(self.item_of_row, of_row, self.items)
        return sums / np.maximum(np.bincount(self.item_of_row, minlength=self.items), 1)

    def patterns(self) -> Iterator[Pattern]:
        """Of every item: samples of its members, and votes of its answers in falling order."""
        votes = group_sums(self.kind, self.votes.astype(float), len(self.item_of_kind)).astype(np.int64)
        order = np.lexsort((-votes, self.item_of_kind))
        cuts = np.searchsorted(self.item_of_kind, np.arange(1, self.items))
        rows = np.searchsorted(self.item_of_row, np.arange(1, self.items))
        for size, count in zip(np.split(self.size, rows), np.split(votes[order], cuts), strict=True):
            yield tuple(size.tolist()), tuple(count.tolist())


def _null(table: _Table, information: Array, resamples: int, seed: int) -> tuple[Array, Array, Array, float]:
    """Mean, standard deviation and p of every item, samples dealt to the members at random (both margins kept), and
    the standard deviation of mean(information) - mean(null mean) under the null: of the items, and of the deals that
    items with the same votes share."""
    dealt = min(resamples, max(20, _DEALT // max(int(table.size.sum()), 1)))
    generator = np.random.default_rng(seed)
    members: dict[Pattern, list[int]] = {}
    for i, pattern in enumerate(table.patterns() if table.items else ()):
        members.setdefault(pattern, []).append(i)
    mean, sd, p, variance = np.zeros(table.items), np.zeros(table.items), np.ones(table.items), 0.0
    for (size, votes), items in members.items():
        if len(size) == 1 or len(votes) == 1:
            continue
        draws = np.sort(_dealt(size, votes, min(dealt * len(items), _MOST), generator))
        mean[items], sd[items] = draws.mean(), draws.std()
        below = np.searchsorted(draws, information[items] - 1e-9, side="left")
        p[items] = (1 + len(draws) - below) / (1 + len(draws))
        variance += float(draws.var()) * (len(items) + len(items) ** 2 / len(draws))
    return mean, sd, p, float(np.sqrt(variance)) / max(table.items, 1)


def _dealt(
    size: tuple[int, ...], votes: tuple[int, ...], draws: int, generator: np.random.Generator
) -> Array:
    """[draws]: plug-in mutual information of tables with these margins."""
    tables = random_table(size, votes, seed=generator).rvs(size=draws).reshape(draws, len(size), len(votes))
    share = tables / np.array(size, dtype=float)[:, None]
    mean = share.mean(axis=1)
    return xlogy(share, share).sum(axis=2).mean(axis=1) - xlogy(mean, mean).sum(axis=1)
