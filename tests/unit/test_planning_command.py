"""`vlm-reason plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from vlm_reason.cli import plan as command
from vlm_reason.cli.main import main
from vlm_reason.planning.cluster import SHARDINGS
from vlm_reason.planning.hardware import DEVICES
from vlm_reason.planning.workload import LAYOUTS

REPO = Path(__file__).resolve().parents[2]
MODEL = str(REPO / "configs" / "models" / "qwen3-1.7b")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    trainer = {
        "prompts_per_window": 64,
        "prompts_per_step": 16,
        "traces_per_prompt": 8,
        "max_trace_tokens": 600,
    }
    data = {"model": MODEL, "dtype": "bfloat16", "preset": "rloo", "trainer": {**trainer, "rounds": 5}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def printed(capfd: pytest.CaptureFixture[str], recipe: Path, *arguments: str) -> dict:
    assert (
        main(["plan", str(recipe), "--device", "h100", "--prompt-tokens", "100", "--json", *arguments]) == 0
    )
    return json.loads(capfd.readouterr().out)


def refused(capfd: pytest.CaptureFixture[str], recipe: Path, *arguments: str) -> str:
    base = [] if "--device" in arguments else ["--device", "h100"]
    prompt = [] if "--prompt-tokens" in arguments else ["--prompt-tokens", "100"]
    assert main(["plan", str(recipe), *base, *prompt, *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_the_choices_of_the_command_are_those_of_the_model() -> None:
    assert command.SHARDINGS == SHARDINGS and command.LAYOUTS == LAYOUTS
    page = (REPO / "docs" / "commands.md").read_text()
    named = re.search(r"`--device NAME` \| plan \| (.*) \|", page).group(1)
    assert set(re.findall(r"`(\w+)`", named)) == {*DEVICES, "cpu"}


def test_json_has_the_documented_keys_and_consistent_totals(capfd, recipe: Path) -> None:
    result = printed(capfd, recipe)
    page = (REPO / "docs" / "commands.md").read_text()
    keys = re.search(r"^\| plan \| (`model`.*) \|$", page, re.M).group(1)
    assert set(result) == set(re.findall(r"`(\w+)`", keys))
    (phase,) = result["phases"]
    run, seconds = result["run"], phase["seconds"]
    assert run["windows"] == 5 and run["steps"] == 20
    assert run["seconds"] == pytest.approx(5 * seconds["window"])
    assert seconds["window"] == pytest.approx(sum(v for k, v in seconds.items() if k != "window"))
    assert sum(run["where"].values()) == pytest.approx(1)
    drawn = 200 + 8  # a third of the cap, and an answer
    assert run["generated_tokens"] == pytest.approx(5 * 64 * 8 * drawn)
    assert run["flops"] == pytest.approx(5 * sum(phase["flops"].values()))
    assert run["device_hours"] == pytest.approx(run["seconds"] / 3600)
    assert result["memory"]["fits"]
    traces = next(a for a in result["assumptions"] if a["name"] == "mean trace tokens")
    assert traces["value"] == 200 and traces["source"] == "0.33 of max_trace_tokens"


def test_work_grows_with_what_makes_it(capfd, recipe: Path) -> None:
    one = printed(capfd, recipe)
    twice = printed(capfd, recipe, "trainer.rounds=10")
    assert twice["run"]["seconds"] == pytest.approx(2 * one["run"]["seconds"])
    longer = printed(capfd, recipe, "--mean-trace-tokens", "400")
    assert longer["phases"][0]["seconds"]["train"] > 1.6 * one["phases"][0]["seconds"]["train"]
    fewer = printed(capfd, recipe, "--mean-trace-tokens", "180")
    elasticity = math.log(fewer["run"]["seconds"] / one["run"]["seconds"]) / math.log(0.9)
    assert one["sensitivity"]["mean trace tokens"] == pytest.approx(elasticity, abs=1e-3)
    half = printed(capfd, recipe, "--live-share", "0.5")
    assert half["phases"][0]["seconds"]["train"] < 0.65 * one["phases"][0]["seconds"]["train"]
    packed = printed(capfd, recipe, "--layout", "packed")
    assert packed["run"]["trained_tokens"] > 1.3 * one["run"]["trained_tokens"]


def test_advice_names_what_binds(capfd, recipe: Path) -> None:
    def limits(*arguments: str) -> set[str]:
        return {advice["limit"] for advice in printed(capfd, recipe, *arguments)["advice"]}

    assert "host" in limits()  # eight rows of an eager model on an H100
    assert "groups a rank" in limits("--devices", "64", "--nodes", "8")
    assert "shared prefixes" in limits("--layout", "packed", "engine={kind: vllm}")
    big = ("trainer.tokens_per_microbatch=131072", "engine.batch_size=2048")
    assert "memory" in limits(*big)
    assert not printed(capfd, recipe, *big)["memory"]["fits"]
    full = ("engine.kind=vllm", "adapter={full: true}", "trainer.tokens_per_microbatch=512")
    wires = limits("--devices", "16", "--nodes", "8", "--sharding", "fsdp2", *full)
    assert "gathering weights" in wires


def test_tables_for_people(capfd, recipe: Path) -> None:
    assert main(["plan", str(recipe), "--device", "h100", "--prompt-tokens", "100"]) == 0
    out = capfd.readouterr().out
    for text in (
        "1 x h100, none, hf engine, tree",
        "20 in 5 windows",
        "fits the 73.6 GB usable",
        "of the run",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "b200x"), "no device 'b200x'"),
        (("--mean-trace-tokens", "601"), "a mean of 601 trace tokens exceeds trainer.max_trace_tokens = 600"),
        (("--live-share", "0"), r"share of live traces must be in \(0, 1\], got 0"),
        (("--prompt-tokens", "0"), "--prompt-tokens must be > 0 and at most 1000000000, got 0"),
        (("--prompt-tokens", "inf"), "--prompt-tokens must be > 0 and at most 1000000000, got inf"),
        (("--prompt-tokens", "1e300"), r"--prompt-tokens must be > 0 and at most 1000000000, got 1e\+300"),
        (("--mean-answer-tokens", "99"), "a mean of 99 answer tokens exceeds trainer.max_answer_tokens = 16"),
        (("dtype=bfloat",), "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        (("engine.batch_size=0",), "engine.batch_size must be >= 1, got 0"),
        (("--devices", "0"), "devices must be >= 1, got 0"),
        (("--devices", "4", "--sampling-devices", "2"), "the hf engine runs in the training processes"),
        (("trainer.prompts_per_stp=3",), "did you mean 'prompts_per_step'"),
        (("engine.kind=vlm",), "engine.kind"),
        (("model=nowhere/at-all/here",), "no model folder"),
        (("preset=rlo",), "unknown preset 'rlo'; did you mean"),
        (("adapter.target_modules=[query]",), "names no layer of"),
    ],
)
def test_refusals_are_one_line(capfd, recipe: Path, arguments: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(capfd, recipe, *arguments))


@pytest.mark.parametrize(
    ("setting", "sharding"),
    [("trainer.fsdp2=true", "fsdp2"), ("trainer.fsdp2=false", "ddp"),
     *((f"trainer.deepspeed={REPO}/configs/deepspeed/{name}.json", name) for name in ("zero2", "zero3"))],
)  # fmt: skip
def test_sharding_is_the_recipe_s(capfd, recipe: Path, setting: str, sharding: str) -> None:
    if "deepspeed" in setting and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    assert printed(capfd, recipe, setting, "--devices", "4")["cluster"]["sharding"] == sharding
    assert (
        printed(capfd, recipe, setting, "--devices", "4", "--sharding", "ddp")["cluster"]["sharding"] == "ddp"
    )
    assert printed(capfd, recipe, setting)["cluster"]["sharding"] == "none"


def test_a_size_that_is_no_number_is_named(capfd, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "big"}')
    line = refused(capfd, recipe, f"model={tmp_path}")
    assert f"cannot load the model in '{tmp_path}'" in line and "'hidden_size' expected int, got str" in line


def test_servers_need_devices(capfd, recipe: Path) -> None:
    servers = ("engine.kind=vllm", "engine.mode=server", "engine.urls=[http://a:1]")
    assert "--sampling-devices N" in refused(capfd, recipe, *servers)
    result = printed(capfd, recipe, *servers, "--devices", "4", "--sampling-devices", "2")
    assert (result["cluster"]["engines"], result["cluster"]["ranks"]) == (2, 2)
    assert result["phases"][0]["seconds"]["sync"] > 0


def test_a_folder_without_tokenizer_says_what_to_do(capfd, recipe: Path) -> None:
    assert main(["plan", str(recipe), "--device", "h100"]) == 2
    assert "--prompt-tokens N" in capfd.readouterr().err


@pytest.mark.integration
def test_the_quickstart_is_planned_from_its_own_prompts(capfd) -> None:
    """The built-in model's tokenizer and the generator's problems; lengths of worked examples included."""
    recipe = str(REPO / "configs" / "recipes" / "quickstart.yaml")
    results = []
    for shots in (0, 4):
        assert main(["plan", recipe, "--device", "h100", "--json", f"shots={shots}"]) == 0
        results.append(json.loads(capfd.readouterr().out))
    plain, worked = ({a["name"]: a["value"] for a in r["assumptions"]} for r in results)
    assert 5 < plain["prompt tokens"] < 30 < worked["prompt tokens"]
    assert plain["hinted prompt tokens"] > plain["prompt tokens"]
    assert results[0]["run"]["steps"] == 6 * 160 // 16 * 2  # rounds, problems a window, a step, epochs
