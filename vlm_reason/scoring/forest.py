"""Sequences that begin alike, folded into prefix trees that hold every shared token once.

A token's row knows where its subtree ends, so with rows in depth-first order

    i attends to j   <=>   j is i or an ancestor of i   <=>   j <= i < stop[j]

Sorting sequences by their ids puts them into depth-first order, and the common prefix of neighbours says where a
branch leaves the path before it: the trees are built without visiting tokens one by one. Several trees side by side
(a forest) pack sequences that share nothing: no token of one is an ancestor of another's, and there is no padding.

The layout is that of speculative decoding's token trees (SpecInfer, Miao et al. 2023); TRL's `TreeRow` folds rollouts
in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TokenPair = tuple[Sequence[int], Sequence[int]]
"""(context_ids, target_ids)"""

Wanted = Sequence[Sequence[bool]]
"""For every sequence, which of its target tokens are to be scored."""

Ints = NDArray[np.int64]


class Segment(NamedTuple):
    """Rows [start, end) without a branch; rows [end, stop) are everything that descends from the last of them."""

    start: int
    end: int
    stop: int


@dataclass(frozen=True, eq=False)
class Forest:
    """S distinct (prefix, token) pairs of N sequences, in depth-first order.

    ids, position, stop [S] int64: the token; its depth, which is its position in every sequence that holds it; the row
    behind its subtree. paths[n]: the row of each token of sequence n. segments: the rows cut at every branch.
    """

    ids: Ints
    position: Ints
    stop: Ints
    paths: tuple[Ints, ...]
    segments: tuple[Segment, ...]
    masks: dict = field(default_factory=dict, repr=False)
    """What attention derives from the layout once for all layers."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return int(self.position.max()) + 1 if len(self.ids) else 0

    def trees(self) -> list[tuple[int, int]]:
        """The rows [start, stop) of every tree."""
        return [(s.start, s.stop) for s in self.segments if self.position[s.start] == 0]

    def mask(self, start: int, stop: int, window: int | None = None) -> Tensor:
        """[stop - start, stop - start] bool: may the query row see the key row; with `window`, only keys of fewer than
        `window` positions before it."""
        row, end = torch.arange(start, stop), torch.from_numpy(self.stop[start:stop])
        mask = (row <= row[:, None]) & (row[:, None] < end)
        if window is not None:
            position = torch.from_numpy(self.position[start:stop])
            mask &= position[:, None] - position < window
        return mask


def grow(sequences: Sequence[Sequence[int]], share: bool = True) -> Forest:
    """The forest of `sequences`, equal ones and those that begin another included. With `share` False every sequence
    is a tree of its own (packing only)."""
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    order = in_order(sequences) if share else range(len(arrays))
    ids: list[Ints] = []
    position: list[Ints] = []
    paths: list[Ints] = [np.empty(0, np.int64)] * len(arrays)
    rows = sum(map(len, arrays))
    stop = np.zeros(rows, np.int64)
    used, before, path = 0, np.empty(0, np.int64), np.empty(0, np.int64)
    for n in order:
        own = arrays[n]
        common = common_prefix(before, own) if share else 0
        stop[path[common:]] = used  # the subtrees that this branch leaves
        path = np.concatenate([path[:common], np.arange(used, used + len(own) - common)])
        ids.append(own[common:])
        position.append(np.arange(common, len(own)))
        paths[n], before, used = path, own, used + len(own) - common
    stop[path] = used
    depth = np.concatenate(position) if position else np.empty(0, np.int64)
    all_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    return Forest(all_ids, depth, stop[:used], tuple(paths), _segments(depth, stop[:used]))


def in_order(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Indices in lexicographic order of the ids, which is depth-first order of their trees."""
    return sorted(range(len(sequences)), key=lambda n: tuple(sequences[n]))


def common_prefix(a: Ints, b: Ints) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _segments(position: Ints, stop: Ints) -> tuple[Segment, ...]:
    """A row continues its segment if it is the only child of the row before it."""
    if not len(stop):
        return ()
    only_child = (position[1:] == position[:-1] + 1) & (stop[1:] == stop[:-1])
    starts = np.concatenate([[0], np.flatnonzero(~only_child) + 1])
    ends = np.concatenate([starts[1:], [len(stop)]])
    return tuple(Segment(int(a), int(b), int(stop[a])) for a, b in zip(starts, ends, strict=True))


class Batch(NamedTuple):
    """What is forwarded together: indices of sequences, and the token slots they take."""

    members: list[int]
    tokens: int


def forest_batches(
    inputs: Sequence[Sequence[int]], contexts: Sequence[int], token_budget: int, share: bool = True
) -> list[Batch]:
    """Cut sequences into forests of at most `token_budget` tokens, each shared prefix counted once.

    contexts[n] is the length of sequence n's context. Sequences behind one context (the traces of a prompt, the answers
    behind those traces) stay together while they fit, since each batch they are spread over pays for the context again.
    Deterministic in the ids; a sequence longer than the budget is a batch of its own.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be >= 1, got {token_budget}")
    if not share:
        return _fill([([n], len(inputs[n]), len(inputs[n])) for n in range(len(inputs))], token_budget)
    order = in_order(inputs)
    arrays = [np.asarray(inputs[n], dtype=np.int64) for n in order]
    common = [0] + [common_prefix(a, b) for a, b in zip(arrays, arrays[1:], strict=False)]
    roots = _shortest([tuple(inputs[n][: contexts[n]]) for n in order])
    units = [
        list(places) for _, places in groupby(range(len(order)), key=roots.__getitem__)
    ]  # places in `order`
    items = []
    for unit in units:
        fresh = len(arrays[unit[0]]) + sum(len(arrays[p]) - common[p] for p in unit[1:])
        pieces = [unit] if fresh <= token_budget else [[p] for p in unit]
        for piece in pieces:
            alone = len(arrays[piece[0]]) + sum(len(arrays[p]) - common[p] for p in piece[1:])
            items.append(([order[p] for p in piece], alone, alone - common[piece[0]]))
    return _fill(items, token_budget)


def _shortest(contexts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each context the shortest of them that it begins with; an empty one begins nothing but itself."""
    root: tuple[int, ...] = ()
    roots = {}
    for context in sorted(set(contexts)):  # what begins a context comes before it
        root = root if root and context[: len(root)] == root else context
        roots[context] = root
    return [roots[context] for context in contexts]


def _fill(items: list[tuple[list[int], int, int]], token_budget: int) -> list[Batch]:
    """Items (members, tokens at the start of a batch, tokens behind the item before) in order into batches."""
    batches: list[Batch] = []
    for members, alone, behind in items:
        if batches and batches[-1].tokens + behind <= token_budget:
            last = batches[-1]
            batches[-1] = Batch([*last.members, *members], last.tokens + behind)
        else:
            batches.append(Batch(members, alone))
    return batches
