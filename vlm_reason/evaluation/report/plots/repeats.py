"""pass@k, maj@k and best-of-k against k, with 95% bands over problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import MARKERS, Plot, Scale, nice_ticks

NAN = math.nan


def draw(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    ks = data["k"]
    known = [
        v for curve in data["curves"].values() for e in curve for v in (e["value"], *e["ci"]) if v is not None
    ]
    low, high = _range(min(known, default=0.0), max(known, default=1.0))
    plot = Plot(
        Scale(ks[0], ks[-1], log=True), Scale(low, high), "samples k (log scale)", "share of problems right",
        ks, nice_ticks(low, high, 5),
    )  # fmt: skip
    for i, (label, curve) in enumerate(data["curves"].items()):
        values = [_or_nan(e["value"]) for e in curve]
        plot.band(ks, [_or_nan(e["ci"][0]) for e in curve], [_or_nan(e["ci"][1]) for e in curve], f"s{i}")
        plot.line(ks, values, f"s{i}" + ("", " dash", " dots")[i % 3])
        for k, value, e in zip(ks, values, curve, strict=True):
            tip = f"{label.replace('k', str(k))}: {value:.3f} [{_or_nan(e['ci'][0]):.3f}, {_or_nan(e['ci'][1]):.3f}]"
            plot.point(k, value, f"s{i}", MARKERS[i % 4], tip)
        plot.name(label, f"s{i}", MARKERS[i % 4])
    said = "; ".join(
        f"{label}: " + ", ".join(f"{_or_nan(e['value']):.3f}" for e in curve)
        for label, curve in data["curves"].items()
    )
    return plot.svg(name, "Accuracy against the number of samples", f"k = {', '.join(map(str, ks))}. {said}.")


def _range(low: float, high: float) -> tuple[float, float]:
    """Round bounds inside [0, 1] that hold every band."""
    step = next(s for s in (0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 7 or s == 0.2)
    return max(0.0, math.floor(low / step) * step), min(1.0, math.ceil(high / step) * step)


def _or_nan(value: float | None) -> float:
    return NAN if value is None else value
