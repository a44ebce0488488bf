"""What goes into a metric: finite, in range, of one length, or an error that names the value.

A value that is not finite is never a class and never a score: it raises, or, with `on_invalid="drop"`, its item is
left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import UserError
from ...stats import OnInvalid

Array = NDArray[np.float64]
Kind = Literal["finite", "unit", "binary"]
_WANTED = {"finite": "a finite number", "unit": "a number in [0, 1]", "binary": "0 or 1"}


class Column(NamedTuple):
    """A named input with one value an item, and what values it may hold."""

    name: str
    values: ArrayLike
    kind: Kind


def clean(*columns: Column, on_invalid: OnInvalid = "raise") -> tuple[list[Array], int]:
    """The columns as float arrays of one length, and how many items were dropped. UserError naming the first
    bad value, unless told to drop the items that hold one."""
    if on_invalid not in ("raise", "drop"):
        raise UserError(f"on_invalid must be 'raise' or 'drop', got {on_invalid!r}")
    arrays = [_flat(column) for column in columns]
    for column, array in zip(columns[1:], arrays[1:], strict=True):
        if len(array) != len(arrays[0]):
            raise UserError(
                f"{len(arrays[0])} values of {columns[0].name} but {len(array)} of {column.name}; "
                "give one of each an item"
            )
    keep = np.ones(len(arrays[0]), dtype=bool)
    for column, array in zip(columns, arrays, strict=True):
        good = _good(array, column.kind)
        if on_invalid == "raise" and not good.all():
            index = int(np.argmin(good))
            raise UserError(
                f"{column.name}[{index}] is {array[index]}, not {_WANTED[column.kind]}; mend it, or pass "
                "on_invalid='drop' to leave such items out and count them"
            )
        keep &= good
    return [array[keep] for array in arrays], int((~keep).sum())


class Ragged(NamedTuple):
    """Values of items one after the other, [N], with the number [n] that each item has."""

    flat: Array
    size: NDArray[np.int64]

    @property
    def item(self) -> NDArray[np.int64]:
        """[N]: the item every value belongs to."""
        return np.repeat(np.arange(len(self.size)), self.size)

    @property
    def start(self) -> NDArray[np.int64]:
        """[n]: where every item begins."""
        return np.cumsum(self.size) - self.size


def ragged(name: str, items: Sequence[ArrayLike] | NDArray[Any]) -> Ragged:
    """Per-item sequences of numbers, or a matrix with one row an item, laid flat."""
    if isinstance(items, np.ndarray) and items.ndim == 2:
        flat = np.ascontiguousarray(items, dtype=float).ravel()
        return Ragged(flat, np.full(len(items), items.shape[1], dtype=np.int64))
    try:
        size = np.fromiter((len(x) for x in items), dtype=np.int64, count=len(items))  # type: ignore[arg-type]
        flat = np.array(list(chain.from_iterable(_rows(items))), dtype=float)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must hold one sequence of numbers an item: {error}") from None
    return Ragged(flat, size)


def one_item(values: Any) -> bool:
    """A flat sequence of samples, which stands for a single item?"""
    return len(values) > 0 and (isinstance(values[0], str) or values[0] is None or np.ndim(values[0]) == 0)


def as_items(values: Any) -> Any:
    """Per-item sequences; a flat sequence becomes the only item."""
    return [values] if one_item(values) else values


def spoilt(values: Ragged, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[n]: does the item hold a value that is not good?"""
    return np.bincount(values.item[~good], minlength=len(values.size)) > 0


def same_sizes(name_a: str, a: NDArray[np.int64], name_b: str, b: NDArray[np.int64]) -> None:
    """UserError where the items of two ragged inputs differ in number or in length."""
    if len(a) != len(b):
        raise UserError(f"{len(a)} items in {name_a} but {len(b)} in {name_b}")
    if (a != b).any():
        i = int(np.argmax(a != b))
        raise UserError(f"item {i} has {a[i]} values in {name_a} but {b[i]} in {name_b}")


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as a whole number >= `least`."""
    if isinstance(value, bool) or int(value) != value or value < least:
        raise UserError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def share(name: str, value: float) -> float:
    """`value`, which must lie strictly between 0 and 1."""
    if not 0 < value < 1:
        raise UserError(f"{name} must be between 0 and 1, got {value}")
    return float(value)


def _rows(items: Any) -> Iterator[Any]:
    return (x.tolist() if isinstance(x, np.ndarray) else x for x in items)


def _flat(column: Column) -> Array:
    try:
        array = np.asarray(column.values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{column.name} must be one number an item: {error}") from None
    if array.ndim > 1:
        raise UserError(f"{column.name} must be one number an item, got an array of shape {array.shape}")
    return np.atleast_1d(array)


def _good(array: Array, kind: Kind) -> NDArray[np.bool_]:
    if kind == "finite":
        return np.isfinite(array)
    with np.errstate(invalid="ignore"):
        return (array >= 0) & (array <= 1) if kind == "unit" else (array == 0) | (array == 1)
