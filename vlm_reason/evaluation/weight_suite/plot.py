"""The table as a picture, a column a set: NLL less the reference's (paired), ECE and AURC (over seeds)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = (("nll_difference", "NLL - reference, nats"), ("ece", "ECE"), ("aurc", "AURC"))


def plot(rows: Sequence[Mapping[str, Any]], reference: str, path: str | Path) -> Path:
    """Write a PNG (or whatever the suffix says). The dashed line is the reference method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row["set"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    size = (3.2 * len(sets), 0.6 + 0.28 * len(methods) * len(SHOWN))
    figure, axes = plt.subplots(
        len(SHOWN), len(sets), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for column, name in enumerate(sets):
        own = {row["method"]: row for row in rows if row["set"] == name}
        for line, (metric, label) in enumerate(SHOWN):
            axis = axes[line][column]
            for place, method in enumerate(methods):
                if method not in own or own[method].get(metric) is None:
                    continue
                value, ci = own[method][metric]["value"], own[method][metric]["ci"]
                low, high = max(0.0, value - ci[0]), max(0.0, ci[1] - value)
                error = [[low], [high]] if low == low and high == high else None
                axis.errorbar(value, place, xerr=error, fmt="o", color="C0", ms=4, lw=1)
            if metric == "nll_difference":
                axis.axvline(0.0, color="0.6", ls="--", lw=0.8)
            elif reference in own:
                axis.axvline(own[reference][metric]["value"], color="0.6", ls="--", lw=0.8)
            axis.set_yticks(range(len(methods)), methods, fontsize=7)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_xlabel(label, fontsize=8)
            if line == 0:
                axis.set_title(name, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return Path(path)
