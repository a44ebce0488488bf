"""`vlm-reason eval SUITE` killed for real, twice, and started again: the same stores and result, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.suite_parts import save_adapter, save_model, write_suite
from vlm_reason.cli.main import main
from vlm_reason.store import SampleStore

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 120.0


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """Every record of both tasks with all its fields; log-probabilities as they are, to the last bit."""
    return {
        f"{task}/{record.key}": record.to_json()
        for task in ("low", "high")
        for record in SampleStore.open(out / task / "samples").records()
    }


def lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("segment-*.jsonl"))


def start(suite: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlm_reason", "eval", str(suite), "--json", "--quiet"],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(suite: Path, out: Path, stored: int, delay: float) -> None:
    """Start the command, wait until `stored` records are on disk, and kill it."""
    process = start(suite)
    try:
        deadline = time.monotonic() + PATIENCE
        while lines(out) < stored:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"no {stored} records in {PATIENCE:.0f} s"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL
        assert not (out / "result.json").exists(), "the run finished before the signal"
    finally:
        process.kill()
        process.communicate()


def test_killed_twice_equals_untouched(tiny_llama, tiny_tokenizer, tmp_path: Path, capfd) -> None:
    model = save_model(tiny_llama, tiny_tokenizer, tmp_path / "model")
    members = [save_adapter(tmp_path / f"adapter{m}", model, seed=m) for m in range(2)]
    sampling = {"traces": 8, "temperature": 1.0, "max_trace_tokens": 40, "max_answer_tokens": 4}
    keys = {"problems": 40, "sampling": sampling, "budget": {"tokens": 9_000}}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    suite = write_suite(tmp_path / "suite", model, members, output_dir=str(whole), **keys)
    assert main(["eval", str(suite), "--quiet"]) == 0
    suite = write_suite(tmp_path / "suite", model, members, output_dir=str(stopped), **keys)
    draw = random.Random(4)
    kill_when(suite, stopped, stored=1, delay=draw.uniform(0, 0.2))
    there = lines(stopped)
    with next(stopped.rglob("segment-*.jsonl")).open("ab") as torn:
        torn.write(b'{"key": "torn in the middle of a li')  # what a kill inside a write leaves
    kill_when(suite, stopped, stored=there + 100, delay=draw.uniform(0, 0.2))
    capfd.readouterr()
    assert main(["eval", str(suite), "--json", "--quiet"]) == 0
    assert samples(stopped) == samples(whole)
    now, then = json.loads(capfd.readouterr().out), json.loads((whole / "result.json").read_text())
    for part in ("rows", "items", "model", "requirements"):
        assert now[part] == then[part]
    assert now["cost"]["tokens"] == then["cost"]["tokens"] <= 9_000
    assert 0 < now["cost"]["tokens_drawn_now"] < now["cost"]["tokens"]
    assert all(task["left_out_why"] == "budget.tokens" for task in now["tasks"].values())
