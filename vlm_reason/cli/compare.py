"""vlm-reason compare: is one evaluation better than another, on the same problems?"""

from __future__ import annotations

import argparse

from .command import Command, Result
from .output import console, estimate, note, number, table

_DESCRIPTION = """\
Compare results of `vlm-reason eval SUITE`, or stores of samples, problem by problem: the first one
against each of the others. Every difference has a paired bootstrap interval, a p-value (exact McNemar
for 0/1 outcomes, sign flips otherwise), the same adjusted by Holm over all comparisons made here, and
the smallest difference that so many problems would have shown (power 0.8).

Results over other problems are refused, never silently compared."""

_EPILOG = """\
RESULT is a result.json, a folder that holds one, or a store of samples; STORE#base and STORE#trained
take one system of a store that holds both.

examples:
  vlm-reason compare runs/eval/base runs/eval/vr
  vlm-reason compare base.json a.json b.json --metric answer_accuracy --json
  vlm-reason compare runs/x/samples#base runs/x/samples#trained --common"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="RESULT", nargs="+", help="two or more; the first is the baseline")
    parser.add_argument(
        "--metric",
        choices=("accuracy", "answer_accuracy"),
        default="accuracy",
        help="of a sample (default), or of the answer that was ranked first",
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare the tasks and problems that all have, and say how many not",
    )


def _run(options: argparse.Namespace) -> Result:
    from ..evaluation.comparing import compare_outcomes, read_outcomes

    systems = [read_outcomes(source, options.metric) for source in options.results]
    compared = compare_outcomes(systems, options.common)
    for line in compared.left_out:
        note(f"left out: {line}")
    return {
        "metric": options.metric,
        "systems": list(compared.names),
        "left_out": list(compared.left_out),
        "rows": [
            {
                "task": task,
                "baseline": compared.names[0],
                "system": other,
                "baseline_mean": compared.means[task][0],
                "mean": compared.means[task][compared.names.index(other)],
                "difference": difference.to_json(),
            }
            for (task, other), difference in compared.differences.items()
        ],
    }


def _show(result: Result) -> None:
    rows = []
    for r in result["rows"]:
        d = r["difference"]
        holm = d["p_holm"]
        verdict = "-" if holm is None else "yes" if holm < 0.05 else "no"
        rows.append(
            (
                r["task"],
                r["system"],
                f"{number(r['baseline_mean'])} -> {number(r['mean'])}",
                estimate(d),
                number(d["p"], ".2g"),
                number(holm, ".2g"),
                "-"
                if "degenerate" in d["flags"]
                else number(d["mde"]),  # no spread was seen: nothing is known of it
                str(d["n"]),
                verdict,
            )
        )
    columns = (
        "task",
        "system",
        "mean",
        "difference",
        "p",
        "p (Holm)",
        "detectable",
        "problems",
        "p (Holm) < 0.05",
    )
    console().print(table(f"{result['metric']} against {result['systems'][0]}", columns, rows))


COMMAND = Command(
    name="compare",
    help="paired comparison of evaluations on the same problems",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="nothing was written",
    takes_config=False,
)
