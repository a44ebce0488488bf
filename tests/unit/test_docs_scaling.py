"""docs/scaling.md: its plans are what the command prints, its check is the results file; the launch files parse.

python -m tests.unit.test_docs_scaling      writes both tables into the page
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from vlm_reason.cli.main import build_parser, parse
from vlm_reason.config import RunConfig, from_dict, load_config
from vlm_reason.engines.make import engine_config

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "scaling.md"
RESULTS = REPO / "evals" / "results" / "plan_check.json"
LAUNCH = REPO / "configs" / "launch"

VLLM = "engine.kind=vllm"
SERVERS = f"{VLLM} engine.mode=server 'engine.urls=[http://node:8000]'"
PLANS = (
    "",
    VLLM,
    f"{VLLM} --devices 8",
    f"{VLLM} --devices 64 --nodes 8",
    f"{SERVERS} --sampling-devices 32 --devices 64 --nodes 8",
    f"{VLLM} --devices 1024 --nodes 128",
    f"{VLLM} --devices 1024 --nodes 128 trainer.rounds=8 trainer.prompts_per_step=1024 trainer.prompts_per_window=4096",
)
PLAN_HEAD = (
    "more arguments",
    "window",
    "run",
    "GPU-hours",
    "generate",
    "score",
    "train",
    "rest",
    "GB",
    "binds",
)


def plan(arguments: list[str]) -> dict:
    options = parse(build_parser(), ["plan", *arguments, "--json"])
    return options.command.run(options)


@cache
def plans() -> str:
    (command,) = re.findall(
        r"^    vlm-reason plan (configs/recipes/vr_gsm8k.yaml model=.*)$", PAGE.read_text(), re.M
    )
    return markdown(PLAN_HEAD, [plan_row(command, more) for more in PLANS])  # fmt: skip


def plan_row(command: str, more: str) -> tuple[str, ...]:
    result = plan(shlex.split(f"{command} {more}"))
    run, where, memory = result["run"], result["run"]["where"], result["memory"]
    rest = where["communicate"] + where["optimise"] + where["sync"]
    peak = max(memory["training_peak"], memory["sampling_peak"]) / 1e9
    (phase,) = result["phases"]
    return (
        f"`{more}`" if more else "none: one GPU, the `hf` engine",
        f"{phase['seconds']['window']:.0f} s",
        f"{run['seconds'] / 3600:.2f} h",
        f"{run['device_hours']:.1f}",
        *(f"{where[kind]:.0%}" for kind in ("generate", "score", "train")),
        f"{rest:.0%}",
        f"{peak:.0f}",
        ", ".join(advice["limit"] for advice in result["advice"]),
    )


def checks() -> str:
    rows = json.loads(RESULTS.read_text())["rows"]
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        case, kind = row["name"].split("/")
        cases.setdefault(case, {})[kind] = row
    head = ("case", "dtype", "traces", "mean tokens", "generate", "score", "train", "measured")
    table = []
    for kinds in cases.values():
        one = kinds["train"]
        ratios = (
            f"{kinds[kind]['value']:.2f}" if kind in kinds else "" for kind in ("generate", "score", "train")
        )
        seconds = sum(kind["measured_seconds"] for kind in kinds.values())
        examples = f", {one['shots']} worked examples" if one["shots"] else ""
        table.append(
            (
                f"{one['groups']} problems, K = {one['traces']}{examples}", one["dtype"],
                str(one["groups"] * one["traces"]), f"{one['mean_trace_tokens']:.0f}", *ratios, f"{seconds:.0f} s",
            )
        )  # fmt: skip
    return markdown(head, table)


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(mark: str) -> str:
    return PAGE.read_text().split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- /{mark} -->")[0]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def test_the_plans_are_what_the_command_says() -> None:
    assert between("plans") == plans()


def test_the_check_is_the_results_file() -> None:
    assert between("check") == checks()


def test_more_devices_never_take_longer_and_cost_more() -> None:
    rows = [line.split(" | ") for line in plans().splitlines()[2:]]
    seconds = {row[0]: (float(row[2][:-2]), float(row[3])) for row in rows}
    order = [seconds[f"| `{more}`"] for more in (PLANS[1], PLANS[2], PLANS[3], PLANS[5])]
    assert [hours for hours, _ in order] == sorted((hours for hours, _ in order), reverse=True)
    assert [cost for _, cost in order] == sorted(cost for _, cost in order)


# -------------------------------------------------------------------------------------------------- launching


@pytest.mark.parametrize("name", ["slurm.sh", "node.sh"])
def test_launch_scripts_parse(name: str) -> None:
    path = LAUNCH / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert (
        path.read_text().startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in path.read_text()
    )


def test_skypilot_file_parses_and_names_what_is_there() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert (REPO / task["envs"]["CONFIG"]).is_file()
    for script in re.findall(r"[\w/.]+\.sh", task["run"]):
        assert (REPO / script).is_file()


RECORD = """#!/usr/bin/env bash
echo "$(basename "$0") $CUDA_VISIBLE_DEVICES $*" >> "$RECORD"
sleep "${LAST:-0}"
"""


def node(tmp_path: Path, role: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """node.sh with `vlm-reason`, `accelerate` and `curl` that write down how they were called."""
    for name in ("vlm-reason", "accelerate", "curl"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-"}
    env |= {"RECORD": str(tmp_path / "record"), "CONFIG": "configs/recipes/vr_gsm8k.yaml", **environment}
    command = ["bash", str(LAUNCH / "node.sh"), role]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_serving_node_starts_a_server_a_gpu(tmp_path: Path) -> None:
    done = node(tmp_path, "serve", GPUS="3", PORT="9000", OVERRIDES="model=some/model adapter.r=32", LAST="2")
    assert done.returncode == 0, done.stderr
    lines = sorted((tmp_path / "record").read_text().splitlines())
    assert lines == [
        f"vlm-reason {gpu} serve configs/recipes/vr_gsm8k.yaml --host 0.0.0.0 --port {9000 + gpu} engine.kind=vllm "
        "model=some/model adapter.r=32"
        for gpu in range(3)
    ]


def test_a_training_node_waits_and_launches_one_process_a_gpu(tmp_path: Path) -> None:
    done = node(
        tmp_path, "train", OUTPUT_DIR="/shared/run", GPUS="2", SERVER_HOSTS="a b", TRAIN_HOSTS="c d", NODE_INDEX="1",
        OVERRIDES="seed=1 trainer.rounds=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *asked, launched = (tmp_path / "record").read_text().splitlines()
    urls = [f"http://{host}:{port}" for host in "ab" for port in (8000, 8001)]
    assert [line.split()[-1] for line in asked] == [f"{url}/health" for url in urls]
    flags, _, script = launched.partition(" scripts/train.py ")
    assert flags == (
        "accelerate - launch --config_file configs/accelerate/ddp.yaml --num_machines 2 --num_processes 4 "
        "--machine_rank 1 --main_process_ip c --main_process_port 29500"
    )
    launch_command_parser().parse_args([*flags.split()[3:], "script"])  # accelerate knows the flags
    flag, recipe, *overrides = script.split()
    config = from_dict(RunConfig, load_config(REPO / recipe, overrides))
    assert flag == "--config" and (config.seed, config.trainer["rounds"]) == (1, 2)
    engine = engine_config(config.engine)
    assert (engine.kind, engine.mode, list(engine.urls)) == ("vllm", "server", urls)


def test_a_training_node_gives_up_on_a_server_that_never_answers(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = node(
        tmp_path / "bin", "train", OUTPUT_DIR="o", SERVER_HOSTS="127.0.0.1", TRAIN_HOSTS="c", NODE_INDEX="0", GPUS="1",
        PORT="9", WAIT="0", PATH=os.environ["PATH"],
    )  # fmt: skip
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:9/health within 0 s" in done.stderr


def test_slurm_splits_the_nodes_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'n%s\\n' 1 2 3 4\n")
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\necho "$SERVER_HOSTS|$TRAIN_HOSTS|$*" >> "$RECORD"\nsleep 1\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    env |= {"SLURM_JOB_NODELIST": "n[1-4]"}
    command = ["bash", str(LAUNCH / "slurm.sh")]
    done = subprocess.run(
        command, env={**env, "SERVER_NODES": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    serve, train = sorted((tmp_path / "record").read_text().splitlines(), key=lambda line: "train" in line)
    assert serve.startswith("n1|n2 n3 n4|--nodes=1 --ntasks=1 --nodelist=n1 ") and serve.endswith(
        "node.sh serve"
    )
    assert "|--nodes=3 --ntasks=3 --nodelist=n2,n3,n4 " in train and train.endswith("node.sh train")
    none = subprocess.run(
        command, env={**env, "SERVER_NODES": "4"}, capture_output=True, text=True, timeout=60
    )
    assert none.returncode == 2 and "SERVER_NODES is 4 of 4 nodes" in none.stderr


def main() -> None:
    os.chdir(REPO)
    text = PAGE.read_text()
    for mark, table in (("plans", plans()), ("check", checks() if RESULTS.is_file() else "")):
        before, after = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
        text = re.sub(f"{before}.*{after.strip()}", f"{before}{table}{after}", text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
