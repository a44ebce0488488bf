"""Risk among the surest share of the problems. The shaded band is what the order inside groups of equal
confidence could have made of it; the dotted line is the best order there is; the right end is the risk of
answering all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import Plot, Scale, nice_top


def draw(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    curves = data["systems"]
    highest = 1.3 * max([data["target"], *(_height(curve) for curve in curves)])
    plot = Plot(
        Scale(0, 1), Scale(0, min(1.0, nice_top(highest))), "coverage (share answered, surest first)",
        "risk (share wrong)", [0, 0.25, 0.5, 0.75, 1],
    )  # fmt: skip
    for curve in curves:
        style = f"s{curve['system'] % 6}"
        plot.band(curve["coverage"], curve["tie_low"], curve["tie_high"], style)
        plot.line(curve["coverage"], curve["oracle"], f"{style} thin dots", "best possible order")
        plot.line([0, 1], [curve["base_risk"]] * 2, f"{style} thin dash", "answers in random order")
        plot.line(curve["coverage"], curve["risk"], style)
        plot.name(systems[curve["system"]][:28] if len(curves) > 1 else "by confidence", style)
    first = f"s{curves[0]['system'] % 6}" if len(curves) == 1 else "neutral"
    plot.name("random", f"{first} thin dash")
    plot.name("oracle", f"{first} thin dots")
    plot.name("ties", first, "band")
    plot.level(data["target"], "neutral thin", f"target {data['target']:.0%}")
    for curve in curves:
        reached = curve["coverage_at_target"]["value"]
        if reached:
            tip = (
                f"{systems[curve['system']]}: {reached:.1%} can be answered at a risk of {data['target']:.0%}"
            )
            plot.point(reached, data["target"], f"s{curve['system'] % 6}", "diamond", tip)
    said = "; ".join(
        f"{systems[c['system']]}: area {c['aurc']['value']:.3f}, all answered {c['base_risk']:.3f}"
        for c in curves
    )
    return plot.svg(name, "Risk-coverage curve", f"Risk against coverage. {said}.")


def _height(curve: Mapping[str, Any]) -> float:
    """Of the curve where a tenth of the problems or more is answered: left of that a single wrong answer rules it."""
    pairs = zip(curve["coverage"], curve["risk"], strict=True)
    return max([curve["base_risk"], *(risk for coverage, risk in pairs if coverage >= 0.1)])
