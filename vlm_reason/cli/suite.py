"""The suite half of `vlm-reason eval`: a config with `tasks`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import from_dict, load_config
from ..engines.launch import enter_environment
from ..errors import UserError
from .command import Result
from .output import console, estimate, number, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.requirements import Requirement

NOT_KEPT = 3
"""Exit status when a requirement or the audit is not passed."""


def holds_suite(options: argparse.Namespace) -> bool:
    data = load_config(options.config, options.overrides)
    return "tasks" in data or "suite" in data


def parse_requirements(texts: Sequence[str]) -> list[Requirement]:
    from ..evaluation.requirements import Requirement

    return [Requirement.parse(text) for text in texts]


def run_suite_command(options: argparse.Namespace) -> Result:
    for name in ("from_store", "store", "system"):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for training recipes; a suite names its model itself"
            )
    if options.on != "eval_task":
        raise UserError("--on is for training recipes; the tasks of a suite are under its `tasks`")
    requirements = parse_requirements(options.require)
    if options.audit_tolerance is not None:
        if not options.audit:
            raise UserError("--audit-tolerance has no meaning without --audit")
        if not 0 <= options.audit_tolerance < math.inf:
            raise UserError(f"--audit-tolerance must be a number >= 0, got {options.audit_tolerance}")
    from ..evaluation.suite import SuiteConfig

    config = from_dict(SuiteConfig, load_config(options.config, options.overrides))
    enter_environment(config.engine)
    from ..evaluation.suite_run import run_suite

    return run_suite(config, requirements, options.audit, options.audit_tolerance, progress=not options.quiet)


def failed(result: Mapping[str, Any]) -> bool:
    """Was a requirement or the audit of this result not passed?"""
    audit = result.get("audit")
    broken = any(not outcome["kept"] for outcome in result["requirements"])
    return broken or (audit is not None and not audit["passed"])


def show_suite(result: Result) -> None:
    out = console()
    tasks = list(result["tasks"])
    cells = {(r["task"], r["metric"]): r for r in result["rows"]}
    metrics = dict.fromkeys(r["metric"] for r in result["rows"])
    rows = [
        (
            metric,
            *(
                estimate(cells.get((task, metric)), ".1f" if metric == "trace_tokens" else ".3f")
                for task in tasks
            ),
        )
        for metric in metrics
    ]
    rows.append(("problems", *(str(result["tasks"][task]["problems"]) for task in tasks)))
    out.print(table(f"suite {result['suite']}, 95% intervals", ("", *tasks), rows))
    members = len(result["model"]["members"])
    what = f", {members} members" if members > 1 else ""
    out.print(f"model: {result['model']['name']}{what}", highlight=False)
    for task, report in result["tasks"].items():
        for line in _remarks(report):
            out.print(f"{task}: {line}", highlight=False)
    if result["audit"] is not None:
        a = result["audit"]
        out.print(
            f"audit: {a['items']} samples scored again alone; largest difference of a token "
            f"{number(a['largest'], '.2g')} nats, mean {number(a['mean'], '.2g')}; tolerance {a['tolerance']:g}: "
            f"{'passed' if a['passed'] else 'NOT PASSED'}",
            highlight=False,
        )
    show_requirements(out, result["requirements"])
    cost = result["cost"]
    out.print(
        f"{cost['tokens']} tokens ({cost['tokens_drawn_now']} now), {cost['seconds']:.1f} s; "
        f"written to {result['file']}",
        highlight=False,
    )


def _remarks(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if report["left_out"]:
        lines.append(f"{report['left_out']} problems left out ({report['left_out_why']})")
    if report["repeated"]:
        lines.append(f"{report['repeated']} questions that the generator made twice are asked once")
    if report["too_long"]:
        lines.append(f"{len(report['too_long'])} problems do not fit the model's context and count as wrong")
    if report["verifier_failures"]:
        lines.append(f"the verifier failed on {report['verifier_failures']} answers (counted as wrong)")
    return lines


def show_requirements(out: Console, outcomes: Sequence[Mapping[str, Any]]) -> None:
    for outcome in outcomes:
        verdict = "kept" if outcome["kept"] else "NOT KEPT"
        value = number(outcome["value"], ".4f")
        out.print(
            f"{verdict}: {outcome['requirement']} on {outcome['task']} (it is {value})", highlight=False
        )
