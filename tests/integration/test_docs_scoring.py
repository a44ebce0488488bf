"""The example of docs/scoring.md, run: on the built-in model a tree's log-probabilities are those of plain forwards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scoring.md"


@pytest.mark.integration
def test_the_example_runs_and_equals_plain_forwards(builtin_model_dir: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    scope: dict = {}
    source = block.replace('"smollm2-135m"', '"smollm2-135m", dtype="float32"')
    exec(compile(source, str(PAGE), "exec"), scope)
    for row, keep, trace in zip(scope["logps"], scope["mask"], scope["traces"], strict=True):
        with torch.no_grad():
            logits = scope["model"](torch.tensor([scope["prompt"] + trace])).logits[0]
        law = logits[len(scope["prompt"]) - 1 : -1].log_softmax(-1)
        expected = law.gather(-1, torch.tensor(trace)[:, None]).squeeze(-1)
        torch.testing.assert_close(row[keep], expected, rtol=0, atol=1e-3)
