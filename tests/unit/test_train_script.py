"""scripts/train.py: the train command for launchers, and what a launcher may not do yet."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from vlm_reason.cli import train
from vlm_reason.errors import UserError
from vlm_reason.traces import checks, run

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_script", REPO / "scripts" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: {{kind: jsonl, name: absent.jsonl}}\noutput_dir: {tmp_path / 'run'}\n")
    return path


def test_it_is_the_train_command(script, config, monkeypatch, capfd) -> None:
    asked: list[Namespace] = []
    command = replace(train.COMMAND, run=lambda options: asked.append(options) or {"steps": 3})
    monkeypatch.setattr(script.train, "COMMAND", command)
    assert script.main(["seed=1", "--config", str(config), "--json", "model=x"]) == 0
    assert capfd.readouterr().out == '{"steps": 3}\n'
    assert (asked[0].config, asked[0].overrides, asked[0].quiet) == (
        str(config),
        ["seed=1", "model=x"],
        False,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=thought"], "kind: 'thought' is not one of 'trace', 'bayes'"),
        (["preset=vrr"], "unknown preset 'vrr'; did you mean 'vr'?"),
        (
            ["trainer.deepspeed=none.json"],
            "trainer.deepspeed: no file 'none.json'; configs/deepspeed/ has some to start from",
        ),
        (
            [f"trainer.deepspeed={__file__}"],
            f"trainer.deepspeed: {__file__!r} is not valid JSON: Extra data: line 1 column 3 (char 2)",
        ),
        ([], "data file 'absent.jsonl' does not exist; paths are relative to the current folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, config, capfd, overrides, message) -> None:
    assert script.main(["--config", str(config), *overrides]) == 2
    assert capfd.readouterr() == ("", f"vlm-reason: {message}\n")
    assert not (config.parent / "run").exists()


def test_of_many_processes_the_first_says_what_is_wrong(script, config, monkeypatch, capfd) -> None:
    monkeypatch.setenv("RANK", "1")
    assert script.main(["--config", str(config), "kind=thought"]) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (
            {"world_size": 1, "n_gpu": 4},
            "one process trains on one GPU, and 4 are visible: start one process a GPU, as in accelerate launch",
        ),
    ],
)
def test_several_gpus_to_one_process_are_refused_before_anything_is_loaded(
    config, monkeypatch, capfd, script, devices, message
) -> None:
    (config.parent / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    monkeypatch.setattr(run, "trace_config", lambda _: Namespace(**devices))
    rows = f"task.name={config.parent / 'rows.jsonl'}"
    assert script.main(["--config", str(config), rows, "model=no/such/model"]) == 2
    assert message in capfd.readouterr().err and not (config.parent / "run").exists()
    with pytest.raises(UserError, match="one process trains on one GPU"):
        checks.check_devices(Namespace(**devices))
    checks.check_devices(Namespace(world_size=1, n_gpu=0, fsdp2=False))


def test_fsdp2_in_a_single_process_is_refused_before_anything_is_loaded(config, capfd, script) -> None:
    (config.parent / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    settings = [f"task.name={config.parent / 'rows.jsonl'}", "model=no/such/model", "trainer.fsdp2=true"]
    assert script.main(["--config", str(config), *settings]) == 2
    assert "configs/accelerate/fsdp2.yaml --num_processes N" in capfd.readouterr().err
    assert not (config.parent / "run").exists()
