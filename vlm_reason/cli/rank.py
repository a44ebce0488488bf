"""vlm-reason rank: order the stored answers and rationales of every problem."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..config import RunConfig
from ..errors import UserError
from .command import Command, Result
from .output import console, estimate, note, number, table, to_json
from .sample import samples_folder
from .wiring import SYSTEMS, System, add_system_choice, choose_records, read_config, serve, systems_in

if TYPE_CHECKING:
    from ..ranking import Candidates, MemberRanking, Ranked, Ranking
    from ..store import SampleRecord

    Groups = dict[str, list[SampleRecord]]
    Known = dict[str, list[Candidates]]

ALL = "all"
BASELINE = "majority"
SHOWN = 12
STORED_AS = {"steps": "step_rewards"}

_DESCRIPTION = """\
Rank the samples in OUTPUT_DIR/samples: for each problem a posterior over answers and one over
rationales, with standard errors. Writes OUTPUT_DIR/ranking/METHOD.json.

without a model
  majority          each rationale votes for its answer (self-consistency)
  weighted_vote     votes weighted by the stored reward, else by the mean token probability
  best_of_n         the likeliest pair by log p(z, y | x); favours short rationales
  best_of_n_mean    the same per token
  best_of_n_reward  the pair with the highest stored reward
  best_of_n_min, best_of_n_prod, best_of_n_last   by stored rewards of the steps
every answer scored behind every rationale, by the model that drew them
  mixture           average over rationales of p(y | x, z) (default)
  importance        the same, for rationales drawn at another temperature or with top-p
  elbo              by the lower bound on log p(y | x)
  bin_released, bin_eq9, bin_log_mean_exp   LaCoT's inference in its three readings

all                 every method that the samples allow, side by side, paired with majority"""

_EPILOG = """\
examples:
  vlm-reason rank recipe.yaml
  vlm-reason rank recipe.yaml --method all
  vlm-reason rank recipe.yaml --method majority --json
  vlm-reason rank recipe.yaml --store runs/other/samples --system base"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="mixture", help="how to rank (default: mixture); see above")
    parser.add_argument("--store", help="folder of samples (default: OUTPUT_DIR/samples)")
    add_system_choice(parser)


def _run(options: argparse.Namespace) -> Result:
    config = read_config(options)
    from ..ranking import METHODS, lacking, rank_members
    from ..ranking.methods import method_named
    from ..store import SampleStore

    methods = list(METHODS) if options.method == ALL else [options.method]
    if options.method != ALL:
        method_named(options.method)
    store = SampleStore.open(options.store or samples_folder(config.output_dir))
    groups, system = _choose(list(store.records()), options.system)
    known = _candidates(groups)
    known, unscored = _score(config, system, groups, known, methods, options.quiet)
    skipped: dict[str, str] = {}
    ranked: dict[str, Ranked] = {}
    rankings: dict[str, Mapping[str, Ranking | MemberRanking]] = {}
    for method in methods:
        missing = sorted(
            {STORED_AS.get(f, f) for own in known.values() for c in own for f in lacking(c, method)}
        )
        if missing and options.method == ALL:
            skipped[method] = unscored or f"the samples have no {', '.join(missing)}"
            continue
        if missing and unscored:
            raise UserError(f"{method} needs {', '.join(missing)}: {unscored}")
        rankings[method] = {
            name: rank_members(own, method) if len(own) > 1 else METHODS[method](own[0])
            for name, own in known.items()
        }
        ranked[method] = _compared(method, groups, rankings[method])
    result = {
        "store": str(store.folder),
        "system": system,
        "weights": next(iter(groups.values()))[0].weights,
        **(
            _side_by_side(groups, ranked, rankings, skipped)
            if options.method == ALL
            else _one(groups, ranked[options.method], rankings[options.method])
        ),
    }
    path = Path(config.output_dir) / "ranking" / f"{options.method}.json"
    write_atomically(path, to_json(result, indent=1) + "\n")
    return {"file": str(path), **result}


# ---- the samples -------------------------------------------------------------------------------------------


def _choose(records: Sequence[SampleRecord], system: System | None) -> tuple[Groups, str]:
    """The samples of one system by problem, and its name: of samples that no system of ours drew, their proposal."""
    there = {record.proposal for record in records}
    if system is None and not systems_in(records) and len(there) == 1:
        chosen, name = list(records), there.pop()
    else:
        name = system or (systems_in(records) or SYSTEMS)[-1]
        chosen = choose_records(records, name)
    groups: Groups = {}
    for record in chosen:
        groups.setdefault(record.problem_id, []).append(record)
    return groups, name


def _candidates(groups: Groups) -> Known:
    """The candidates of each problem, one entry a member of the posterior over weights."""
    from ..ranking import candidates_from_records, split_members

    return {
        name: [candidates_from_records(own) for own in split_members(records).values()]
        for name, records in groups.items()
    }


def _score(
    config: RunConfig, system: str, groups: Groups, known: Known, methods: Sequence[str], quiet: bool
) -> tuple[Known, str]:
    """Fill in what the methods need from the model that drew the samples; or why that cannot be done ("" when it was,
    or nobody needs it)."""
    from ..ranking import FROM_MODEL, lacking, score_candidates

    needed = {f for own in known.values() for c in own for m in methods for f in lacking(c, m)}
    if not needed & FROM_MODEL:
        return known, ""
    first = next(iter(groups.values()))[0]
    if not first.trace_ids:
        return known, "the samples are text without token ids, which no model can score"
    if any(record.member is not None for records in groups.values() for record in records):
        return (
            known,
            "the samples are of several members of a posterior over weights (vlm-reason eval ranks those)",
        )
    if system not in SYSTEMS:
        return known, f"the samples were drawn by {system!r}, not by a model of this config"
    from ..engines.base import Law

    served = serve(config, (system,))[system]
    if first.weights != served.weights:
        return known, (
            f"the samples were drawn from weights {first.weights}, the {system} model has {served.weights}: "
            "sample again, or rank by a method that needs no model (majority)"
        )
    if "mixture" in methods and (first.temperature, first.top_p) != (1.0, 1.0):
        note(
            f"mixture assumes rationales drawn at temperature 1 without top-p; these have {first.temperature} and "
            f"{first.top_p}: importance corrects for that"
        )
    progress = None if quiet else "score"
    scored = score_candidates(served.engine, served.builder.cue_ids, groups, Law(served.adapter), progress)
    return {name: [c] for name, c in scored.items()}, ""


# ---- the result --------------------------------------------------------------------------------------------


def _compared(method: str, groups: Groups, rankings: Mapping[str, Ranking | MemberRanking]) -> Ranked:
    from ..ranking import compare_outcomes

    return compare_outcomes(method, groups, rankings)


def _samples(groups: Groups) -> dict[str, Any]:
    from ..evaluation import summarise
    from ..stats import wilson

    records = [r for own in groups.values() for r in own]
    members = any(r.member is not None for r in records)
    return {
        "sample_accuracy": summarise(records, members=members).accuracy.to_json(),
        "sampled": wilson([any(r.correct for r in own) for own in groups.values()]).to_json(),
    }


def _warnings(groups: Groups, ranked: Ranked) -> list[str]:
    first = next(iter(groups.values()))[0]
    found = ranked.warnings()
    if ranked.method in ("importance", "elbo") and first.top_p < 1:
        found.append(
            f"{ranked.method}: rationales drawn with top_p {first.top_p} never reach what lies outside of it: "
            "the result is p restricted to it"
        )
    return found


def _one(groups: Groups, ranked: Ranked, rankings: Mapping[str, Ranking | MemberRanking]) -> dict[str, Any]:
    return {
        **ranked.to_json(),
        **_samples(groups),
        "warnings": _warnings(groups, ranked),
        "rankings": [_entry(groups[name], rankings[name], ranked.outcomes[name]) for name in groups],
    }


def _entry(records: Sequence[SampleRecord], ranking: Ranking | MemberRanking, found: str) -> dict[str, Any]:
    from ..ranking import Ranking, answers_json, split_members

    first = records[0]
    if isinstance(ranking, Ranking):
        singles, extra = (
            [(ranking, records)],
            {k: getattr(ranking, k) for k in ("abstained", "mass", "ess", "pareto_k")},
        )
        extra["flags"] = list(ranking.flags)
    else:
        singles = list(zip(ranking.members, split_members(records).values(), strict=True))
        extra = {"mutual_information": ranking.mutual_information, "plug_in": ranking.plug_in}
    return {
        "problem": first.problem_id,
        "question": first.question,
        "reference": first.reference,
        "right": found == "right",
        "outcome": found,
        "answer": ranking.answer,
        "answers": answers_json(ranking),
        **extra,
        "rationales": [r for single, own in singles for r in _rationales(single, own)],
    }


def _rationales(ranking: Ranking, records: Sequence[SampleRecord]) -> list[dict[str, Any]]:
    order = zip(ranking.rationales, ranking.rationale_posterior, ranking.rationale_se, strict=True)
    return [
        {
            "k": records[n].k,
            "m": records[n].m,
            "member": records[n].member,
            "posterior": p,
            "se": se,
            "answer": records[n].canonical,
            "right": records[n].correct,
            "text": records[n].trace_text,
            "key": records[n].key,
        }
        for n, p, se in order
    ]


def _side_by_side(
    groups: Groups,
    ranked: Mapping[str, Ranked],
    rankings: Mapping[str, Mapping[str, Ranking | MemberRanking]],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    base = ranked[BASELINE]
    return {
        "method": ALL,
        "problems": len(groups),
        **_samples(groups),
        "coverage_failures": base.to_json()["coverage_failures"],
        "methods": {
            name: {
                **found.to_json(),
                f"minus_{BASELINE}": None if name == BASELINE else found.minus(base).to_json(),
            }
            for name, found in ranked.items()
        },
        "skipped": dict(skipped),
        "warnings": [line for found in ranked.values() for line in _warnings(groups, found)],
        "answers": {
            name: {method: by_problem[name].answer for method, by_problem in rankings.items()}
            for name in groups
        },
    }


# ---- for people --------------------------------------------------------------------------------------------


def _show(result: Result) -> None:
    if result["method"] == ALL:
        _show_all(result)
    else:
        _show_one(result)
    for line in result["warnings"]:
        console().print(f"warning: {line}", highlight=False, markup=False)


def _show_all(result: Result) -> None:
    out = console()
    rows = []
    for name, found in result["methods"].items():
        difference = found[f"minus_{BASELINE}"]
        rows.append(
            (
                name,
                estimate(found["accuracy"]),
                estimate(difference, "+.3f"),
                number(difference["p"], ".2g") if difference else "-",
                str(found["selection_failures"]),
                number(found["ess"], ".1f"),
            )
        )
    columns = ("method", "accuracy", f"minus {BASELINE}", "p", "sampled, not chosen", "median ESS")
    title = f"{len(rows)} ways to rank {result['problems']} problems, {result['system']} model, 95% intervals"
    out.print(table(title, columns, rows))
    out.print(
        f"one sample: {estimate(result['sample_accuracy'])}; right answer among the samples: "
        f"{estimate(result['sampled'])}; never sampled: {result['coverage_failures']}",
        highlight=False,
    )
    for name, why in result["skipped"].items():
        out.print(f"left out: {name} ({why})", highlight=False, markup=False)
    out.print(f"written to {result['file']}", highlight=False)


def _show_one(result: Result) -> None:
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
            _first(entry["answers"]),
            "yes" if entry["right"] else entry["outcome"].replace("_", " "),
            _short(entry["rationales"][0]["text"], 60),
        )
        for entry in shown
    ]
    title = f"the first {len(shown)} problems; all of them in {result['file']}"
    columns = ("question", "reference", "answer", "P(answer) +- SE", "right", "best rationale")
    out.print(table(title, columns, entries))


def _first(answers: Sequence[Mapping[str, Any]]) -> str:
    if not answers:
        return "-"
    return f"{number(answers[0]['posterior'], '.2f')} +- {number(answers[0]['se'], '.2f')}"


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
