"""Where output goes. stdout: the result. stderr: progress, notes, errors."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_HALF = re.compile("[\\ud800-\\udfff]")


@contextmanager
def json_stdout() -> Iterator[TextIO]:
    """Send file descriptor 1 to stderr for the duration, so that nothing a library or a child process prints
    can get between the reader and the JSON; yields the real stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    before = sys.stdout
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as real:
            yield real
    finally:
        sys.stdout = before
        os.dup2(saved, 1)
        os.close(saved)


def dump_json(result: Mapping[str, Any], stream: TextIO) -> None:
    """One object and a newline. JSON has no NaN or infinity: they become null."""
    stream.write(to_json(result) + "\n")
    stream.flush()


def to_json(result: Any, indent: int | None = None) -> str:
    """Half of a surrogate pair, which JSON may hold and UTF-8 may not, stays an escape."""
    text = json.dumps(plain(result), ensure_ascii=False, allow_nan=False, indent=indent)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def plain(value: Any) -> Any:
    """Dicts, lists and scalars as JSON knows them; a float that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def note(message: str) -> None:
    """A remark on stderr."""
    print(message, file=sys.stderr)


def console() -> Console:
    """Colours and boxes on a terminal; plain lines, never wrapped to 80 columns, into a pipe or file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200, no_color=True, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is the label, the others are right-aligned. Cells are text, never markup: a model's
    answer may hold brackets."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    style = box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII_DOUBLE_HEAD
    made = Table(title=Text(title, style="bold"), title_justify="left", box=style)
    for i, column in enumerate(columns):
        made.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def estimate(data: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """`0.412 [0.350, 0.477]` from the JSON of an Estimate; `-` for nothing."""
    if data is None or data["value"] is None or not math.isfinite(data["value"]):
        return "-"
    text = number(data["value"], form)
    low, high = data["ci"]
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return text
    return f"{text} [{format(low, form)}, {format(high, form)}]"
