"""vlm-reason report: everything that stored samples say, as one HTML file."""

from __future__ import annotations

import argparse
import dataclasses

from .command import Command, Result
from .output import console, estimate, note, number, table

_DESCRIPTION = """\
Compute every metric, plot and ranked rationale of stored samples, without a model, and write them as
one HTML file that fetches nothing. Several stores are compared with the first, on the same problems.
A store is a folder of `vlm-reason sample` or `import`, or the output folder of a suite."""

_EPILOG = """\
examples:
  vlm-reason report runs/base/samples -o report.html
  vlm-reason report runs/base/samples runs/trained/samples -o report.html
  vlm-reason report runs/gsm8k --ood runs/hard --target-risk 0.1
  vlm-reason report runs/math --method best_of_n_reward --json > report.json"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stores", metavar="STORE", nargs="+", help="folder of samples; the first is the baseline"
    )
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument(
        "--ood",
        metavar="STORE",
        action="append",
        default=[],
        help="the same model's samples of problems out of distribution; one for each system",
    )
    parser.add_argument("--title", metavar="TEXT", help="default: the names of the stores")
    parser.add_argument(
        "--method", metavar="NAME", default="majority", help="how rationales are ranked (default: majority)"
    )
    parser.add_argument(
        "--items",
        metavar="N",
        type=int,
        default=200,
        help="problems shown with their rationales (default: 200)",
    )
    parser.add_argument(
        "--target-risk",
        metavar="R",
        type=float,
        default=0.05,
        help="marked in the plot of risk (default: 0.05)",
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="to show tokens, where the store does not name its model"
    )


def _run(options: argparse.Namespace) -> Result:
    from ..evaluation.report import ReportConfig, build, write

    config = ReportConfig(
        options.title, options.method, options.items, options.target_risk, options.tokenizer
    )
    say = (lambda stage: None) if options.quiet else (lambda stage: note(f"report: {stage}"))
    built = build(options.stores, options.ood, config, say)
    written = write(built, options.output, say)
    return {**dataclasses.asdict(written), **built.report.to_json()}


def _show(result: Result) -> None:
    out = console()
    for task in result["tasks"]:
        names = [system["name"] for system in result["systems"]]
        rows = [
            (
                f"{row['label']}{_of(row, names)}",
                estimate(row["estimate"]),
                str(row["estimate"]["n"]),
                *_difference(row, names),
            )
            for row in task["rows"]
        ]
        columns = ("", "value [95%]", "n", *((f"minus {names[0]}", "p") if len(names) > 1 else ()))
        out.print(table(task["name"], columns, rows))
    for warning in sorted(result["warnings"], key=lambda w: w["level"] != "caution"):
        note(f"{warning['level']}: {warning['text']}")
    rest = f", the rest of the problems {result['rest']}" if result["rest"] else ""
    out.print(
        f"written {result['path']} ({result['bytes'] / 1e6:.1f} MB){rest}", soft_wrap=True, markup=False
    )


def _of(row: Result, names: list[str]) -> str:
    return f" · {names[row['system']]}" if len(names) > 1 else ""


def _difference(row: Result, names: list[str]) -> tuple[str, ...]:
    if len(names) == 1:
        return ()
    difference = row["difference"]
    return (estimate(difference, "+.3f"), number(difference["p"])) if difference else ("-", "-")


COMMAND = Command(
    name="report",
    help="everything stored samples say, as one HTML file",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="nothing was written",
    takes_config=False,
)
