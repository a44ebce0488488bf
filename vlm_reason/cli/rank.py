"""vlm-reason rank: order the stored answers and rationales of every problem."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..config import RunConfig
from ..errors import UserError, nearest
from .command import Command, Result
from .output import console, estimate, note, number, table, to_json
from .sample import samples_folder
from .wiring import SYSTEMS, System, add_system_choice, choose_records, read_config, serve, systems_in

if TYPE_CHECKING:
    from ..ranking import Candidates, Ranking
    from ..store import SampleRecord

NEEDS_MODEL = ("mixture",)
SHOWN = 12

_DESCRIPTION = """\
Rank the samples in OUTPUT_DIR/samples: for each problem a posterior over answers and one over
rationales. Writes OUTPUT_DIR/ranking/METHOD.json.

  majority        each rationale votes for its answer (self-consistency); needs no model
  weighted_vote   votes weighted by the mean token probability; needs no model
  best_of_n       the likeliest pair by log p(z, y | x); needs no model; favours short rationales
  best_of_n_mean  the same per token; needs no model
  mixture         average over rationales of p(y | x, z): every answer is scored behind every
                  rationale by the model that drew them (default)"""

_EPILOG = """\
examples:
  vlm-reason rank recipe.yaml
  vlm-reason rank recipe.yaml --method majority --json
  vlm-reason rank recipe.yaml --store runs/other/samples --system base"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="mixture", help="how to rank (default: mixture); see above")
    parser.add_argument("--store", help="folder of samples (default: OUTPUT_DIR/samples)")
    add_system_choice(parser)


def _run(options: argparse.Namespace) -> Result:
    config = read_config(options)
    from ..ranking import METHODS, candidates_from_records, rank
    from ..store import SampleStore

    if options.method not in METHODS:
        raise UserError(f"unknown ranking method {options.method!r}{nearest(options.method, METHODS)}")
    store = SampleStore.open(options.store or samples_folder(config.output_dir))
    records = list(store.records())
    system = options.system or (systems_in(records) or SYSTEMS)[-1]
    chosen = choose_records(records, system)
    groups: dict[str, list[SampleRecord]] = {}
    for record in chosen:
        groups.setdefault(record.problem_id, []).append(record)
    candidates = {name: candidates_from_records(group) for name, group in groups.items()}
    if options.method in NEEDS_MODEL:
        candidates = _score(config, system, groups, candidates, options.quiet)
    rankings = {name: rank(candidates[name], options.method) for name in groups}
    result = {
        "store": str(store.folder),
        "system": system,
        "weights": chosen[0].weights,
        **_summary(options.method, groups, rankings),
        "rankings": [_entry(groups[name], rankings[name]) for name in groups],
    }
    path = Path(config.output_dir) / "ranking" / f"{options.method}.json"
    write_atomically(path, to_json(result, indent=1) + "\n")
    return {"file": str(path), **result}


def _score(
    config: RunConfig,
    system: System,
    groups: dict[str, list[SampleRecord]],
    candidates: dict[str, Candidates],
    quiet: bool,
) -> dict[str, Candidates]:
    """Fill in logp_answer with the model that drew the samples."""
    from ..engines.base import Law
    from ..ranking import score_matrices

    served = serve(config, (system,))[system]
    sampled = next(iter(groups.values()))[0]
    if sampled.weights != served.weights:
        raise UserError(
            f"the samples were drawn from weights {sampled.weights}, the {system} model has {served.weights}: "
            "sample again, or rank by a method that needs no model (majority)"
        )
    if (sampled.temperature, sampled.top_p) != (1.0, 1.0):
        note(f"mixture assumes rationales drawn at temperature 1; these have {sampled.temperature}")
    progress = None if quiet else "score"
    matrices = score_matrices(served.engine, served.builder.cue_ids, groups, Law(served.adapter), progress)
    return {
        name: dataclasses.replace(candidates[name], logp_answer=matrix) for name, matrix in matrices.items()
    }


def _summary(
    method: str, groups: dict[str, list[SampleRecord]], rankings: dict[str, Ranking]
) -> dict[str, Any]:
    """Where a ranker fails: the right answer was sampled but not chosen (selection), or never sampled
    (coverage)."""
    from ..evaluation import summarise
    from ..stats import wilson

    chosen = [_is_right(groups[name], rankings[name].answer) for name in groups]
    sampled = [any(r.correct for r in records) for records in groups.values()]
    return {
        "method": method,
        "problems": len(groups),
        "accuracy": wilson(chosen).to_json(),
        "sample_accuracy": summarise([r for records in groups.values() for r in records]).accuracy.to_json(),
        "sampled": wilson(sampled).to_json(),
        "selection_failures": sum(s and not c for s, c in zip(sampled, chosen, strict=True)),
        "coverage_failures": sum(not s for s in sampled),
        "unanswered": sum(ranking.answer is None for ranking in rankings.values()),
    }


def _is_right(records: Sequence[SampleRecord], answer: str | None) -> bool:
    return answer is not None and any(r.correct for r in records if r.canonical == answer)


def _entry(records: Sequence[SampleRecord], ranking: Ranking) -> dict[str, Any]:
    first = records[0]
    return {
        "problem": first.problem_id,
        "question": first.question,
        "reference": first.reference,
        "right": _is_right(records, ranking.answer),
        "answer": ranking.answer,
        "answers": [
            {"answer": c, "posterior": p} for c, p in zip(ranking.classes, ranking.posterior, strict=True)
        ],
        "abstained": ranking.abstained,
        "rationales": [
            {
                "k": records[n].k,
                "m": records[n].m,
                "posterior": p,
                "answer": records[n].canonical,
                "right": records[n].correct,
                "text": records[n].trace_text,
                "key": records[n].key,
            }
            for n, p in zip(ranking.rationales, ranking.rationale_posterior, strict=True)
        ],
    }


def _show(result: Result) -> None:
    out = console()
    rows = [
        ("accuracy of the ranked answer", estimate(result["accuracy"])),
        ("accuracy of one sample", estimate(result["sample_accuracy"])),
        ("right answer among the samples", estimate(result["sampled"])),
        ("sampled but not chosen", str(result["selection_failures"])),
        ("never sampled", str(result["coverage_failures"])),
    ]
    title = f"{result['method']} on {result['problems']} problems, {result['system']} model"
    out.print(table(title, ("", "value"), rows))
    shown = result["rankings"][:SHOWN]
    entries = [
        (
            _tail(entry["question"]),
            _short(entry["reference"], 16),
            _short(entry["answer"] or "-", 16),
            number(entry["answers"][0]["posterior"] if entry["answers"] else None, ".2f"),
            "yes" if entry["right"] else "no",
            _short(entry["rationales"][0]["text"], 60),
        )
        for entry in shown
    ]
    title = f"the first {len(shown)} problems; all of them in {result['file']}"
    out.print(
        table(title, ("question", "reference", "answer", "P(answer)", "right", "best rationale"), entries)
    )


def _short(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _tail(text: str, width: int = 40) -> str:
    """Questions of a generator begin alike and differ at the end."""
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[1 - width :]


COMMAND = Command(
    name="rank",
    help="order the stored answers and rationales of each problem",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="nothing was written; the samples are untouched",
)
