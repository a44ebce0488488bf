"""Accuracy against confidence above the count of each bin. The diagonal is perfect calibration, the band what
perfectly calibrated answers would show with so few problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Plot, Scale, nice_top, picture

SPLIT = 208.0
WHAT = {
    "votes": "share of the votes",
    "choices": "probability of the option",
    "likelihood": "mean token probability of the answer",
}


def draw(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    unit = Scale(0, 1)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    above = Plot(unit, unit, "", "accuracy", (), ticks, (LEFT, TOP, WIDTH - RIGHT, SPLIT))
    most = nice_top(float(max(data["n"], default=1)))
    below = Plot(
        unit, Scale(0, most), f"confidence ({WHAT[data['of']]})", "problems", ticks, [0, most],
        (LEFT, SPLIT + 14, WIDTH - RIGHT, HEIGHT - BOTTOM),
    )  # fmt: skip
    used = [i for i, n in enumerate(data["n"]) if n]
    above.line([0, 1], [0, 1], "neutral thin dash")
    above.name("calibrated", "neutral thin dash")
    for i in used:
        left, right = data["edges"][i], data["edges"][i + 1]
        above.bar(left, right, data["null_low"][i], data["null_high"][i], "neutral band")
        below.bar(
            left,
            right,
            0,
            data["n"][i],
            "s0",
            f"{data['n'][i]} problems with confidence {left:.2f} to {right:.2f}",
        )
    above.name("95% if calibrated", "neutral", "band")
    for i in used:
        above.whisker(data["confidence"][i], data["low"][i], data["high"][i], "s0")
    for i in used:
        tip = (
            f"confidence {data['confidence'][i]:.3f}: accuracy {data['accuracy'][i]:.3f} "
            f"[{data['low'][i]:.3f}, {data['high'][i]:.3f}], {data['n'][i]} problems"
        )
        above.point(data["confidence"][i], data["accuracy"][i], "s0", tip=tip)
    above.name("measured, 95%", "s0", "circle")
    said = "; ".join(
        f"{data['confidence'][i]:.2f}: {data['accuracy'][i]:.2f} of {data['n'][i]}" for i in used
    )
    return picture(name, "Reliability diagram", f"Accuracy at each confidence. {said}.", [above, below])
