"""What a report says, without a word of HTML: every type between the stores and the page, and how it becomes JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...types import Estimate

Level = Literal["caution", "note"]


@dataclass(frozen=True)
class Notice:
    """Something to know before the figures. caution: the figures do not mean what they seem to."""

    level: Level
    text: str


@dataclass(frozen=True)
class Header:
    """One system at a glance. `facts` are the rows under its name, in order."""

    name: str
    accuracy: Estimate
    problems: int
    samples: int
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Difference:
    """This system minus the first, on the same problems. `clear`: the interval leaves out 0."""

    value: float
    ci: tuple[float, float]
    p: float
    method: str = ""

    @property
    def clear(self) -> bool:
        low, high = self.ci
        return math.isfinite(low) and math.isfinite(high) and not low <= 0 <= high


@dataclass(frozen=True)
class Row:
    """One metric of one system. direction: 1 higher is better, -1 lower is better, 0 neither. `note` explains it."""

    key: str
    label: str
    note: str
    family: str
    direction: int
    digits: int
    system: int
    estimate: Estimate
    difference: Difference | None = None


@dataclass(frozen=True)
class Figure:
    """One plot: what to draw (`kind`), a sentence of what it shows (`finding`), and its data. `missing` says
    why there is nothing to draw."""

    kind: str
    title: str
    finding: str
    data: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    system: int | None = None


@dataclass(frozen=True)
class Task:
    """rows: what most readers want; more: every other metric. skipped: metric -> why it could not be computed."""

    name: str
    rows: tuple[Row, ...]
    more: tuple[Row, ...]
    skipped: Mapping[str, str]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Report:
    """headers: systems, the first is what the others are compared with. items: see `rationales`."""

    title: str
    headers: tuple[Header, ...]
    warnings: tuple[Notice, ...]
    tasks: tuple[Task, ...]
    items: tuple[Mapping[str, Any], ...]
    method: str
    made: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the texts of the rationales."""
        return {
            "title": self.title,
            "made": self.made,
            "ranking": self.method,
            "systems": plain(self.headers),
            "warnings": plain(self.warnings),
            "tasks": plain(self.tasks),
            "problems": [
                {
                    key: item[key]
                    for key in ("id", "task", "system", "kind", "confidence", "chosen", "reference")
                }
                for item in plain(self.items)
            ],
        }


def plain(value: Any) -> Any:
    """Dicts, lists and scalars as JSON knows them; a number that is not finite is null."""
    if isinstance(value, Estimate):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
