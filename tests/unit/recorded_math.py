"""100 MATH questions x 8 recorded samples with rewards and verdicts, as the metrics take them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Recorded:
    answers: list[list[str]]
    correct: list[list[bool]]
    reward: list[list[float]]
    gold: list[str]


def recorded(shared_data: Path) -> Recorded:
    lines = (shared_data / "recorded_math_rm8" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def column(name: str) -> list[list]:
        return [[sample[name] for sample in row["samples"]] for row in rows]

    return Recorded(column("pred"), column("correct"), column("reward"), [row["answer"] for row in rows])


def winner_is_right(data: Recorded, winners: tuple) -> np.ndarray:
    """[n]: the verdict on the answer that won each item's vote."""
    rows = zip(winners, data.answers, data.correct, strict=True)
    return np.array([correct[answers.index(winner)] for winner, answers, correct in rows], dtype=float)
