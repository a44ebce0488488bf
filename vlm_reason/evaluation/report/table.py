"""The table of a task: a metric a group of rows, a system a row, with its interval drawn and its difference
from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .figures import Difference, Row
from .svg import Scale, esc, interval_mark

SIGNIFICANT = 0.05
MINUS, FIGURE_SPACE = "\u2212", "\u2007"
PICTURE = '<td class="optional"></td>'
ARROWS = {1: ("↑", "higher is better"), -1: ("↓", "lower is better"), 0: ("", "")}


@dataclass(frozen=True)
class _Shape:
    """What all rows of a table share: names of the systems, most digits of a value, is there a comparison."""

    systems: Sequence[str]
    digits: int
    compared: bool

    @property
    def several(self) -> bool:
        return len(self.systems) > 1


def metric_table(rows: Sequence[Row], systems: Sequence[str]) -> str:
    """With the columns of a comparison where any row has a difference."""
    shape = _Shape(
        systems, max((row.digits for row in rows), default=3), any(row.difference is not None for row in rows)
    )
    bodies = "".join(_family(list(own), shape) for _, own in groupby(rows, key=lambda row: row.family))
    return f'<div class="scroll"><table class="metrics"><thead><tr>{_head(shape)}</tr></thead>{bodies}</table></div>'


def _head(shape: _Shape) -> str:
    names = ["metric", *(["system"] if shape.several else [])]
    numbers = ["value", "95% interval", "", "n"]
    if shape.compared:
        numbers += [f"difference from {shape.systems[0]}", "95% interval", "p"]
    cells = [f'<th scope="col">{name}</th>' for name in names]
    cells += [f'<th scope="col" class="num">{esc(name)}</th>' if name else PICTURE for name in numbers]
    return "".join(cells)


def _family(rows: Sequence[Row], shape: _Shape) -> str:
    groups = (_group(list(own), shape) for _, own in groupby(rows, key=lambda row: row.key))
    return f'<tbody class="family">{"".join(groups)}</tbody>'


def _group(rows: Sequence[Row], shape: _Shape) -> str:
    """The rows of one metric on one scale, with a tick at the first system's value."""
    scale = _scale(rows)
    reference = rows[0].estimate.value if len(rows) > 1 else None
    lines = []
    for n, row in enumerate(rows):
        picture = interval_mark(*_ends(row), scale, reference, f"s{row.system}")
        lead = _metric_cell(row, len(rows)) if n == 0 else ""
        lines.append(f"<tr{' class=first' if n == 0 else ''}>{lead}{_cells(row, picture, shape)}</tr>")
    return "".join(lines)


def _metric_cell(row: Row, height: int) -> str:
    arrow, words = ARROWS[row.direction]
    mark = (
        f'<span class="arrow" role="img" aria-label="{words}" title="{words}">{arrow}</span>' if arrow else ""
    )
    return (
        f'<th scope="row" rowspan="{height}"><abbr title="{esc(row.note)}">{esc(row.label)}</abbr>{mark}</th>'
    )


def _cells(row: Row, picture: str, shape: _Shape) -> str:
    name, e = shape.systems[row.system], row.estimate
    cells = []
    if shape.several:
        dot = '<span class="dot"></span>'
        cells.append(f'<td class="who s{row.system}" title="{esc(name)}">{dot}{esc(name)}</td>')
    flags = f' title="{esc(", ".join(e.flags))}"' if e.flags else ""
    cells += [
        f'<td class="num value"{flags}>{_aligned(e.value, row.digits, shape.digits)}</td>',
        f'<td class="num interval">{interval_text(e.ci, row.digits)}</td>',
        f'<td class="optional">{picture}</td>',
        f'<td class="num count">{e.n:,}{_dropped(e.n_dropped)}</td>',
    ]
    return "".join([*cells, *(_difference(row) if shape.compared else ())])


def _ends(row: Row) -> tuple[float, float, float]:
    low, high = row.estimate.ci
    return low, row.estimate.value, high


def _scale(rows: Sequence[Row]) -> Scale:
    """0 to 1 where all is inside; else the smallest range that holds everything, and 0."""
    known = [v for row in rows for v in _ends(row) if math.isfinite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    if low > -0.05 and high <= 1 and rows[0].digits >= 3:
        return Scale(0, 1)
    return Scale(low, high if high > low else low + 1)


def _difference(row: Row) -> list[str]:
    d = row.difference
    if row.system == 0:
        return ['<td class="num soft">·</td>', "<td></td>", "<td></td>"]
    if d is None or not math.isfinite(d.value):
        return ['<td class="num soft">–</td>', "<td></td>", "<td></td>"]
    style = _style(d, row.direction)
    words = {"better": " ▲", "worse": " ▼"}.get(style, "")
    return [
        f'<td class="num {style}">{value_text(d.value, row.digits, sign=True)}{words}</td>',
        f'<td class="num {style}">{interval_text(d.ci, row.digits, sign=True)}</td>',
        f'<td class="num {style}" title="{esc(d.method)}">{p_text(d.p)}</td>',
    ]


def _style(d: Difference, direction: int) -> str:
    """Grey where the interval holds 0; better or worse where it does not and the test agrees; plain between."""
    if not d.clear:
        return "same"
    if direction == 0 or not d.p < SIGNIFICANT:
        return "clear"
    return "better" if d.value * direction > 0 else "worse"


def value_text(value: float, digits: int, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    value = round(value, digits) + 0.0  # no minus before a zero
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", MINUS)


def _aligned(value: float, digits: int, widest: int) -> str:
    """Padded behind with spaces as wide as a figure, so that decimal points stand below one another."""
    short = widest - digits
    return value_text(value, digits) + FIGURE_SPACE * (short + (1 if digits == 0 and short else 0))


def interval_text(ci: tuple[float, float], digits: int, sign: bool = False) -> str:
    low, high = ci
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"[{value_text(low, digits, sign)}, {value_text(high, digits, sign)}]"


def p_text(p: float) -> str:
    if not math.isfinite(p):
        return "–"
    return "<0.001".replace("<", "&lt;") if p < 0.001 else f"{p:.3f}"


def _dropped(n: int) -> str:
    return f' <span class="soft" title="{n} were left out">(−{n})</span>' if n else ""
