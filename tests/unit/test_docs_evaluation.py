"""docs/evaluation.md says what there is: keys, rows, suites, and commands that parse."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import yaml

from vlm_reason.cli.main import build_parser, parse
from vlm_reason.config import from_dict
from vlm_reason.evaluation.audit import ITEMS, TOLERANCE
from vlm_reason.evaluation.measuring import row_names
from vlm_reason.evaluation.suite import SuiteConfig

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "evaluation.md").read_text()


def first_column(start: str) -> set[str]:
    table = PAGE[PAGE.index(start) :].split("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_key_and_every_row_is_there() -> None:
    assert first_column("| key | default |") == {f.name for f in dataclasses.fields(SuiteConfig)}
    rows = {re.sub(r"@\d+", "@k", name) for name in row_names(traces=8, answers=1, members=3)}
    assert first_column("| row | meaning |") == rows


def test_the_example_is_a_suite_and_the_commands_parse() -> None:
    example = PAGE[PAGE.index("```yaml\n") + 8 :].split("```")[0]
    assert from_dict(SuiteConfig, yaml.safe_load(example)).suite == "math_words"
    commands = re.findall(r"^    vlm-reason (.+)$", PAGE, flags=re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        parse(build_parser(), shlex.split(command))


def test_suites_and_numbers_are_those_of_the_project() -> None:
    named = PAGE[PAGE.index("`evals/suites/` has") :].split("\n\n")[0]
    assert {p.stem for p in (REPO / "evals" / "suites").glob("*.yaml")} <= set(re.findall(r"`(\w+)`", named))
    audit = PAGE[PAGE.index("## Audit") :].split("## ")[1]
    assert f"takes {ITEMS} stored samples" in audit
    for dtype, tolerance in TOLERANCE.items():
        assert re.search(rf"\b{tolerance:g}\s+in\s+{dtype}", audit)
