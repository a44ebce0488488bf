"""The columns of one system, problem by problem: its draws, the answer it settles on, and how sure it is of that.

A draw is a trace with the first answer behind it: further answers behind one trace are not independent draws of the
model. They do count in the accuracy, where a trace is worth the mean of its answers. A draw that was cut, and an answer
that cannot be read, is wrong; it votes for nothing and stays in the denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from ..errors import UserError
from ..store import Columns, drawn_twice
from .metrics import vote_fraction

Array = NDArray[np.float64]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]
PerItem = list[NDArray[Any]]
Confidence = Literal["votes", "choices", "likelihood"]


@dataclass(frozen=True)
class Items:
    """P problems with T draws, those of one problem behind one another, in order of (weights, member, seed, k).

    ids     [P]      problem ids, in order of first appearance in the columns
    start   [P + 1]  problem i has the draws start[i] : start[i + 1]
    draws            columns of the T draws
    right   [T]      mean correctness of the answers behind the trace
    rows             columns of all records, further answers included
    """

    ids: tuple[str, ...]
    start: Int
    draws: Columns
    right: Array
    rows: Columns

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n(self) -> Int:
        """[P] draws of each problem."""
        return np.diff(self.start)

    @cached_property
    def item(self) -> Int:
        """[T] the problem of each draw."""
        return np.repeat(np.arange(len(self)), self.n)

    @cached_property
    def members(self) -> tuple[int, ...]:
        """Numbers of the members of a weight posterior; empty for one model."""
        found = np.unique(self.draws.member)
        return tuple(found[found >= 0].tolist())

    def split(self, values: NDArray[Any]) -> PerItem:
        """A [T] array by problem: a matrix [P, n] where all problems have n draws, else one array a problem."""
        if len(self) and (self.n == self.n[0]).all():
            return cast(PerItem, values.reshape(len(self), -1))  # a matrix is the sequence of its rows
        return np.split(values, self.start[1:-1]) if len(self) else []

    def mean(self, values: NDArray[Any]) -> Array:
        """[P] means of a [T] array."""
        return np.bincount(self.item, weights=values, minlength=len(self)) / np.maximum(self.n, 1)

    @cached_property
    def accuracy(self) -> Array:
        """[P] mean correctness of the draws."""
        return self.mean(self.right)

    @cached_property
    def hits(self) -> Int:
        """[P] right draws."""
        return np.bincount(self.item, weights=self.draws.correct, minlength=len(self)).astype(np.int64)

    @cached_property
    def answers(self) -> PerItem:
        """[P] canonical answers of the draws, as codes into `draws.answers`, -1 unread."""
        return self.split(self.draws.canonical.astype(np.int64))

    @cached_property
    def gold(self) -> Int:
        """[P] code of the answer that was judged right most often, -1 where no draw was right."""
        codes = np.where(self.draws.correct, self.draws.canonical, -1)
        winners = vote_fraction(self.split(codes.astype(np.int64))).answer
        return np.array([-1 if winner is None else winner for winner in winners], np.int64)


@dataclass(frozen=True)
class Decision:
    """What a system settles on, one entry a problem.

    kind        votes: the answer most draws agree on, its share; choices: the option with the largest probability;
                likelihood: the one draw, exp of its answer's mean log-probability per token
    answer      [P] code into `draws.answers` (choices: index of the option), -1 for none
    confidence  [P] in [0, 1]
    correct     [P]
    """

    kind: Confidence
    answer: Int
    confidence: Array
    correct: Bool


def items_of(columns: Columns) -> Items:
    """Group the records of one system. UserError for records of several models, for those that saw the answer, and for
    answers without a verdict; for draws of a problem at several temperatures or top_p, and for a trace that was drawn
    under two settings."""
    check_one_system(columns)
    rows = columns.where(
        np.lexsort((columns.m, columns.k, columns.seed, columns.member, columns.weights, columns.problem))
    )
    _check_one_law(rows)
    names = ("problem", "weights", "member", "seed", "k")
    new = np.ones(len(rows), bool)
    if len(rows):
        new[1:] = np.any([np.diff(getattr(rows, name)) != 0 for name in names], axis=0)
    _check_one_setting(rows, new)
    trace = np.cumsum(new) - 1
    draws = rows.where(new)
    right = np.bincount(trace, weights=rows.correct) / np.maximum(np.bincount(trace), 1)
    first = np.flatnonzero(np.diff(draws.problem, prepend=-1))
    ids = tuple(draws.problems[code] for code in draws.problem[first].tolist())
    return Items(ids, np.append(first, len(draws)), draws, right, rows)


def _check_one_law(rows: Columns) -> None:
    """UserError where records of one problem have several temperatures or top_p: votes pool draws of one law."""
    new = np.diff(rows.problem, prepend=-1) != 0
    first = np.flatnonzero(new)[np.cumsum(new) - 1]
    for name in ("temperature", "top_p"):
        values = getattr(rows, name)
        other = np.flatnonzero(values != values[first])
        if len(other):
            at = int(other[0])
            problem, one = rows.problems[int(rows.problem[at])], values[first[at]]
            raise UserError(f"problem {problem!r} has samples at {name} {one} and {values[at]}; choose one")


def _check_one_setting(rows: Columns, new: Bool) -> None:
    """As `store.check_one_setting`, of sorted rows, `new` being the first of each trace."""
    twice = np.flatnonzero(~new[1:] & ((np.diff(rows.m) == 0) | (rows.m[:-1] == 0)))
    if len(twice):
        at = int(twice[0])
        raise drawn_twice(rows.problems[int(rows.problem[at])], int(rows.k[at]))


def check_one_system(columns: Columns) -> None:
    """UserError unless the records are fair, judged draws of one model, or of one model a member."""
    if columns.saw_answer.any():
        raise UserError(
            f"{int(columns.saw_answer.sum())} of {len(columns)} samples were drawn behind the answer; they predict "
            "nothing. Choose samples of the prior prompt"
        )
    width = len(columns.weight_names) + 1
    pairs = np.unique((columns.member.astype(np.int64) + 1) * width + columns.weights)
    members, counts = np.unique(pairs // width, return_counts=True)
    if (counts > 1).any() or (len(members) > 1 and members[0] == 0):
        names = sorted({columns.weight_names[code] for code in (pairs % width).tolist()})
        raise UserError(f"samples of {len(pairs)} models ({', '.join(names)}) are not one system: choose one")
    unjudged = np.flatnonzero(columns.answered & ~columns.judged)
    if len(unjudged):
        name = columns.problems[int(columns.problem[unjudged[0]])]
        raise UserError(
            f"{len(unjudged)} samples have no verdict (first: problem {name!r}); judge them first"
        )


def decide(items: Items, kind: Confidence | None = None) -> Decision | None:
    """The decision of each problem. kind None takes the first that applies: choices where every draw has the
    probabilities of its options, votes where a problem has several draws, likelihood of the one answer where its
    log-probability is known. None where nothing applies."""
    if kind == "choices" or (kind is None and has_choices(items)):
        return _by_choices(items) if has_choices(items) else None
    if kind == "votes" or (kind is None and len(items) > 0 and int(items.n.max()) > 1):
        return _by_votes(items)
    draws = items.draws
    known = np.isfinite(draws.answer_logp) | ~draws.answered
    if len(items) == 0 or int(items.n.max()) > 1 or not known.all() or not draws.answered.any():
        return None
    mean = np.exp(draws.answer_logp / np.maximum(draws.answer_tokens, 1))
    confidence = np.where(draws.answered, np.minimum(mean, 1.0), 0.0)
    return Decision("likelihood", draws.canonical.astype(np.int64), confidence, draws.correct)


def _by_votes(items: Items) -> Decision:
    votes = vote_fraction(items.answers)
    answer = np.array([-1 if winner is None else winner for winner in votes.answer], np.int64)
    draws = items.draws
    supports = (draws.canonical == answer[items.item]) & (draws.canonical >= 0)
    correct = np.bincount(items.item, weights=supports & draws.correct, minlength=len(items)) > 0
    return Decision("votes", answer, votes.share, correct)


def _by_choices(items: Items) -> Decision:
    probabilities, gold = choice_probabilities(items), choice_gold(items)
    answer = probabilities.argmax(axis=1)
    return Decision("choices", answer, probabilities.max(axis=1, initial=0.0), answer == gold)


def has_choices(items: Items) -> bool:
    """Every draw has the log-probabilities of two or more options and knows which is right."""
    draws = items.draws
    return len(draws) > 0 and bool((np.diff(draws.choice_start) > 1).all() and (draws.choice_gold >= 0).all())


def choice_gold(items: Items) -> Int:
    """[P] index of the right option."""
    return items.draws.choice_gold[items.start[:-1]].astype(np.int64)


def choice_counts(items: Items) -> Int:
    """[P] the K_i. UserError where draws of a problem have different numbers of options."""
    counts = np.diff(items.draws.choice_start)
    sizes = counts[items.start[:-1]]
    other = np.flatnonzero(counts != sizes[items.item])
    if len(other):
        name = items.ids[int(items.item[other[0]])]
        raise UserError(
            f"problem {name!r}: its samples have different numbers of options; they are not one item"
        )
    return sizes.astype(np.int64)


def draw_probabilities(items: Items) -> Array:
    """[T, max K] softmax of every draw over its options; 0 for options that an item lacks."""
    draws = items.draws
    counts = np.diff(draws.choice_start)
    logps = np.full((len(draws), int(counts.max(initial=1))), -np.inf)
    logps[np.arange(logps.shape[1]) < counts[:, None]] = draws.choice_logps
    return np.asarray(softmax(logps, axis=1))


def choice_probabilities(items: Items) -> Array:
    """[P, max K] mean over the draws (members) of a problem of softmax over its options, 0 for options it lacks."""
    choice_counts(items)
    sums = np.add.reduceat(draw_probabilities(items), items.start[:-1], axis=0)
    return np.asarray(sums / sums.sum(axis=1, keepdims=True))
