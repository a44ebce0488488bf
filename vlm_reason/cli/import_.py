"""vlm-reason import: samples that another program drew, into a sample store."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from .command import Command, Result
from .output import console, table

FORMATS = ("lm-eval", "recorded")
COUNTS = ("problems", "samples", "new", "unparsed", "failed")

_DESCRIPTION = """\
Take recorded samples into the store in the folder STORE, so that every metric, ranking and report can
be computed from them without a model. lm-eval: the samples_*.jsonl that --log_samples writes.
recorded: one problem a line, {id, question, answer, samples: [{text, pred, correct, reward}]}.
A file is checked as a whole first: a line that cannot be read, or another sample where one is
already, and nothing of it is added. The same file again adds nothing; a call that was stopped is finished
by repeating it. An answer that cannot be read is wrong, whatever the file says, and counted."""

_EPILOG = """\
examples:
  vlm-reason import samples_arc_easy_2026-01-01T00-00-00.jsonl -o runs/arc
  vlm-reason import samples_gsm8k_2026-01-01T00-00-00.jsonl -o runs/gsm8k --filter strict-match
  vlm-reason import results/my-model/samples_mmlu_*.jsonl -o runs/mmlu --system my-model
  vlm-reason import math.jsonl -o runs/math --system qwen-7b
  vlm-reason import member0.jsonl -o runs/posterior --system mine --member 0"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="JSON lines; several belong to one --system")
    parser.add_argument("-o", "--output", metavar="STORE", required=True, help="folder of the sample store")
    parser.add_argument("--format", choices=FORMATS, help="default: told from the first line")
    parser.add_argument(
        "--system",
        metavar="NAME",
        help="name of the model that drew them; default: the file's name and a hash of its content",
    )
    parser.add_argument("--member", type=int, metavar="M", help="number of the draw of a weight posterior")
    parser.add_argument("--filter", metavar="NAME", help="lm-eval: which filter, where the file has several")
    parser.add_argument(
        "--metric", metavar="NAME", help="lm-eval: which metric is the verdict (default exact_match, acc)"
    )


def _run(options: argparse.Namespace) -> Result:
    from ..errors import UserError
    from ..store import SampleStore
    from ..store.importers import Reading, import_samples
    from ..tasks.answers import canonical, extract_answer

    if options.member is not None and options.member < 0:
        raise UserError(f"--member must be >= 0, got {options.member}")
    reading = Reading(
        extract=lambda text: extract_answer(text, "math") or extract_answer(text, "number"),
        canonical=lambda answer: canonical(answer, "math"),
    )
    imported = []
    with SampleStore(options.output) as store:
        for file in options.files:
            done = import_samples(
                file,
                store,
                reading,
                format=options.format,
                system=options.system,
                member=options.member,
                filter=options.filter,
                metric=options.metric,
                progress=iter if options.quiet else _bar,
            )
            imported.append({"file": file, **dataclasses.asdict(done)})
    totals = {name: sum(one[name] for one in imported) for name in COUNTS}
    return {"store": options.output, **totals, "files": imported}


def _bar(lines: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(lines, desc="import", unit=" lines")


def _show(result: Result) -> None:
    rows = [
        (one["file"], one["system"], one["format"], *(str(one[name]) for name in COUNTS))
        for one in result["files"]
    ]
    heads = ("file", "system", "format", *COUNTS)
    console().print(table(f"samples in {result['store']}", heads, rows))
    if result["unparsed"] or result["failed"]:
        console().print("unparsed: no readable answer; failed: no verdict or no number. Both count as wrong.")


COMMAND = Command(
    name="import",
    help="recorded samples, of lm-eval or plain JSON lines, into a sample store",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="what was imported so far is kept; the same command goes on",
    takes_config=False,
)
