"""vlm-reason select: which problems to label next; or, with --risk, when to answer and when to abstain."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..errors import UserError
from .command import Command, Result
from .output import console, estimate, note, number, table, to_json

if TYPE_CHECKING:
    from ..evaluation.beliefs import Belief
    from ..store import SampleRecord

SHOWN = 12

_DESCRIPTION = """\
From stored samples, without a model:

--by WAY      the --size problems to label next. bald: where the members of a posterior disagree,
              jointly over the batch; entropy, least_confidence: where the answers are uncertain;
              random: the baseline
--risk R      answer or abstain: a confidence threshold chosen on the store --calibrate so that at
              most a share R of the answered problems is wrong, applied to STORE
--alpha A     with --calibrate: conformal sets of answers that hold the right one with probability
              at least 1 - A, as far as it was sampled at all
--ood OTHER   do the uncertainties tell the problems of OTHER from those of STORE?

The threshold is certified: with probability 1 - delta over calibration sets, the risk on new problems
of the same kind is at most R. --plug-in takes the largest coverage that looked good instead, which
promises nothing."""

_EPILOG = """\
examples:
  vlm-reason select runs/eval/bayes/gsm8k/samples --by bald --size 32 -o label.jsonl
  vlm-reason select test/samples --calibrate dev/samples --risk 0.1
  vlm-reason select test/samples --calibrate dev/samples --alpha 0.1 --ood other/samples --json"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="STORE", help="folder of samples")
    parser.add_argument(
        "--by",
        choices=("bald", "entropy", "least_confidence", "random"),
        help="choose problems to label: by disagreement of members, by uncertainty, or at random",
    )
    parser.add_argument("--size", type=int, default=32, metavar="N", help="how many problems (default 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --by random (default 0)")
    parser.add_argument("--calibrate", metavar="STORE", help="samples of other problems of the same kind")
    parser.add_argument(
        "--risk", type=float, metavar="R", help="largest share of wrong answers among those given"
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=0.05,
        metavar="D",
        help="chance that the certificate fails (default 0.05)",
    )
    parser.add_argument("--plug-in", action="store_true", help="--risk without a guarantee")
    parser.add_argument("--alpha", type=float, metavar="A", help="conformal answer sets at level 1 - A")
    parser.add_argument("--ood", metavar="STORE", help="samples of problems of another kind")
    parser.add_argument(
        "--rank",
        default="majority",
        metavar="METHOD",
        help="what makes a posterior of the samples (default: majority)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the chosen problems as JSON lines")


def _run(options: argparse.Namespace) -> Result:
    _check(options)
    records, believed = _read(options.samples, options.rank)
    result: Result = {"store": options.samples, "rank": options.rank, "problems": len(believed)}
    if options.by:
        result["chosen"] = _acquire(options, records, believed)
    if options.calibrate:
        calibration = _read(options.calibrate, options.rank)
        _warn_same(calibration[1], believed)
        result["calibration_store"] = options.calibrate
        if options.risk is not None:
            result["selective"] = _selective(options, calibration[1], believed)
        if options.alpha is not None:
            result["conformal"] = _conformal(options.alpha, calibration[0], records)
    if options.ood:
        from ..evaluation.selective import ood_scores

        outside = _read(options.ood, options.rank)[1]
        scores = ood_scores(list(believed.values()), list(outside.values()))
        result["ood"] = {
            "store": options.ood,
            "positive": "outside",
            "problems": len(outside),
            "scores": {name: {k: e.to_json() for k, e in s.items()} for name, s in scores.items()},
        }
    return result


def _check(options: argparse.Namespace) -> None:
    calibrated = options.risk is not None or options.alpha is not None
    if options.calibrate and not calibrated:
        raise UserError("--calibrate needs --risk or --alpha")
    if not (options.by or calibrated or options.ood):
        raise UserError(
            "say what to select: --by (problems to label), --risk or --alpha (with --calibrate), or --ood"
        )
    if calibrated and not options.calibrate:
        raise UserError(
            "--risk and --alpha need --calibrate STORE: a threshold chosen on the very problems it is used on "
            "promises nothing"
        )
    if options.output and not options.by:
        raise UserError("-o writes the problems that --by chose; give --by")
    if options.output and Path(options.output).is_dir():
        raise UserError(
            f"-o {options.output!r} is a folder; give a file such as {options.output}/label.jsonl"
        )
    if options.plug_in and options.risk is None:
        raise UserError("--plug-in is a way to choose the threshold of --risk; give --risk")
    if not 0 < options.delta < 1:
        raise UserError(f"--delta must be in (0, 1), got {options.delta}")
    if options.alpha is not None and not 0 < options.alpha < 1:
        raise UserError(f"--alpha must be in (0, 1), got {options.alpha}")


def _read(folder: str, method: str) -> tuple[list[SampleRecord], dict[str, Belief]]:
    from ..errors import nearest
    from ..evaluation.beliefs import beliefs
    from ..ranking import METHODS
    from ..store import SampleStore

    if method not in METHODS:
        raise UserError(f"unknown ranking method {method!r}{nearest(method, METHODS)}")
    records = list(SampleStore.open(folder).records())
    return records, beliefs(records, method)


def _warn_same(calibration: Mapping[str, Belief], believed: Mapping[str, Belief]) -> None:
    both = len(calibration.keys() & believed.keys())
    if both:
        note(
            f"{both} problem ids are in both stores: if they are the same problems, nothing is promised for them"
        )


def _acquire(
    options: argparse.Namespace, records: list[SampleRecord], believed: Mapping[str, Belief]
) -> dict[str, Any]:
    from ..evaluation.acquiring import acquire

    first = {r.problem_id: r for r in reversed(records)}
    picked = acquire(believed, options.by, options.size, options.seed)
    chosen = [
        {"id": a.problem_id, "question": first[a.problem_id].question, "score": a.score} for a in picked
    ]
    if options.output:
        write_atomically(Path(options.output), "".join(to_json(row) + "\n" for row in chosen))
    return {"by": options.by, "problems": chosen, "file": options.output}


def _selective(
    options: argparse.Namespace, calibration: Mapping[str, Belief], believed: Mapping[str, Belief]
) -> dict[str, Any]:
    from ..evaluation.selective import apply_threshold, choose_threshold

    chosen = choose_threshold(
        *_pairs(calibration), options.risk, options.delta, "plug-in" if options.plug_in else "certified"
    )
    return {**chosen.to_json(), "test": apply_threshold(chosen, *_pairs(believed)).to_json()}


def _pairs(believed: Mapping[str, Belief]) -> tuple[list[float], list[float]]:
    return [b.confidence for b in believed.values()], [float(b.right) for b in believed.values()]


def _conformal(alpha: float, calibration: list[SampleRecord], records: list[SampleRecord]) -> dict[str, Any]:
    from ..evaluation.conformal_store import conformal_of_records

    return conformal_of_records(calibration, records, alpha)


def _show(result: Result) -> None:
    out = console()
    if chosen := result.get("chosen"):
        rows = [
            (p["id"], number(p["score"]), " ".join(p["question"].split())[-60:])
            for p in chosen["problems"][:SHOWN]
        ]
        out.print(table("to label next", ("problem", "score", "question"), rows))
        what = f"{len(chosen['problems'])} of {result['problems']} problems to label, by {chosen['by']}"
        out.print(what + (f", in {chosen['file']}" if chosen["file"] else ""), highlight=False)
    if s := result.get("selective"):
        out.print(table(f"answer or abstain at risk {s['risk_wanted']:g}", ("", "value"), _selective_rows(s)))
        out.print(_promise(s), highlight=False)
    if c := result.get("conformal"):
        names = ("coverage", "size", "singletons", "empty")
        shares = [(name, estimate(c[name])) for name in names]
        shares.append(("right answer sampled at all", estimate(c["sampled"])))
        out.print(table(f"conformal answer sets, alpha {c['alpha']:g}", ("", "value"), shares))
        for line in c["remarks"]:
            out.print(line, highlight=False)
    if o := result.get("ood"):
        rows = [
            (name, *(estimate(s[k]) for k in ("auroc", "aupr", "fpr_at_95")))
            for name, s in o["scores"].items()
        ]
        out.print(table("problems of another kind", ("score", "AUROC", "AUPR", "FPR at 95% TPR"), rows))
        out.print(f"positive: the {o['problems']} problems of {o['store']}", highlight=False)


def _selective_rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    c = s["calibration"]
    threshold = s["threshold"]
    never = threshold is None or math.isinf(threshold)
    return [
        ("answer when the confidence is at least", "never" if never else number(threshold)),
        ("calibration: answered", f"{c['answered']} of {c['problems']}"),
        ("calibration: wrong of these", f"{c['wrong']} ({number(c['risk'])}; bound {number(c['risk_bound'])})"),
        ("here: coverage", estimate(s["test"]["coverage"])),
        ("here: risk of what is answered", estimate(s["test"]["risk"])),
        ("here: risk if all were answered", estimate(s["test"]["risk_if_all"])),
    ]  # fmt: skip


def _promise(s: Mapping[str, Any]) -> str:
    if s["rule"] == "plug-in":
        return "no guarantee: the threshold is the best-looking one; its risk on new problems may be above the target"
    if not s["guaranteed"]:
        return "no threshold could be certified: calibrate on more problems, or allow more risk"
    return (
        f"guaranteed: risk at most {s['risk_wanted']:g} on new problems of the same kind, with probability "
        f"{1 - s['delta']:g} over calibration sets"
    )


COMMAND = Command(
    name="select",
    help="which problems to label next; when to answer and when to abstain",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="nothing was written",
    takes_config=False,
)
