"""docs/commands.md names every key, option and method there is, and none that there is not."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from vlm_reason.cli.main import build_parser
from vlm_reason.config import RunConfig
from vlm_reason.engines.make import EngineConfig, VLLMConfig
from vlm_reason.evaluation import EvalConfig
from vlm_reason.models.adapters import AdapterConfig
from vlm_reason.ranking import METHODS
from vlm_reason.tasks.sources import ROW_OPTIONS, TaskSpec
from vlm_reason.tasks.templates import Template
from vlm_reason.tasks.verifiers import VERIFIERS
from vlm_reason.weights import Training
from vlm_reason.weights.config import BayesConfig, Prediction
from vlm_reason.weights.job import SCHEDULES
from vlm_reason.weights.predictive import MODES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def keys_behind(start: str) -> set[str]:
    """Names in the first column of the first table behind `start`."""
    table = PAGE[PAGE.index(start) :].split("\n| ", 1)[1].split("\n\n")[0]
    return {name for line in table.splitlines()[2:] for name in quoted(line.split("|")[1])}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Of a group of commands, those of all of them."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for inner in action.choices.values() for option in options_of(inner)}
    return found


def fields(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def test_every_key_is_in_its_table() -> None:
    assert keys_behind("## The config file") == fields(RunConfig)
    assert keys_behind("`task`, `eval_task` (") == fields(TaskSpec)
    assert keys_behind("\n`adapter`:") == fields(AdapterConfig) | {"full"}
    assert keys_behind("\n`engine` (") == fields(EngineConfig)
    assert keys_behind("\n`engine`, `kind: vllm` (") == fields(VLLMConfig) - fields(EngineConfig)
    assert keys_behind("`sampling`, `evaluation` (") == fields(EvalConfig) - {"adapter"} | {"bound_traces"}
    assert keys_behind("### `kind: bayes`") == fields(BayesConfig)
    assert keys_behind("\n`training`:") == fields(Training)
    assert keys_behind("\n`predictive`:") == fields(Prediction)
    assert set(MODES) <= set(quoted(PAGE[PAGE.index("\n`predictive`:") :]))
    assert set(SCHEDULES) <= set(quoted(PAGE[PAGE.index("\n`training`:") :]))
    template = PAGE[PAGE.index("`template` as a section") : PAGE.index("\n`adapter`:")]
    assert fields(Template) - {"name", "question"} <= set(quoted(template))
    assert all(f"`{name}`" in PAGE for name in ("allow_quarantined", *ROW_OPTIONS))


def test_defaults_are_those_of_the_code() -> None:
    config = RunConfig()
    for key in ("kind", "model", "dtype", "verifier", "output_dir", "preset"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{key}`"))
        assert quoted(row.split("|")[2])[0] == getattr(config, key)


def test_every_option_and_choice_is_named() -> None:
    table = PAGE[PAGE.index("| option | of |") :].split("\n\n")[0].replace("\\|", "/")
    rows = {row.split("|")[1].split("`")[1].split()[0]: row for row in table.splitlines()[2:]}
    actions = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    there: dict[str, set[str]] = {}
    for name, parser in actions.choices.items():
        for option in options_of(parser):
            there.setdefault(option, set()).add(name)
    assert set(rows) == {option for option in there if option not in ("-h", "--help")}
    for option, row in rows.items():
        of = row.split("|")[2].strip()
        assert set(actions.choices if of == "all" else of.split(", ")) == there[option]
    assert set(quoted(rows["--method"])) - {"--method NAME", "all"} == set(METHODS)
    verifier = next(line for line in PAGE.splitlines() if line.startswith("| `verifier`"))
    assert set(VERIFIERS) <= set(quoted(verifier))
