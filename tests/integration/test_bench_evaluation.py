"""The benchmark of a large store runs, at a thousandth of its size, and prints rows as the other benchmarks do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "evaluation.py"


@pytest.mark.slow
def test_rows_of_a_small_store() -> None:
    argv = [sys.executable, str(SCRIPT), "--samples", "960", "--no-ranking"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all({"bench", "row", "value", "unit", "bar", "ok", "detail"} == set(row) for row in rows)
    by_name = {row["row"]: row for row in rows}
    for kind in ("answers", "choices"):
        assert by_name[f"{kind}: open"]["bar"] == 5 and by_name[f"{kind}: metrics"]["bar"] == 60
        assert by_name[f"{kind}: memory"]["unit"] == "GiB" and by_name[f"{kind}: memory"]["ok"]
    generated, options = (
        set(by_name[f"{kind}: metrics"]["detail"]["skipped"]) for kind in ("answers", "choices")
    )
    assert generated == {"nll_choices", "brier_multiclass", "classwise_ece"}
    assert {"nll_choices", "mutual_information"}.isdisjoint(options)
