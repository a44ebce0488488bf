"""Bounds that a result must keep, as in --require "accuracy>=0.6".

    [task:]metric[.value|.low|.high] (>= | > | <= | <) number

`accuracy>=0.6` asks it of the value; `accuracy.low>=0.6` of the lower end of the 95% interval, which a lucky draw does
not pass; `ece.high<=0.1` of the upper end. Without a task every task must keep it. A value that is not a number keeps
nothing.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, nearest
from ..types import Estimate

Rows = Mapping[str, Mapping[str, Estimate]]
"""Task -> metric -> estimate."""

_FORM = re.compile(
    r"\s*(?:(?P<task>[A-Za-z0-9][\w.-]*):)?(?P<metric>[A-Za-z_]\w*(?:@\d+)?)(?:\.(?P<part>\w+))?"
    r"\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip
PARTS = ("value", "low", "high")


@dataclass(frozen=True)
class Requirement:
    text: str
    task: str | None
    metric: str
    part: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """UserError for anything but the form above."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise UserError(
                f"cannot read the requirement {text!r}; write it as metric>=number, such as accuracy>=0.6, "
                "accuracy.low>=0.6 or gsm8k:accuracy>=0.6"
            )
        part = match["part"] or "value"
        if part not in PARTS:
            raise UserError(f"requirement {text!r}: {part!r} is no part of an estimate{nearest(part, PARTS)}")
        return cls(text.strip(), match["task"], match["metric"], part, match["sign"], float(match["bound"]))

    def check_names(self, names: Mapping[str, Sequence[str]]) -> None:
        """UserError unless the task, and the metric in every task that must keep the bound, are among `names` (task ->
        its metrics)."""
        if self.task is not None and self.task not in names:
            raise UserError(f"requirement {self.text!r}: no task {self.task!r}{nearest(self.task, names)}")
        for task in names if self.task is None else (self.task,):
            if self.metric not in names[task]:
                raise UserError(
                    f"requirement {self.text!r}: task {task!r} has no metric "
                    f"{self.metric!r}{nearest(self.metric, names[task])}"
                )

    def judge(self, rows: Rows) -> list[Outcome]:
        """One outcome a task that must keep the bound."""
        self.check_names({task: list(metrics) for task, metrics in rows.items()})
        outcomes = []
        for task in rows if self.task is None else (self.task,):
            estimate = rows[task][self.metric]
            value = {"value": estimate.value, "low": estimate.ci[0], "high": estimate.ci[1]}[self.part]
            kept = math.isfinite(value) and _COMPARE[self.sign](value, self.bound)
            outcomes.append(Outcome(self.text, task, value, kept))
        return outcomes


@dataclass(frozen=True)
class Outcome:
    requirement: str
    task: str
    value: float
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return {"requirement": self.requirement, "task": self.task, "value": self.value, "kept": self.kept}
