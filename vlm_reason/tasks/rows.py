"""One data row to one Problem: generation, multiple choice and classification, recognised by their columns.

    generation       {id?, question, answer, rationale?, ...}
    multiple choice  {id?, question, choices, label and/or answer, context?, ...}    answer becomes the letter
    classification   {id?, text, label, label_name?, ...}                            answer becomes the label's name

Every other column is kept in `Problem.metadata`. A row that cannot become a problem raises UserError naming where it
stands, because a question that silently disappears moves every accuracy computed afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, nearest
from ..types import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = (
    "id",
    "question",
    "answer",
    "rationale",
    "choices",
    "label",
    "label_name",
    "context",
    "text",
    "image",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """How a data set's columns map to ours.

    columns        our column name -> the data set's (`{"question": "problem"}`); the others keep their names
    answer_marker  text that separates a rationale from the answer inside one column (GSM8K: "####")
    """

    columns: Mapping[str, str]
    answer_marker: str | None = None

    def __post_init__(self) -> None:
        for ours in self.columns:
            if ours not in COLUMNS:
                raise UserError(f"fields: unknown name {ours!r}{nearest(ours, COLUMNS)}")

    def rename(self, row: Row, where: str) -> dict[str, Any]:
        missing = [theirs for theirs in self.columns.values() if theirs not in row]
        if missing:
            raise UserError(f"{where}: no column {missing[0]!r}{nearest(missing[0], row)}")
        taken = set(self.columns.values()) | set(self.columns)
        renamed = {k: v for k, v in row.items() if k not in taken}
        renamed.update({ours: row[theirs] for ours, theirs in self.columns.items()})
        return renamed


def read_rows(rows: Iterable[tuple[str, Row]], stem: str, fmt: RowFormat) -> list[Problem]:
    """`rows` are (where, row): `where` is what an error names (file:line). Ids that are absent become `stem/index`."""
    renamed = [(where, fmt.rename(row, where)) for where, row in rows]
    names = _label_names(renamed)
    problems = [
        _problem(row, where, f"{stem}/{index}", names, fmt.answer_marker)
        for index, (where, row) in enumerate(renamed)
    ]
    return problems


def _problem(row: Row, where: str, default_id: str, names: Sequence[str], marker: str | None) -> Problem:
    if "choices" in row:
        question, answer, extra = _multiple_choice(row, where)
    elif "text" in row and "question" not in row and ("label" in row or "answer" not in row):
        question, answer, extra = _classification(row, where, names)
    else:
        question, answer, extra = _generation(row, where, marker)
    image = row.get("image")
    used = {"id", "question", "text", "answer", "choices", "label", "image"}
    metadata = {k: v for k, v in row.items() if k not in used and v is not None} | extra
    return Problem(
        id=str(row["id"]) if _present(row.get("id")) else default_id,
        question=question,
        answer=answer,
        images=() if image is None else tuple(image) if isinstance(image, list | tuple) else (image,),
        metadata=metadata,
    )


def _generation(row: Row, where: str, marker: str | None) -> tuple[str, str, dict[str, Any]]:
    question = _text(row, "question", where)
    answer = _text(row, "answer", where)
    if marker is None:
        return question, answer, {}
    rationale, found, answer = answer.rpartition(marker)
    if not found or not answer.strip():
        raise UserError(
            f"{where}: no answer behind the marker {marker!r}; mend the row or drop answer_marker"
        )
    return question, answer.strip(), {"rationale": rationale.strip()} if rationale.strip() else {}


def _multiple_choice(row: Row, where: str) -> tuple[str, str, dict[str, Any]]:
    question = _text(row, "question", where)
    choices, names = _choices(row["choices"], where)
    label, answer = row.get("label"), row.get("answer")
    if not _present(label) and not _present(answer):
        raise UserError(f"{where}: no answer (give label, the index of the right choice, or answer)")
    index = _label_index(label, len(choices), where) if _present(label) else None
    if _present(answer):
        named = _indices_named(str(answer).strip(), choices, names)
        if index is None and len(named) == 1:
            (index,) = named
        elif index is None or (named and index not in named):
            problem = "names no single choice" if index is None else f"contradicts label {index}"
            raise UserError(f"{where}: answer {answer!r} {problem} of {choices}; mend the row")
    assert index is not None
    return question, LETTERS[index], {"choices": choices, "label": index, "answer_text": choices[index]}


def _choices(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choice texts and the names the data set gives them. Repeated texts stay: the letter tells them apart."""
    names: Sequence[Any] = ()
    if isinstance(value, Mapping) and {"text", "label"} <= set(value):
        value, names = value["text"], value["label"]
    if not isinstance(value, list | tuple) or len(value) < 2 or len(value) > len(LETTERS):
        raise UserError(f"{where}: choices must be a list of 2 to {len(LETTERS)} texts, got {value!r}")
    return tuple(str(c) for c in value), tuple(str(n) for n in names)


def _indices_named(answer: str, choices: Sequence[str], names: Sequence[str]) -> set[int]:
    """Every choice that `answer` may mean: the data set's own name of it, its letter, `answerN` (from 1), its text."""
    if answer in names:
        return {names.index(answer)}
    numbered = re.fullmatch(r"answer(\d+)", answer)
    if numbered and 1 <= int(numbered[1]) <= len(choices):
        return {int(numbered[1]) - 1}
    texts = {i for i, choice in enumerate(choices) if choice == answer}
    letter = answer.strip("()").upper()
    if not texts and len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return {LETTERS.index(letter)}
    return texts


def _label_index(label: Any, n: int, where: str) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < n:
        raise UserError(f"{where}: label must be the index of a choice, 0 to {n - 1}, got {label!r}")
    return label


def _classification(row: Row, where: str, names: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    text = _text(row, "text", where)
    if not _present(row.get("label")):
        raise UserError(f"{where}: no answer (the row has no label)")
    return text, _label_name(row), {"label": row["label"], "labels": tuple(names)}


def _label_name(row: Row) -> str:
    return str(row["label_name"]) if _present(row.get("label_name")) else str(row["label"])


def _label_names(rows: Sequence[tuple[str, Row]]) -> tuple[str, ...]:
    """All label names of a classification file, in the order of their labels."""
    pairs = {
        (row["label"], _label_name(row))
        for _, row in rows
        if "text" in row and "question" not in row and isinstance(row.get("label"), int | str)
    }
    return tuple(
        dict.fromkeys(name for _, name in sorted(pairs, key=lambda p: (str(type(p[0])), p[0], p[1])))
    )


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not _present(value):
        raise UserError(f"{where}: no {column} (columns: {', '.join(row) or 'none'})")
    if isinstance(value, list | dict):
        raise UserError(f"{where}: {column} must be a text or a number, got {value!r}")
    return str(value)


def _present(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return not (isinstance(value, str) and not value.strip())
