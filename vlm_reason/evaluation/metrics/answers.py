"""Sampled answers as integer codes: which samples of an item say the same, and which say nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...stats import factorise

UNREAD = -1
Answers = Sequence[Sequence[Hashable]] | Sequence[NDArray[np.int64]] | NDArray[np.int64]
"""answers[i]: the canonical answers of the samples of item i. None, "" and NaN: the sample could not be read. Rows
that are integer arrays are codes, and there a negative code is unread."""


@dataclass(frozen=True)
class Sampled:
    """Samples of n items one after the other.

    code [N]  the answer, an integer that is the same for equal answers of any item; -1 unread
    size [n]  samples of every item
    names     code -> answer (its integer, where the answers came as codes)
    """

    code: NDArray[np.int64]
    size: NDArray[np.int64]
    names: Sequence[Any] | NDArray[Any]

    @property
    def item(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.size)), self.size)

    @property
    def unread(self) -> NDArray[np.int64]:
        """[n]: samples of every item that could not be read."""
        return np.bincount(self.item[self.code == UNREAD], minlength=len(self.size))


@dataclass(frozen=True)
class Classes:
    """The distinct answers of every item, [C] each, by item: which item, which code, how many samples, and the
    position of the first of them. `of_sample` [N]: the class of a sample, -1 where unread."""

    item: NDArray[np.int64]
    code: NDArray[np.int64]
    count: NDArray[np.int64]
    first: NDArray[np.int64]
    of_sample: NDArray[np.int64]


def sampled(answers: Answers, name: str = "answers") -> Sampled:
    """The codes of per-item answers. UserError for a string where the samples of an item belong."""
    if isinstance(answers, np.ndarray) and answers.ndim == 2 and answers.dtype.kind in "iu":
        size = np.full(len(answers), answers.shape[1], dtype=np.int64)
        return _recoded(answers.ravel(), size)
    wrong = next(
        (i for i, row in enumerate(answers) if isinstance(row, str) or not hasattr(row, "__len__")), None
    )
    if wrong is not None:
        raise UserError(
            f"{name}[{wrong}] is {answers[wrong]!r}, not the samples of one item; give a list an item"
        )
    size = np.fromiter((len(row) for row in answers), dtype=np.int64, count=len(answers))
    codes = [row for row in answers if isinstance(row, np.ndarray) and row.dtype.kind in "iu"]
    if codes and len(codes) == len(answers):
        return _recoded(np.concatenate(codes), size)
    flat = list(chain.from_iterable(row.tolist() if isinstance(row, np.ndarray) else row for row in answers))
    read = np.fromiter((not unreadable(x) for x in flat), dtype=bool, count=len(flat))
    known = [x for x in flat if not unreadable(x)]
    code = np.full(len(flat), UNREAD, dtype=np.int64)
    code[read], _ = factorise(known)
    return Sampled(code, size, list(dict.fromkeys(known)))


def unreadable(answer: Any) -> bool:
    """None, the empty string and NaN are no answers."""
    return (
        answer is None
        or (isinstance(answer, str) and not answer)
        or (isinstance(answer, float) and math.isnan(answer))
    )


def classes(samples: Sampled) -> Classes:
    """The distinct answers of every item with their votes."""
    read = np.flatnonzero(samples.code != UNREAD)
    width = len(samples.names) + 1
    key = samples.item[read] * width + samples.code[read]
    found, first, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    of_sample = np.full(len(samples.code), UNREAD, dtype=np.int64)
    of_sample[read] = inverse.ravel()
    return Classes(found // width, found % width, count, read[first], of_sample)


def _recoded(code: NDArray[Any], size: NDArray[np.int64]) -> Sampled:
    """Integer codes, renumbered from 0 so that products with them cannot overflow."""
    names, inverse = np.unique(code[code >= 0], return_inverse=True)
    out = np.full(len(code), UNREAD, dtype=np.int64)
    out[code >= 0] = inverse.ravel()
    return Sampled(out, size, names)
