"""True against false positive rate; a positive is a problem out of distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..svg import Plot, Scale


def draw(name: str, data: Mapping[str, Any], systems: Sequence[str]) -> str:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    plot = Plot(
        Scale(0, 1),
        Scale(0, 1),
        "in distribution, flagged (FPR)",
        "out of distribution, flagged (TPR)",
        ticks,
        ticks,
    )
    plot.line([0, 1], [0, 1], "neutral thin dash", "chance")
    plot.level(0.95, "neutral thin dots", "95%")
    said = []
    for curve in data["systems"]:
        style, area = f"s{curve['system'] % 6}", curve["auroc"]["value"]
        label = f"AUROC {0 if area is None else area:.2f}"
        if len(data["systems"]) > 1:
            label = f"{systems[curve['system']][:22]} {label}"
        plot.line(curve["fpr"], curve["tpr"], style, label)
        plot.name(label, style)
        said.append(f"{systems[curve['system']]}: {label}")
    plot.name("chance", "neutral thin dash")
    return plot.svg(name, "ROC of out-of-distribution detection", f"{'; '.join(said)}.")
