"""The table of a task: a metric a group of rows, a system a row, with its interval drawn and its difference
from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from .figures import Difference, Row
from .svg import Scale, esc, interval_mark

SIGNIFICANT = 0.05
MINUS, FIGURE_SPACE = "\u2212", "\u2007"
ARROWS = {1: ("↑", "higher is better"), -1: ("↓", "lower is better"), 0: ("", "")}


def metric_table(rows: Sequence[Row], systems: Sequence[str]) -> str:
    several = len(systems) > 1
    digits = max((row.digits for row in rows), default=3)
    head = ["<th scope=col>metric</th>"]
    head += ["<th scope=col>system</th>"] if several else []
    head += ['<th scope=col class="num">value</th>', '<th scope=col class="num">95% interval</th>']
    head += [
        '<th scope=col class="optional"><span class="soft"></span></th>',
        '<th scope=col class="num">n</th>',
    ]
    if several:
        head += [
            f'<th scope=col class="num">difference from {esc(systems[0])}</th>',
            '<th scope=col class="num">95% interval</th>',
            '<th scope=col class="num">p</th>',
        ]
    bodies = "".join(
        _family(list(own), systems, digits) for _, own in groupby(rows, key=lambda row: row.family)
    )
    return f'<div class="scroll"><table class="metrics"><thead><tr>{"".join(head)}</tr></thead>{bodies}</table></div>'


def _family(rows: Sequence[Row], systems: Sequence[str], digits: int) -> str:
    groups = (_group(list(own), systems, digits) for _, own in groupby(rows, key=lambda row: row.key))
    return f'<tbody class="family">{"".join(groups)}</tbody>'


def _group(rows: Sequence[Row], systems: Sequence[str], digits: int) -> str:
    scale = _scale(rows)
    reference = rows[0].estimate.value if len(rows) > 1 else None
    return "".join(_line(n, row, len(rows), systems, scale, reference, digits) for n, row in enumerate(rows))


def _line(
    n: int, row: Row, height: int, systems: Sequence[str], scale: Scale, reference: float | None, digits: int
) -> str:
    cells = []
    if n == 0:
        arrow, words = ARROWS[row.direction]
        mark = (
            f'<span class="arrow" role="img" aria-label="{words}" title="{words}">{arrow}</span>'
            if arrow
            else ""
        )
        cells.append(
            f'<th scope="row" rowspan="{height}"><abbr title="{esc(row.note)}">{esc(row.label)}</abbr>{mark}</th>'
        )
    if len(systems) > 1:
        name = systems[row.system]
        cells.append(
            f'<td class="who s{row.system}" title="{esc(name)}"><span class="dot"></span>{esc(name)}</td>'
        )
    e = row.estimate
    picture = interval_mark(*_ends(row), scale, reference, f"s{row.system}")
    flags = f' title="{esc(", ".join(e.flags))}"' if e.flags else ""
    cells += [
        f'<td class="num value"{flags}>{_aligned(e.value, row.digits, digits)}</td>',
        f'<td class="num interval">{interval_text(e.ci, row.digits)}</td>',
        f'<td class="optional">{picture}</td>',
        f'<td class="num count">{e.n:,}{_dropped(e.n_dropped)}</td>',
    ]
    if len(systems) > 1:
        cells += _difference(row)
    return f"<tr{' class=first' if n == 0 else ''}>{''.join(cells)}</tr>"


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
