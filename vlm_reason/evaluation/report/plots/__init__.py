"""One file a plot: the data of a figure -> SVG. `DRAW` maps a figure's kind to its function (name, data,
systems) -> SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from . import conformal, histogram, reliability, repeats, risk_coverage, roc

Draw = Callable[[str, Mapping[str, Any], Sequence[str]], str]

DRAW: Mapping[str, Draw] = MappingProxyType(
    {
        "reliability": reliability.draw,
        "risk_coverage": risk_coverage.draw,
        "repeats": repeats.draw,
        "entropy": histogram.draw_entropy,
        "mutual_information": histogram.draw_mutual_information,
        "member_variance": histogram.draw_variance,
        "roc": roc.draw,
        "conformal": conformal.draw,
    }
)

__all__ = ["DRAW", "Draw"]
