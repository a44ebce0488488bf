"""`optim: ivon` in two processes, replicated and sharded by FSDP2, against one (gloo on the CPU), on a tiny model.

Tolerances: fp32 sums in another order, after four optimiser steps. Noise is that of a weight's place, so the draws are
the same; the modes would otherwise be as far apart as two seeds, which the last assertion measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm_reason.weights import DiagonalGaussian, Posterior

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("ivon_worker.py")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


def launch(config: Path, processes: int, *modes: str) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPO), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*start, str(WORKER), str(config), *modes], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_two_processes_learn_the_posterior_of_one(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": f"p{i}", "question": f"{i}+{i + 1}", "answer": str(2 * i + 1)} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": str(tmp_path / "model"),
        "task": {"kind": "jsonl", "name": str(tmp_path / "sums.jsonl")},
        "template": {"base": "steps", "prior": "{question}=", "posterior": "{question}={hint}=", "cue": "a:"},
        "verifier": "number",
        "preset": "vr",
        "options": {"evidence": "logp", "ratio": "none"},
        "adapter": {"r": 2, "alpha": 4},
        "optim": "ivon",
        "ivon": {"sigma": 0.02},
        "trainer": {"rounds": 1, "prompts_per_window": 8, "prompts_per_step": 4, "traces_per_prompt": 4,
                    "max_trace_tokens": 16, "max_answer_tokens": 4, "learning_rate": 1e-2, "save_steps": 2},
        "seed": 11,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    launch(path, 1, "one")
    launch(path, 2, "ddp", "fsdp2")

    one = Posterior.load(tmp_path / "one/posterior", tiny_llama)
    assert isinstance(one, DiagonalGaussian)
    losses = {m: [json.loads(line)["loss"] for line in (tmp_path / m / "metrics.jsonl").read_text().splitlines()]
              for m in ("one", "ddp", "fsdp2")}  # fmt: skip
    for mode in ("ddp", "fsdp2"):
        other = Posterior.load(
            tmp_path / mode / "posterior", tiny_llama
        )  # of the same base model, by its hash
        assert isinstance(other, DiagonalGaussian)
        assert losses[mode] == pytest.approx(losses["one"], rel=1e-5, abs=1e-5)
        for key, value in one.mean().items():
            torch.testing.assert_close(other.mean()[key], value, rtol=0, atol=1e-4)
            torch.testing.assert_close(other.sigma()[key], one.sigma()[key], rtol=1e-3, atol=0)
        assert other.origin == one.origin
    first, second = one.sample(2, 0)
    assert max((first[k] - second[k]).abs().max() for k in first) > 1e-2
