"""Training in two processes against one: every way of sharding, for real (gloo on the CPU), on a tiny model.

The runs are made once, by tests/integration/sharded_worker.py: whole, stopped and resumed, and resumed from a
checkpoint of another way of sharding. Each test reads what they left.

Tolerances, of values of order 1 to 100: fp32 sums in another order (batches and ranks cut differently), after up to 8
optimiser steps; measured 6e-7 relative in losses and 3e-6 absolute in weights. bf16: see the test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("sharded_worker.py")
LOSS, WEIGHT = 1e-5, 2e-5
OWN_SHARE = {"tokens/forwarded", "useful_tokens", "tokens/scored", "mismatch/tokens", "mismatch/mean", "mismatch/max",
             "mismatch/kl", "mismatch/outside"}  # fmt: skip
"""Costs that depend on how the work is dealt: padding passes, comparisons a process."""

ZERO = ("zero2", "zero3")
MODES = ("ddp", "fsdp2", *ZERO)
KIND = {"ddp": "Replicated", "fsdp2": "FullySharded", "zero2": "Zero", "zero3": "Zero"}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPO), "TQDM_DISABLE": "1"}
    return {**os.environ, **own}


def launch(folder: Path, processes: int, *modes: str) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, str(WORKER), str(folder), *modes],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("sharded")
    for fixture in (tiny_llama, tiny_tokenizer):
        fixture.__wrapped__().save_pretrained(folder)
    launch(folder, 1, "one")
    launch(folder, 2, *MODES, "zero3_offload", "fsdp2<one", "zero3<one")
    launch(folder, 1, "one<fsdp2", "one<zero2", "one<zero3", "one<ddp")
    return folder


# ---- what the runs left --------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "final").rglob("*.safetensors"))
    assert files
    return {f"{path.parent.name}/{k}": v for path in files for k, v in load_file(path).items()}


def assert_alike(
    run: Path, reference: Path, first: int = 0, loss: float = LOSS, weight: float = WEIGHT
) -> None:
    """Same rows from step `first` on, same final weights."""
    ours, theirs = rows(run)[first:], rows(reference)[first:]
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] and ours
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss, abs=loss)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * loss, abs=loss)
        for key in timeless(b).keys() - OWN_SHARE - {"loss", "grad_norm"}:
            expected = pytest.approx(b[key], rel=1e-3, abs=1e-4) if isinstance(b[key], float) else b[key]
            assert a[key] == expected, key
    own, other = weights(run), weights(reference)
    assert own.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(own[name].float(), value.float(), rtol=0, atol=weight, msg=name)


def assert_equal(run: Path, reference: Path) -> None:
    """The same to the bit, times aside."""
    assert [timeless(r) for r in rows(run)] == [timeless(r) for r in rows(reference)]
    own, other = weights(run), weights(reference)
    assert own.keys() == other.keys() and all(torch.equal(own[k], v) for k, v in other.items())


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_what_it_says(runs, mode):
    for run in ("vr", "both", "full"):
        facts = json.loads((runs / mode / run / "report.json").read_text())
        assert facts["processes"] == 2 and facts["parallel"] == KIND[mode]
        assert facts["sharded"] == (facts["parameters"] if mode in ("fsdp2", "zero3") else 0)
        if mode in ZERO:
            assert ("Stage3" in facts["optimizer"]) == (mode == "zero3")


@pytest.mark.parametrize("run", ["vr", "both", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_follow_the_path_of_one(runs, mode, run):
    """`vr`: two adapters alternate; `both`: both in one step, with every second layer checkpointed in the two
    processes; `full`: full weights. Steps have more traces than fit a micro-batch, and an uneven number a rank."""
    assert_alike(runs / mode / run, runs / "one" / run)


@pytest.mark.parametrize("run", ["vr", "both"])
def test_optimiser_offload_too(runs, run):
    assert_alike(runs / "zero3_offload" / run, runs / "one" / run)


@pytest.mark.parametrize("mode", [*MODES, "zero3_offload"])
def test_training_one_adapter_leaves_the_other_and_its_moments_alone(runs, mode):
    facts = json.loads((runs / mode / "vr" / "report.json").read_text())
    assert facts["seen"] == 8 and facts["moved"] == 8 and facts["changed"] == 0
    assert facts["with_moments"] == 6  # all but the first window: momentum there would have moved it


@pytest.mark.parametrize(("run", "mode"), [*product(("vr", "full"), MODES), *product(("mixed",), ZERO)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(runs, run, mode):
    assert_equal(runs / mode / f"{run}-stopped", runs / mode / run)


@pytest.mark.parametrize("run", ["vr", "full"])
@pytest.mark.parametrize(
    "case",
    [
        "fsdp2-from-one",
        "zero3-from-one",
        "one-from-fsdp2",
        "one-from-zero2",
        "one-from-zero3",
        "one-from-ddp",
    ],
)
def test_a_checkpoint_goes_on_under_another_number_of_processes(runs, case, run):
    """Adam's moments, the schedule, the window in hand and its position come along, not only the weights."""
    resumed = runs / case / run
    assert [r["step"] for r in rows(resumed)] == [r["step"] for r in rows(runs / "one" / run)][3:]
    ours = {r["step"]: r for r in rows(resumed)}
    for theirs in rows(runs / "one" / run)[3:]:
        assert ours[theirs["step"]]["loss"] == pytest.approx(theirs["loss"], rel=LOSS, abs=LOSS)
    own, other = weights(resumed), weights(runs / "one" / run)
    for name, value in other.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=WEIGHT, msg=name)


@pytest.mark.parametrize(
    ("run", "mode", "loss", "weight"),
    [
        # fp32 adapters on a bf16 base. ZeRO-3 runs linear layers as matrix products, which round otherwise in bf16.
        *(("bf16", mode, 1e-5, 1e-5) for mode in ("ddp", "fsdp2", "zero2")),
        ("bf16", "zero3", 5e-3, 1e-2),
        # autocast, FSDP2's casts and ZeRO's 16-bit weights round at different places; Adam's steps are 1e-2 each
        *(("mixed", mode, 2e-2, 6e-2) for mode in MODES),
    ],
)
def test_bf16(runs, run, mode, loss, weight):
    ours, theirs = rows(runs / mode / run), rows(runs / "one" / run)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
    own, other = weights(runs / mode / run), weights(runs / "one" / run)
    assert all(v.dtype == torch.float32 for v in own.values())
    for name, value in other.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=weight, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_results_load_in_plain_peft_and_transformers(runs, mode):
    """With the logits of what one process left, loaded the same way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 9, 17, 4, 8]])

    def logits(where: str) -> list[torch.Tensor]:
        out = []
        for adapter in ("reasoner", "posterior"):
            base = AutoModelForCausalLM.from_pretrained(runs)
            out.append(
                PeftModel.from_pretrained(base, runs / where / "vr" / "final" / adapter).eval()(ids).logits
            )
        out.append(AutoModelForCausalLM.from_pretrained(runs / where / "full" / "final").eval()(ids).logits)
        return out

    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(runs)(ids).logits
        for ours, theirs in zip(logits(mode), logits("one"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
            assert not torch.allclose(ours, base, atol=1e-2)


# ---- the launch line -----------------------------------------------------------------------------------------


def accelerate(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train.py`."""
    accelerated = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", "configs/accelerate/ddp.yaml", "--main_process_port", "0"]
    return subprocess.Popen(
        [
            *accelerated,
            *config,
            "scripts/train.py",
            "--config",
            str(folder / "run.yaml"),
            "--json",
            "--quiet",
            *overrides,
        ],
        cwd=REPO,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def recipe(runs: Path) -> Path:
    problems = [{"id": f"p{i}", "question": f"{i}+{i + 1}", "answer": str(2 * i + 1)} for i in range(8)]
    (runs / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = {
        "model": str(runs),
        "task": {"kind": "jsonl", "name": str(runs / "sums.jsonl")},
        "template": {"base": "steps", "prior": "{question}=", "posterior": "{question}={hint}=", "cue": "a:"},
        "verifier": "number",
        "preset": "vr",
        "options": {"evidence": "logp", "ratio": "none"},
        "adapter": {"r": 2, "alpha": 4},
        "trainer": {"rounds": 15, "prompts_per_window": 4, "prompts_per_step": 2, "traces_per_prompt": 3,
                    "max_trace_tokens": 16, "max_answer_tokens": 4, "learning_rate": 1e-2, "save_steps": 3},
        "output_dir": str(runs / "launched" / "whole"),
        "seed": 11,
    }  # fmt: skip
    (runs / "run.yaml").write_text(yaml.safe_dump(config))
    return runs


def finished(process: subprocess.Popen[str]) -> dict:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1])


def test_launched_killed_and_launched_again_equals_untouched(recipe):
    whole = finished(accelerate(recipe))
    folder = recipe / "launched" / "killed"
    process = accelerate(recipe, f"output_dir={folder}")
    deadline = time.monotonic() + 300
    written = folder / "metrics.jsonl"
    while not written.is_file() or written.read_text().count("\n") < 8:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-4000:]
        time.sleep(0.01)
    for started in (*psutil.Process(process.pid).children(recursive=True), process):
        started.kill()  # SIGKILL, to the processes that train too: they have sessions of their own
    process.communicate()
    assert not (folder / "summary.json").exists()
    again = finished(accelerate(recipe, f"output_dir={folder}"))
    assert again["resumed_from"].startswith("checkpoint-")
    assert again["steps"] == whole["steps"] == 60 and again["tokens_used"] == whole["tokens_used"]
    assert not list(folder.glob(".saving-*"))
    reference = recipe / "launched" / "whole"
    assert [timeless(r) for r in rows(folder)] == [timeless(r) for r in rows(reference)]
    for name in ("adapters/reasoner", "adapters/posterior"):
        ours, theirs = (
            load_file(where / name / "adapter_model.safetensors") for where in (folder, reference)
        )
        assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_bad_input_is_said_once_and_ends_all(recipe):
    process = accelerate(recipe, "trainer.rounds=0", f"output_dir={recipe / 'launched' / 'bad'}")
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and output == ""
    assert [line for line in errors.splitlines() if line.startswith("vlm-reason:")] == [
        "vlm-reason: trainer.rounds must be >= 1, got 0"
    ]
    assert not (recipe / "launched" / "bad").exists()
