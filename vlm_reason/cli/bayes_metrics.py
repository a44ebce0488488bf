"""What predictions of a posterior are worth: metrics with intervals, from the rows of predictions.jsonl alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.metrics import accuracy, auroc, brier_multiclass, ece, nll
from ..stats import mean_interval

Row = Mapping[str, Any]


def measure(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows of classes: accuracy; NLL in nats; ECE with 15 bins, and what it would be if all were calibrated; Brier over
    classes in [0, 2]; mean mutual information in nats; AUROC of wrong answers by total entropy. Rows of text: NLL an
    example and a token."""
    if not rows:
        return {}
    if "probs" not in rows[0]:
        return _of_text(rows)
    probs = np.array([row["probs"] for row in rows], dtype=float)
    probs /= probs.sum(1, keepdims=True)
    label = np.array([row["label"] for row in rows])
    right = (probs.argmax(1) == label).astype(float)
    entropy = np.array([row["total_entropy"] for row in rows])
    information = np.array([row["mutual_information"] for row in rows])
    found = {
        "accuracy": accuracy(right),
        "nll": nll(probs, label),
        "ece": ece(probs.max(1), right),
        "brier": brier_multiclass(probs, label),
        "mutual_information": mean_interval(information),
        "auroc_wrong_by_entropy": auroc(entropy, 1 - right),
    }
    return {name: value.to_json() for name, value in found.items()}


def _of_text(rows: Sequence[Row]) -> dict[str, Any]:
    loss = -np.array([row["logp"] for row in rows])
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    each = loss.sum() / tokens.sum()
    linearised = each + (loss - each * tokens) / tokens.mean()  # of a ratio of sums
    return {"nll": mean_interval(loss).to_json(), "nll_per_token": mean_interval(linearised).to_json()}
