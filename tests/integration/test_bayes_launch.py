"""`kind: bayes` through the launcher: two processes, killed in the middle, against one.

Tolerance: fp32 gradients summed in another order, over 12 + 12 steps of at most 1e-2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vlm_reason.cli.bayes_metrics import measure
from vlm_reason.config import from_dict, load_config
from vlm_reason.weights.config import BayesConfig
from vlm_reason.weights.run import run_bayes

REPO = Path(__file__).resolve().parents[2]
FILES = ("adapter_model.safetensors", "posterior.safetensors")


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """7 problems to train on in steps of 3: the last step of an epoch is one example, which one process has alone."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"id": f"r{i}", "text": f"{i} {'ab'[i % 2]}", "label": i % 2, "label_name": "xy"[i % 2]}
        for i in range(13)
    ]
    for name, part in (("train", rows[:7]), ("dev", rows[7:10]), ("test", rows[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = {
        "kind": "bayes", "model": str(tmp_path / "model"), "template": "labels",
        "task": {"kind": "jsonl", "name": str(tmp_path), "split": "train"},
        "held_out": {"kind": "jsonl", "name": str(tmp_path), "split": "dev"},
        "eval_task": {"kind": "jsonl", "name": str(tmp_path), "split": "test"},
        "method": "ivon", "options": {"start": "map"}, "adapter": {"r": 2, "alpha": 4},
        "training": {"epochs": 4, "batch_size": 3, "learning_rate": 1e-2, "save_steps": 5},
        "predictive": {"n": 4}, "output_dir": str(tmp_path / "one"), "seed": 3,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


def launched(recipe: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    accelerated = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                   "configs/accelerate/ddp.yaml", "--main_process_port", "0"]  # fmt: skip
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPO), "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [*accelerated, "scripts/train.py", "--config", str(recipe), "--json", "--quiet", f"output_dir={output}",
         *overrides],
        cwd=REPO, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1])


def posterior(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{name}:{k}": v for name in FILES for k, v in load_file(folder / "posterior" / name).items()}


@pytest.mark.timeout(900)
def test_two_processes_killed_in_the_second_stage_equal_one_that_ran_through(
    recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    process = launched(recipe, folder)
    deadline = time.monotonic() + 400
    while not list(folder.glob("checkpoints/ivon/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.005)
    for started in (*psutil.Process(process.pid).children(recursive=True), process):
        started.kill()
    process.communicate()
    assert not (folder / "summary.json").exists()
    two = finished(launched(recipe, folder))
    one = run_bayes(from_dict(BayesConfig, load_config(recipe)), show_progress=False, measure=measure)
    assert two["report"]["steps"] == one["report"]["steps"] == 24
    assert two["report"]["train_nll"] == pytest.approx(one["report"]["train_nll"], rel=1e-5)
    ours, theirs = posterior(folder), posterior(tmp_path / "one")
    assert ours.keys() == theirs.keys() and any(k.startswith("posterior.safetensors") for k in ours)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=key)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    for a, b in zip(*rows, strict=True):
        assert a["id"] == b["id"] and a["probs"] == pytest.approx(b["probs"], abs=1e-5)
    assert two["metrics"]["nll"]["value"] == pytest.approx(one["metrics"]["nll"]["value"], abs=1e-4)
    assert not (folder / "checkpoints").exists()
