"""From cells to the table: every metric with its interval over seeds, and the difference to the reference in pairs.

Rows are means over seeds with a t interval over them. Differences are taken problem by problem (each averaged over the
seeds) and their interval is over problems: the seeds are those that were run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stats.intervals import mean_interval
from ..metrics.calibration import ece
from ..metrics.detection import auroc
from ..metrics.proper import brier_multiclass
from ..metrics.selective import aurc

Array = NDArray[np.float64]
Cell = Mapping[str, Any]
METRICS = (
    "accuracy",
    "nll",
    "ece",
    "ece_null",
    "brier",
    "aurc",
    "ood_auroc",
    "ood_auroc_mi",
    "mutual_information",
)
_FLOOR = 1e-12
_ROUNDING = 1e-9  # nats; mutual information of a point is not quite 0


def read_cells(folder: Path) -> list[Cell]:
    return [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*/*/*.json"))]


def table(cells: Sequence[Cell], reference: str) -> list[dict[str, Any]]:
    """One row a (set, method): {"set", "method", "seeds", "<metric>": Estimate as JSON, "nll_difference": the same,
    "fit_seconds", "predict_seconds"}. Differences: method minus reference, below 0 is better."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["set"], cell["method"]), []).append(cell)
    rows = []
    for (name, method), own in groups.items():
        values = [measure(cell) for cell in own]
        row: dict[str, Any] = {"set": name, "method": method, "seeds": [c["seed"] for c in own]}
        for metric in METRICS:
            known = [v[metric] for v in values if metric in v]
            row[metric] = mean_interval(known).to_json() if known else None
        others = {c["seed"]: c for c in groups.get((name, reference), ())}
        both = [(c, others[c["seed"]]) for c in own if c["seed"] in others]
        if both and method != reference:
            apart = np.mean([losses(c) - losses(r) for c, r in both], axis=0)
            row["nll_difference"] = mean_interval(apart).to_json()
        for key in ("fit_seconds", "predict_seconds"):
            row[key] = float(np.mean([c[key] for c in own]))
        rows.append(row)
    return rows


def measure(cell: Cell) -> dict[str, float]:
    """The metrics of one cell."""
    p, labels = np.array(cell["test"]["probs"]), np.array(cell["labels"])
    confidence, right = p.max(1).clip(0, 1), (p.argmax(1) == labels).astype(float)
    calibration = ece(confidence, right)
    values = {
        "accuracy": float(right.mean()),
        "nll": float(losses(cell).mean()),
        "ece": calibration.value,
        "ece_null": calibration.null_mean,
        "brier": brier_multiclass(list(p / p.sum(1, keepdims=True)), labels).value,
        "aurc": aurc(1 - confidence, 1 - right).value,
        "mutual_information": float(np.mean(cell["test"]["mutual_information"])),
    }
    if cell.get("out_of_domain"):
        for name, column in (("ood_auroc", "total_entropy"), ("ood_auroc_mi", "mutual_information")):
            inside, outside = np.array(cell["test"][column]), np.array(cell["out_of_domain"][column])
            if name == "ood_auroc" or inside.max() > _ROUNDING:
                score, positive = (
                    np.concatenate([inside, outside]),
                    np.repeat([0, 1], [len(inside), len(outside)]),
                )
                values[name] = auroc(score, positive).value
    return values


def losses(cell: Cell) -> Array:
    """-log p of the right label, a problem, nats."""
    p, labels = np.array(cell["test"]["probs"]), np.array(cell["labels"])
    return -np.log(p[np.arange(len(labels)), labels].clip(_FLOOR))


_SHOWN = ("accuracy", "nll", "ece", "brier", "aurc", "ood_auroc")


def markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """A table a set, for docs: mean over seeds, and the difference to the reference with its interval."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        null = [row["ece_null"]["value"] for row in own]
        lines += [
            f"**{name}** ({len(own[0]['seeds'])} seeds; ECE of calibrated answers: {min(null):.3f} to {max(null):.3f})",
            "",
            f"| method | {' | '.join(_SHOWN)} | NLL - {reference} | fit, predict s |",
            "|---" * (len(_SHOWN) + 3) + "|",
        ]
        for row in own:
            cells = [_with_spread(row[metric]) for metric in _SHOWN]
            seconds = f"{row['fit_seconds']:.0f}, {row['predict_seconds']:.0f}"
            lines.append(
                f"| {row['method']} | {' | '.join(cells)} | {_signed(row.get('nll_difference'))} | {seconds} |"
            )
        lines.append("")
    return "\n".join(lines)


def _with_spread(value: Mapping[str, Any] | None) -> str:
    """Mean over seeds, and half the width of its 95 % t interval."""
    if value is None:
        return "-"
    half = (value["ci"][1] - value["ci"][0]) / 2
    return f"{value['value']:.3f}" + ("" if half != half else f" ± {half:.3f}")


def _signed(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    low, high = value["ci"]
    text = f"{value['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if high < 0 else text


def verdicts(rows: Sequence[Mapping[str, Any]], reference: str) -> dict[str, dict[str, list[str]]]:
    """Per set: methods whose NLL is below the reference's with an interval that excludes 0, those above, the rest."""
    out: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        difference = row.get("nll_difference")
        if difference is None:
            continue
        low, high = difference["ci"]
        kind = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        out.setdefault(row["set"], {}).setdefault(kind, []).append(row["method"])
    return out
