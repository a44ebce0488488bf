"""The third kind of config `vlm-reason eval` takes: a comparison of ways to fit a posterior over weights (`sets`)."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import from_dict, load_config
from ..errors import UserError
from .command import Result
from .output import console, number, table

_COLUMNS = ("accuracy", "nll", "ece", "brier", "aurc", "ood_auroc")


def holds_weight_suite(options: argparse.Namespace) -> bool:
    return "sets" in load_config(options.config, options.overrides)


def run_weight_suite_command(options: argparse.Namespace) -> Result:
    for name in ("from_store", "store", "system", "audit", "require"):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is not for a comparison of posteriors (a config with `sets`)"
            )
    from ..evaluation.weight_suite import WeightSuite, run_weight_suite

    suite = from_dict(WeightSuite, load_config(options.config, options.overrides))
    return run_weight_suite(suite, progress=not options.quiet)


def show_weight_suite(result: Result) -> None:
    out = console()
    for name in dict.fromkeys(row["set"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["set"] == name]
        head = ("method", *_COLUMNS, f"NLL - {result['reference']}", "fit s")
        out.print(table(f"{name}: means over seeds [95%]", head, [_line(row) for row in own]))
    out.print(f"written to {result['file']}", highlight=False)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    cells = [_interval(row[name]) for name in _COLUMNS]
    return (row["method"], *cells, _interval(row.get("nll_difference")), number(row["fit_seconds"], ".0f"))


def _interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["ci"]
    return f"{value['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low == low else "")
