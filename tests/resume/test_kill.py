"""The command itself, killed for real: SIGKILL between and inside steps and saves, Ctrl-C, and a changed config.

Every process runs `vlm-reason train CONFIG` on a tiny model in a folder. Moments are drawn from a seed, but where in a
step a signal lands is up to the machine: the outcome may not depend on it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from vlm_reason.config import RunConfig, from_dict, load_config
from vlm_reason.errors import UserError
from vlm_reason.traces.run import run_training

REPO = Path(__file__).resolve().parents[2]
ADAPTERS = ("adapters/reasoner/adapter_model.safetensors", "adapters/posterior/adapter_model.safetensors")
PATIENCE = 120.0  # seconds until a process that does nothing fails the test


@pytest.fixture
def write_config(tiny_llama, tiny_tokenizer, tmp_path) -> Callable[..., Path]:
    """Writes the config of a run named `name`: two phases, windows of four steps, a checkpoint every third step."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": f"p{i}", "question": f"{i}+{i + 1}", "answer": str(2 * i + 1)} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, rounds: int) -> Path:
        config = {
            "model": str(tmp_path / "model"),
            "task": {"kind": "jsonl", "name": str(tmp_path / "sums.jsonl")},
            "template": {"base": "steps", "prior": "{question}=", "posterior": "{question}={hint}=", "cue": "a:"},
            "verifier": "number",
            "preset": "vr",
            "options": {"evidence": "logp", "ratio": "none"},
            "adapter": {"r": 2, "alpha": 4},
            "trainer": {
                "rounds": rounds,
                "prompts_per_window": 4,
                "prompts_per_step": 2,
                "window_epochs": 2,
                "traces_per_prompt": 3,
                "max_trace_tokens": 16,
                "max_answer_tokens": 4,
                "learning_rate": 1e-2,
                "warmup_steps": 3,
                "save_steps": 3,
                "use_cpu": True,
            },
            "output_dir": str(tmp_path / name),
            "seed": 11,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def read(path: Path, *overrides: str) -> RunConfig:
    return from_dict(RunConfig, load_config(path, overrides))


@contextmanager
def command(config: Path) -> Iterator[subprocess.Popen[str]]:
    """`vlm-reason train CONFIG` in a process of its own; whatever happens, it does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_reason", "train", str(config), "--json", "--quiet"],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the run ended before {what}:\n{process.communicate()[1]}")
        if time.monotonic() > deadline:
            pytest.fail(f"no sign of {what} in {PATIENCE:.0f} s")
        time.sleep(0.002)


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def saves(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".saving-*")}


def stop(config: Path, folder: Path, step: int, how: signal.Signals, inside_a_save: bool = False,
         delay: float = 0.0) -> tuple[int, str]:  # fmt: skip
    """Start the command, wait for row `step` of metrics.jsonl, then send `how`; (exit status, stderr)."""
    with command(config) as process:
        wait_until(lambda: steps_written(folder) >= step, process, f"step {step}")
        if inside_a_save:
            before = saves(folder)
            wait_until(lambda: bool(saves(folder) - before), process, "a save")
        time.sleep(delay)
        process.send_signal(how)
        _, errors = process.communicate(timeout=PATIENCE)
    assert not (folder / "summary.json").exists(), "the run finished before the signal"
    return process.returncode, errors


def newest_checkpoint(folder: Path) -> Path:
    """The one of the highest number, whole or not: what is not whole may not bear the name."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def result(folder: Path) -> dict[str, object]:
    """Everything a run computes: losses and gradient norms, samples with their weights, both adapters' bytes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": [(r["step"], r["phase"], r["loss"], r["grad_norm"], r["bound"]) for r in rows],
        "completions": [path.read_text() for path in sorted((folder / "completions").iterdir())],
        **{name: (folder / name).read_bytes() for name in ADAPTERS},
    }


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_killed_twice_and_interrupted_once_equals_untouched(write_config, tmp_path):
    rounds = 16  # 128 steps: idle ones take milliseconds, and the last signal must land well before the end
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    run_training(read(write_config("whole", rounds)), show_progress=False)
    config = write_config("stopped", rounds)
    draw = random.Random(20)

    # in a step, in the first window of the second phase
    status, _ = stop(config, folder, draw.randint(5, 6), signal.SIGKILL, delay=draw.uniform(0, 0.05))
    assert status == -signal.SIGKILL
    assert (newest_checkpoint(folder) / "trace_state.json").is_file()

    # while a checkpoint is being written
    status, _ = stop(config, folder, draw.randint(11, 13), signal.SIGKILL, inside_a_save=True)
    assert status == -signal.SIGKILL
    assert (newest_checkpoint(folder) / "trace_state.json").is_file()

    # Ctrl-C
    status, errors = stop(config, folder, draw.randint(19, 21), signal.SIGINT, delay=draw.uniform(0, 0.05))
    assert status == 130
    assert errors.splitlines()[-1].startswith("vlm-reason: interrupted; ") and "Traceback" not in errors
    assert (newest_checkpoint(folder) / "trace_state.json").is_file()

    last = newest_checkpoint(folder).name
    with command(config) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    summary = json.loads(output)
    assert summary["steps"] == rounds * 8 and summary["resumed_from"] == last
    assert "already_finished" not in summary
    assert not saves(folder)
    assert result(folder) == result(whole)


def test_a_finished_run_is_left_as_it_is(write_config, tmp_path):
    path = write_config("done", rounds=1)
    first = run_training(read(path), show_progress=False)
    before = everything_in(tmp_path / "done")

    started = time.perf_counter()
    again = run_training(read(path), show_progress=False)
    assert time.perf_counter() - started < 1.0  # neither model nor data are loaded
    assert again == {**first, "already_finished": True}

    with pytest.raises(UserError) as refused:
        run_training(read(path, "seed=12"), show_progress=False)
    line = str(refused.value)
    assert "holds a run with seed = 11, this one has 12" in line and "choose another output_dir" in line
    assert "\n" not in line
    assert everything_in(tmp_path / "done") == before


def test_killed_before_the_summary_only_the_summary_is_missing(write_config, tmp_path):
    """All steps done, result not yet written: the same command writes it and trains no further."""
    path, folder = write_config("done", rounds=1), tmp_path / "done"
    run_training(read(path), show_progress=False)
    before = result(folder)
    (folder / "summary.json").unlink()
    for name in ADAPTERS:
        (folder / name).unlink()
    again = run_training(read(path), show_progress=False)
    assert again["steps"] == 8 and again["resumed_from"] == "checkpoint-8"
    assert result(folder) == before
