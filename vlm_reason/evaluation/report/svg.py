"""Plots as inline SVG text: scales, ticks, marks. No colours here: a mark has a class, page.css gives it its looks in
light, dark and print.

    plot = Plot(Scale(0, 1), Scale(0, 1), x_title="confidence", y_title="accuracy")
    plot.line(xs, ys, series=0)
    plot.svg("reliability-1", "Reliability diagram", "Accuracy against confidence in 15 bins.")

Coordinates given to the methods are data; NaN breaks a line and hides a point. Text is escaped here, once.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .text import visible

WIDTH, HEIGHT = 420.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 30.0, 42.0
CHARACTER = 6.1
"""Mean width of a character of the 11 px labels, to lay out legends without a font at hand."""
MARKERS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Scale:
    """Data from low to high; log puts equal ratios at equal distances (low > 0)."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at low, 1 at high."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], close to `about` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def nice_top(value: float) -> float:
    """The next round number at or above `value`, as the top of an axis that starts at 0."""
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if m * power >= value * (1 - 1e-12))


def tick_label(value: float) -> str:
    return f"{value:.6g}"


@dataclass
class Plot:
    """One pair of axes. `area` is (left, top, right, bottom) in the 420 x 300 picture; several plots may share a
    picture (`picture`)."""

    x: Scale
    y: Scale
    x_title: str = ""
    y_title: str = ""
    x_ticks: Sequence[float] | None = None
    y_ticks: Sequence[float] | None = None
    area: tuple[float, float, float, float] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    marks: list[str] = field(default_factory=list)
    names: list[tuple[str, str, str]] = field(default_factory=list)

    # ---------------------------------------------------------------------------------------- coordinates

    def px(self, value: float) -> float:
        left, _, right, _ = self.area
        return left + (right - left) * min(1.0, max(0.0, self.x.share(value)))

    def py(self, value: float) -> float:
        _, top, _, bottom = self.area
        return bottom - (bottom - top) * min(1.0, max(0.0, self.y.share(value)))

    # ---------------------------------------------------------------------------------------------- marks

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str, tip: str = "") -> None:
        for run in _finite_runs(xs, ys):
            path = "M" + "L".join(f"{_n(self.px(a))} {_n(self.py(b))}" for a, b in run)
            self.marks.append(f'<path class="line {style}" d="{path}">{_tip(tip)}</path>')

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], style: str) -> None:
        """The area between two curves; places where either is NaN are left out."""
        kept = [(a, b, c) for a, b, c in zip(xs, low, high, strict=True) if _finite(a, b, c)]
        if len(kept) < 2:
            return
        there = [f"{_n(self.px(a))} {_n(self.py(c))}" for a, _, c in kept]
        back = [f"{_n(self.px(a))} {_n(self.py(b))}" for a, b, _ in reversed(kept)]
        self.marks.append(f'<path class="band {style}" d="M{"L".join(there + back)}Z"/>')

    def point(self, a: float, b: float, style: str, marker: str = "circle", tip: str = "") -> None:
        if _finite(a, b):
            shape = _marker(marker, self.px(a), self.py(b))
            self.marks.append(f'<path class="point {style}" d="{shape}">{_tip(tip)}</path>')

    def whisker(self, a: float, low: float, high: float, style: str) -> None:
        """A vertical interval with short caps."""
        if not _finite(a, low, high):
            return
        x, top, bottom = self.px(a), self.py(high), self.py(low)
        caps = "".join(f"M{_n(x - 3)} {_n(y)}H{_n(x + 3)}" for y in (top, bottom))
        self.marks.append(f'<path class="whisker {style}" d="M{_n(x)} {_n(bottom)}V{_n(top)}{caps}"/>')

    def bar(self, left: float, right: float, low: float, high: float, style: str, tip: str = "") -> None:
        if not _finite(left, right, low, high) or high == low:
            return
        x, y = self.px(left), self.py(high)
        width, height = max(0.5, self.px(right) - x), self.py(low) - y
        self.marks.append(
            f'<rect class="bar {style}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}">'
            f"{_tip(tip)}</rect>"
        )

    def upright(self, a: float, style: str, label: str = "") -> None:
        """A vertical line across the plot, labelled at its top."""
        _, top, right, bottom = self.area
        x = self.px(a)
        self.marks.append(f'<path class="line {style}" d="M{_n(x)} {_n(bottom)}V{_n(top)}"/>')
        if label:
            end = x + CHARACTER * len(label) + 4 > right
            self.text(x + (-4 if end else 4), top + 10, label, "note", "end" if end else "start")

    def level(self, b: float, style: str, label: str = "") -> None:
        """A horizontal line across the plot, labelled at its left end."""
        left, top, right, _ = self.area
        y = self.py(b)
        self.marks.append(f'<path class="line {style}" d="M{_n(left)} {_n(y)}H{_n(right)}"/>')
        if label:
            self.text(left + 4, y - 4 if y - 14 > top else y + 12, label)

    def text(self, x: float, y: float, words: str, style: str = "note", anchor: str = "start") -> None:
        """Text at a place of the picture (not of the data)."""
        self.marks.append(
            f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{esc(words)}</text>'
        )

    def name(self, label: str, style: str, kind: str = "line") -> None:
        """An entry of the legend; kind: line, band, bar or a marker's name."""
        self.names.append((label, style, kind))

    # --------------------------------------------------------------------------------------------- output

    def body(self) -> str:
        return "".join([self._axes(), *self.marks, self._legend()])

    def svg(self, name: str, title: str, description: str) -> str:
        return picture(name, title, description, [self])

    def _axes(self) -> str:
        left, top, right, bottom = self.area
        x_ticks = self.x_ticks if self.x_ticks is not None else nice_ticks(self.x.low, self.x.high)
        y_ticks = self.y_ticks if self.y_ticks is not None else nice_ticks(self.y.low, self.y.high, 4)
        parts = []
        for tick in y_ticks:
            y = self.py(tick)
            parts.append(f'<path class="grid" d="M{_n(left)} {_n(y)}H{_n(right)}"/>')
            parts.append(_label(left - 6, y + 3.5, tick_label(tick), "tick", "end"))
        for tick in x_ticks:
            x = self.px(tick)
            parts.append(f'<path class="axis" d="M{_n(x)} {_n(bottom)}v4"/>')
            if self.x_title or self.x_ticks is not None:
                parts.append(_label(x, bottom + 16, tick_label(tick), "tick", "middle"))
        parts.append(f'<path class="axis" d="M{_n(left)} {_n(bottom)}H{_n(right)}"/>')
        if self.x_title:
            parts.append(_label((left + right) / 2, bottom + 34, self.x_title, "title", "middle"))
        if self.y_title:
            x, y = left - 38, (top + bottom) / 2
            parts.append(
                f'<text class="title" text-anchor="middle" transform="translate({_n(x)} {_n(y)}) rotate(-90)">'
                f"{esc(self.y_title)}</text>"
            )
        return "".join(parts)

    def _legend(self) -> str:
        left, top, right, _ = self.area
        x, y, parts = left, top - 16, []
        for label, style, kind in self.names:
            width = 20 + CHARACTER * len(label) + 10
            if x + width > right + 10 and x > left:
                x, y = left, y + 13
            parts.append(_swatch(x, y, style, kind) + _label(x + 20, y + 3.5, label, "key", "start"))
            x += width
        return "".join(parts)


def picture(name: str, title: str, description: str, plots: Sequence[Plot], height: float = HEIGHT) -> str:
    """One SVG element of one or several plots. `name` must be unique in the page; title and description are what a
    screen reader says."""
    body = "".join(plot.body() for plot in plots)
    return (
        f'<svg class="plot" viewBox="0 0 {_n(WIDTH)} {_n(height)}" role="img" '
        f'aria-labelledby="{esc(name)}-t {esc(name)}-d">'
        f'<title id="{esc(name)}-t">{esc(title)}</title><desc id="{esc(name)}-d">{esc(description)}</desc>'
        f"{body}</svg>"
    )


def interval_mark(
    low: float, value: float, high: float, scale: Scale, reference: float | None, style: str
) -> str:
    """A table cell's picture of an interval: a rule from low to high with a dot at the value, and a tick at
    `reference`. Hidden from screen readers: the cell beside it says the same in figures."""
    width, height, pad = 120.0, 16.0, 5.0

    def at(number: float) -> float:
        return pad + (width - 2 * pad) * min(1.0, max(0.0, scale.share(number)))

    parts = [f'<path class="grid" d="M{_n(pad)} 8H{_n(width - pad)}"/>']
    if reference is not None and _finite(reference):
        parts.append(f'<path class="reference" d="M{_n(at(reference))} 1V15"/>')
    if _finite(low, high):
        parts.append(f'<path class="rule {style}" d="M{_n(at(low))} 8H{_n(at(high))}"/>')
    if _finite(value):
        parts.append(f'<circle class="point {style}" cx="{_n(at(value))}" cy="8" r="3.2"/>')
    return (
        f'<svg class="mark" viewBox="0 0 {_n(width)} {_n(height)}" aria-hidden="true">{"".join(parts)}</svg>'
    )


def esc(words: str) -> str:
    return html.escape(visible(words), quote=True)


def _label(x: float, y: float, words: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{esc(words)}</text>'


def _swatch(x: float, y: float, style: str, kind: str) -> str:
    if kind == "line":
        return f'<path class="line {style}" d="M{_n(x)} {_n(y)}h16"/>'
    if kind in ("band", "bar"):
        return f'<rect class="{kind} {style}" x="{_n(x)}" y="{_n(y - 5)}" width="16" height="10"/>'
    return f'<path class="point {style}" d="{_marker(kind, x + 8, y)}"/>'


def _marker(kind: str, x: float, y: float, r: float = 3.6) -> str:
    if kind == "square":
        return f"M{_n(x - r)} {_n(y - r)}h{_n(2 * r)}v{_n(2 * r)}h{_n(-2 * r)}Z"
    if kind == "triangle":
        return f"M{_n(x)} {_n(y - 1.2 * r)}L{_n(x + 1.1 * r)} {_n(y + r)}H{_n(x - 1.1 * r)}Z"
    if kind == "diamond":
        d = 1.3 * r
        return f"M{_n(x)} {_n(y - d)}L{_n(x + d)} {_n(y)}L{_n(x)} {_n(y + d)}L{_n(x - d)} {_n(y)}Z"
    return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0Z"


def _finite_runs(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(xs, ys, strict=True):
        if _finite(a, b):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _tip(words: str) -> str:
    return f"<title>{esc(words)}</title>" if words else ""


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _n(value: float) -> str:
    """At most two decimals, no trailing zeros, never -0."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
