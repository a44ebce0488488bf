"""Samples as columns: one numpy entry a record, what every metric reads. A million samples take about 150 MB.

Texts that repeat (problem ids, canonical answers, names of weights) are integer codes into a tuple of distinct
strings. The full text of a row stays in its segment and is read when asked for: `columns.record(row)`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .record import SampleRecord

Int = NDArray[np.signedinteger[Any]]
Float = NDArray[np.float64]
Bool = NDArray[np.bool_]

FINISHES = ("stop", "eos", "length")
UNKNOWN = -1
NAN = math.nan

CODED = {
    "problem": "problems",
    "weights": "weight_names",
    "engine": "engines",
    "proposal": "proposals",
    "canonical": "answers",
}
"""Column of codes -> the tuple its codes index."""

PLAIN: dict[str, str] = {
    "member": "i4", "k": "i4", "m": "i4", "seed": "i8", "policy_version": "i4",
    "finish": "i1", "answer_finish": "i1", "saw_answer": "?", "text_only": "?",
    "correct": "?", "judged": "?", "failed": "?",
    "trace_tokens": "i4", "answer_tokens": "i4", "trace_logp": "f8", "answer_logp": "f8",
    "score": "f8", "reward": "f8", "temperature": "f8", "top_p": "f8",
}  # fmt: skip
"""Column -> its type."""


@dataclass(frozen=True)
class Columns:
    """Entry i of every array is record i, in the order of `SampleStore.records`. [n] each unless it says otherwise.

    problem         code into `problems` (ids); `weights` into `weight_names`, `engine`, `proposal` the same
    canonical       code into `answers`; -1: not answered, or the answer could not be read
    member          draw of the weight posterior, -1 for none
    k, m, seed      trace k of the draw with this seed, and answer m behind it; m = 0: no answer
    finish          index into FINISHES ("stop", "eos", "length") of the trace; answer_finish the same, -1 for none
    saw_answer      the proposal saw the reference answer: no prediction
    text_only       token counts are -1 and log-probabilities NaN, because nobody recorded them
    judged          a verdict was stored; `correct` and `failed` are False where not
    trace_tokens, answer_tokens    counts; answer 0 where there is none
    trace_logp, answer_logp        sums over tokens, nats; answer NaN where there is none
    score           the verifier's, reward an outside one; NaN for none
    choice_logps    [sum of K] log p of the options of all records, one behind the other; record i has
                    choice_logps[choice_start[i] : choice_start[i + 1]]
    choice_start    [n + 1]
    choice_gold     index of the right option, -1 for none
    segment, offset, length        where the record stands: line of `length` bytes at `offset` of files[segment]
    """

    problem: Int
    weights: Int
    engine: Int
    proposal: Int
    canonical: Int
    member: Int
    k: Int
    m: Int
    seed: Int
    policy_version: Int
    finish: Int
    answer_finish: Int
    saw_answer: Bool
    text_only: Bool
    correct: Bool
    judged: Bool
    failed: Bool
    trace_tokens: Int
    answer_tokens: Int
    trace_logp: Float
    answer_logp: Float
    score: Float
    reward: Float
    temperature: Float
    top_p: Float
    choice_logps: Float
    choice_start: Int
    choice_gold: Int
    segment: Int
    offset: Int
    length: Int
    problems: tuple[str, ...]
    weight_names: tuple[str, ...]
    engines: tuple[str, ...]
    proposals: tuple[str, ...]
    answers: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def complete(self) -> Bool:
        """The trace closed itself."""
        return self.finish == 0

    @property
    def answered(self) -> Bool:
        return self.m > 0

    @property
    def unparsed(self) -> Bool:
        """Answered, but the answer could not be read."""
        return self.answered & (self.canonical < 0)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def where(self, keep: NDArray[Any]) -> Columns:
        """The rows that `keep` (mask or indices) names; codes and tuples stay as they are."""
        rows = np.flatnonzero(keep) if keep.dtype == bool else np.asarray(keep)
        counts = np.diff(self.choice_start)[rows]
        start = np.concatenate([[0], np.cumsum(counts)])
        flat = np.repeat(self.choice_start[rows] - start[:-1], counts) + np.arange(start[-1])
        ragged: dict[str, Any] = {"choice_logps": self.choice_logps[flat], "choice_start": start}
        arrays: dict[str, Any] = {
            name: value[rows]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name not in ragged
        }
        return replace(self, **arrays, **ragged)

    def record(self, row: int) -> SampleRecord:
        """The whole record of a row, read from its segment. UserError when the file is not what it was."""
        if not self.files:
            raise ValueError("these columns were made of records in memory; there is no file to read from")
        path = self.files[int(self.segment[row])]
        try:
            with path.open("rb") as stream:
                stream.seek(int(self.offset[row]))
                record = SampleRecord.from_json(json.loads(stream.read(int(self.length[row]))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: row {row} cannot be read ({error}); open the store again") from None
        if record.problem_id != self.problems[int(self.problem[row])] or record.k != int(self.k[row]):
            raise UserError(f"{path}: row {row} is another sample than it was; open the store again")
        return record


def columns_of(records: Iterable[SampleRecord]) -> Columns:
    """The columns of records in memory. Such columns have no files: `record(row)` is not for them."""
    builder = ColumnBuilder()
    for record in records:
        builder.add(record.to_json(), 0, 0)
    return join([builder.arrays()], ())


class ColumnBuilder:
    """Grows columns row by row from the JSON objects of records, compactly: about 200 bytes a row."""

    def __init__(self) -> None:
        self._codes: dict[str, dict[str, int]] = {name: {} for name in CODED}
        self._rows: list[tuple[Any, ...]] = []
        self._blocks: list[NDArray[Any]] = []
        self._keys = bytearray()
        self._choices: list[float] = []
        self._choice_blocks: list[Float] = []

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    def add(self, data: Mapping[str, Any], offset: int, length: int) -> None:
        """`data` is `SampleRecord.to_json()` or the same read back. KeyError for a missing field."""
        choices = data.get("choice_logps") or ()
        row = _row(data, self._codes, len(choices), offset, length)
        self._keys += key_digest(data["key"])
        self._choices.extend(choices)
        self._rows.append(row)
        if len(self._rows) == BLOCK:
            self._flush()

    def arrays(self) -> dict[str, Any]:
        """Column name -> array [n], `keys` [n, 16], and for each coded column the list of its texts."""
        self._flush()
        table = np.concatenate(self._blocks) if self._blocks else np.empty(0, ROW)
        made: dict[str, Any] = {name: np.ascontiguousarray(table[name]) for name in ROW.names or ()}
        made["choice_logps"] = np.concatenate(self._choice_blocks) if self._choice_blocks else np.empty(0)
        made["keys"] = np.frombuffer(bytes(self._keys), np.uint8).reshape(-1, KEY_BYTES)
        return {**made, **{CODED[name]: list(codes) for name, codes in self._codes.items()}}

    def _flush(self) -> None:
        if self._rows:
            self._blocks.append(np.array(self._rows, ROW))
            self._choice_blocks.append(np.array(self._choices, float))
            self._rows, self._choices = [], []


BLOCK = 8192
KEY_BYTES = 16
_HEX_KEY = re.compile(f"[0-9a-f]{{{2 * KEY_BYTES}}}")
ROW = np.dtype(
    [(name, "i4") for name in CODED]
    + list(PLAIN.items())
    + [("choices", "i4"), ("choice_gold", "i4"), ("offset", "i8"), ("length", "i4")]
)


def _row(
    data: Mapping[str, Any], codes: Mapping[str, dict[str, int]], choices: int, offset: int, length: int
) -> tuple[Any, ...]:
    """One row in the order of ROW."""
    get = data.get
    texts = (data["problem_id"], data["weights"], data["engine"], data["proposal"])
    canonical, answered, text_only = get("canonical"), get("m", 0) > 0, bool(get("text_only", False))
    answers = codes["canonical"]
    member, gold = get("member"), get("choice_gold")
    return (
        *(names.setdefault(text, len(names)) for names, text in zip(_text_codes(codes), texts, strict=True)),
        UNKNOWN if canonical is None or not answered else answers.setdefault(canonical, len(answers)),
        UNKNOWN if member is None else member,
        data["k"],
        get("m", 0),
        data["seed"],
        get("policy_version", 0),
        FINISHES.index(data["finish"]),
        UNKNOWN if get("answer_finish") is None else FINISHES.index(data["answer_finish"]),
        data["saw_answer"],
        text_only,
        _verdict(get("correct")),
        get("correct") is not None,
        bool(get("failed")),
        UNKNOWN if text_only else len(data["trace_ids"]),
        (UNKNOWN if text_only else len(get("answer_ids", ()))) if answered else 0,
        NAN if text_only else _sum(data["trace_ids"], data["trace_logps"]),
        NAN if text_only or not answered else _sum(get("answer_ids", ()), get("answer_logps", ())),
        _number(get("score")),
        _number(get("reward")),
        data["temperature"],
        data["top_p"],
        choices,
        UNKNOWN if gold is None else gold,
        offset,
        length,
    )


def _text_codes(codes: Mapping[str, dict[str, int]]) -> tuple[dict[str, int], ...]:
    return codes["problem"], codes["weights"], codes["engine"], codes["proposal"]


def _sum(ids: Sequence[int], logps: Sequence[float]) -> float:
    total = math.fsum(logps)
    if len(ids) != len(logps) or not math.isfinite(total):
        raise ValueError(f"{len(ids)} ids whose log-probabilities sum to {total}")
    return total


def _verdict(value: bool | None) -> bool:
    if value is not None and value is not True and value is not False:
        raise ValueError(f"`correct` is {value!r}, expected true or false")
    return bool(value)


def _number(value: float | None) -> float:
    return NAN if value is None else value


def key_digest(key: str) -> bytes:
    """16 bytes for a key: those its 32 hex digits stand for, or a hash of a key of another form."""
    if _HEX_KEY.fullmatch(key):
        return bytes.fromhex(key)
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def join(parts: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> Columns:
    """The columns of several segments, in order; of several records of one key the first stays."""
    made: dict[str, Any] = {}
    for name in [*PLAIN, "choice_gold", "offset", "length", "choice_logps"]:
        dtype = np.float64 if name == "choice_logps" else ROW[name]
        made[name] = _concatenate([part[name] for part in parts], dtype)
    for name, texts in CODED.items():
        made[name], made[texts] = _merge_codes([(part[name], part[texts]) for part in parts])
    sizes = [len(part["offset"]) for part in parts]
    made["segment"] = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    choices = _concatenate([part["choices"] for part in parts], np.dtype("i4"))
    made["choice_start"] = np.concatenate([[0], np.cumsum(choices, dtype=np.int64)])
    columns = Columns(**made, files=tuple(files))
    keys = _concatenate([part["keys"] for part in parts], np.dtype("u1"), (0, KEY_BYTES))
    first = first_of_each(keys)
    return columns if len(first) == len(columns) else columns.where(first)


def concatenated(a: Columns, b: Columns) -> Columns:
    """The rows of a, then those of b, which come from other stores. Problems stay apart even where the two use one id:
    it names a problem within its store. Of the other texts equal ones have one code."""
    made: dict[str, Any] = {
        name: np.concatenate([getattr(a, name), getattr(b, name)])
        for name in [*PLAIN, "choice_gold", "offset", "length", "choice_logps"]
    }
    for name, texts in CODED.items():
        made[name], made[texts] = _merge_codes([(getattr(c, name), getattr(c, texts)) for c in (a, b)])
    made["problem"] = np.concatenate([a.problem, b.problem + len(a.problems)])
    made["problems"] = (*a.problems, *b.problems)
    made["segment"] = np.concatenate([a.segment, b.segment + len(a.files)])
    made["choice_start"] = np.concatenate([a.choice_start, b.choice_start[1:] + a.choice_start[-1]])
    return Columns(**made, files=(*a.files, *b.files))


def first_of_each(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Rows [<= n], ascending, that are the first of their key in keys [n, 16]."""
    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
    ranked = halves[order]
    new = np.ones(len(order), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return np.sort(order[new])


def _merge_codes(parts: Sequence[tuple[NDArray[Any], Sequence[str]]]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Codes of several tables as codes of their union, -1 kept."""
    union: dict[str, int] = {}
    arrays = []
    for codes, texts in parts:
        moved = np.array([union.setdefault(text, len(union)) for text in texts] + [UNKNOWN], np.int32)
        arrays.append(moved[codes])  # code -1 reads the last entry, which is -1
    return _concatenate(arrays, np.dtype("i4")), tuple(union)


def _concatenate(arrays: Sequence[NDArray[Any]], dtype: Any, empty: tuple[int, ...] = (0,)) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(empty, dtype)
