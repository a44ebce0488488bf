"""vlm-reason eval: a suite of tasks with one model or the members of a posterior; or, given a training recipe, its
held-out problems with the base model against the trained one."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..config import RunConfig, from_dict
from ..errors import UserError
from .command import Command, Result
from .output import console, to_json
from .sample import samples_folder
from .suite import (
    NOT_KEPT,
    failed,
    holds_suite,
    parse_requirements,
    run_suite_command,
    show_requirements,
    show_suite,
)
from .tables import difference_table, systems_table
from .weight_suite import holds_weight_suite, run_weight_suite_command, show_weight_suite
from .wiring import (
    SYSTEMS,
    System,
    add_problem_choice,
    add_system_choice,
    choose_records,
    load_section,
    read_config,
    sampling_config,
    serve,
    systems_in,
    task_judge,
    trained_folder,
)

if TYPE_CHECKING:
    from ..evaluation import BoundConfig, BoundResult, EvalConfig, EvalResult
    from ..types import Estimate

_DESCRIPTION = """\
Metrics with 95% intervals. A trace that was cut and an answer that cannot be read count as wrong and
are listed.

CONFIG is a suite (evals/suites/*.yaml): every task is drawn into OUTPUT_DIR/TASK/samples, each sample
once, with `model` or with every model in `members`; OUTPUT_DIR/result.json has the numbers. Stopped at
any moment, the same command goes on.

Or CONFIG compares posteriors over weights (`sets` and `methods`, evals/suites/bayes_lora.yaml).

Or CONFIG is a training recipe: its held-out problems. When OUTPUT_DIR holds a trained model, base and
trained are run with the same seeds and their difference is paired problem by problem. Writes
OUTPUT_DIR/eval/result.json."""

_EPILOG = """\
keys of a recipe (section `evaluation`): traces (1), answers (1), temperature (0 = greedy), top_p,
max_trace_tokens, max_answer_tokens, seed; bound_traces (0): K > 0 also measures the bound IWAE-K of
log p(y*|x)

examples:
  vlm-reason eval evals/suites/arithmetic.yaml model=Qwen/Qwen2.5-0.5B
  vlm-reason eval evals/suites/math_words.yaml data=DATA members=[runs/a/adapters/reasoner]
  vlm-reason eval suite.yaml budget.tokens=100000 --require "accuracy.low>=0.6" --audit
  vlm-reason eval evals/suites/bayes_lora.yaml data=DATA
  vlm-reason eval recipe.yaml
  vlm-reason eval recipe.yaml evaluation.traces=8 evaluation.temperature=1 evaluation.bound_traces=8
  vlm-reason eval recipe.yaml --from-store             from OUTPUT_DIR/samples, without a model
  vlm-reason eval recipe.yaml --require "trained:accuracy>=0.5" --json"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem_choice(parser)
    add_system_choice(parser, default="both, if something was trained")
    parser.add_argument(
        "--from-store", action="store_true", help="recipe: judge stored samples instead of drawing"
    )
    parser.add_argument("--store", help="recipe: folder of samples (default: OUTPUT_DIR/samples)")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="BOUND",
        help='exit with status 3 unless it holds: "accuracy>=0.6", "gsm8k:accuracy.low>=0.6"; may be repeated',
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="suite: score 32 stored samples again, each alone; status 3 if they differ",
    )
    parser.add_argument(
        "--audit-tolerance",
        type=float,
        metavar="NATS",
        help="largest difference of a token; default by dtype",
    )


def _run(options: argparse.Namespace) -> Result:
    if holds_suite(options):
        return run_suite_command(options)
    if holds_weight_suite(options):
        return run_weight_suite_command(options)
    if options.audit or options.audit_tolerance is not None:
        raise UserError("--audit is for suites, which keep their samples; this config is a training recipe")
    requirements = parse_requirements(options.require)
    config = read_config(options)
    if options.from_store or options.store:
        results, result = _from_store(options.store or str(samples_folder(config.output_dir)), options.system)
    else:
        results, result = _from_model(config, options)
    rows: dict[str, dict[str, Estimate]] = {name: r.rows() for name, r in results.items()}
    result["requirements"] = [o.to_json() for r in requirements for o in r.judge(rows)]
    path = Path(config.output_dir) / "eval" / "result.json"
    write_atomically(path, to_json(result, indent=1) + "\n")
    return {"file": str(path), **result}


def _from_model(config: RunConfig, options: argparse.Namespace) -> tuple[dict[System, EvalResult], Result]:
    from ..evaluation import bound, evaluate

    settings, bound_settings = _settings(config)
    problems = load_section(config, options.on)
    systems = (options.system,) if options.system else SYSTEMS if trained_folder(config) else SYSTEMS[:1]
    results: dict[System, EvalResult] = {}
    bounds: dict[System, BoundResult] = {}
    for system, served in serve(config, systems).items():
        progress = None if options.quiet else system
        mine = dataclasses.replace(settings, adapter=served.adapter)
        judge = task_judge(config, options.on, served.builder)
        results[system] = evaluate(served.engine, served.builder, problems, judge, mine, progress)
        if bound_settings is not None:
            at = dataclasses.replace(bound_settings, adapter=served.adapter)
            bounds[system] = bound(served.engine, served.builder, problems, at, progress)
    return results, {"source": "model", "on": options.on, **_report(results, bounds)}


def _settings(config: RunConfig) -> tuple[EvalConfig, BoundConfig | None]:
    from ..evaluation import BoundConfig

    section = dict(config.evaluation)
    traces = section.pop("bound_traces", 0)
    settings = sampling_config(dataclasses.replace(config, evaluation=section), "evaluation", {})
    if not traces:
        return settings, None
    measured = {"traces": traces, "max_trace_tokens": settings.max_trace_tokens, "seed": settings.seed}
    return settings, from_dict(BoundConfig, measured, "evaluation.bound_traces")


def _from_store(folder: str, system: System | None) -> tuple[dict[System, EvalResult], Result]:
    from ..evaluation import summarise
    from ..store import SampleStore

    records = list(SampleStore.open(folder).records())
    systems = (system,) if system else systems_in(records)
    results = {name: summarise(choose_records(records, name)) for name in systems}
    return results, {"source": folder, **_report(results, {})}


def _report(results: Mapping[System, EvalResult], bounds: Mapping[System, BoundResult]) -> dict[str, Any]:
    systems = {name: result.to_json() for name, result in results.items()}
    for name, measured in bounds.items():
        systems[name]["bound"] = measured.to_json()
    return {"systems": systems, "differences": _differences(results, bounds)}


def _differences(
    results: Mapping[System, EvalResult], bounds: Mapping[System, BoundResult]
) -> dict[str, Any]:
    """Trained minus base. The bound is compared where both are finite; `left_out` counts the other
    problems."""
    from ..evaluation import compare
    from ..stats import paired_difference

    if not {"base", "trained"} <= results.keys():
        return {}
    differences = {"accuracy": compare(results["trained"], results["base"]).to_json()}
    if {"base", "trained"} <= bounds.keys():
        before, after = bounds["base"].per_problem, bounds["trained"].per_problem
        both = [name for name in before if math.isfinite(before[name]) and math.isfinite(after[name])]
        paired = paired_difference({n: after[n] for n in both}, {n: before[n] for n in both})
        differences["bound"] = {**paired.to_json(), "left_out": len(before) - len(both)}
    return differences


def _show(result: Result) -> None:
    if result.get("kind") == "suite":
        return show_suite(result)
    if result.get("kind") == "weight_suite":
        return show_weight_suite(result)
    out = console()
    counts = {name: system["problems"] for name, system in result["systems"].items()}
    out.print(systems_table(f"{max(counts.values(), default=0)} problems, 95% intervals", result["systems"]))
    if result["differences"]:
        out.print(difference_table("trained minus base, paired by problem", result["differences"]))
    for name, system in result["systems"].items():
        if system["verifier_failures"]:
            out.print(
                f"{name}: the verifier failed on {system['verifier_failures']} answers (counted as wrong)"
            )
    show_requirements(out, result["requirements"])
    out.print(f"written to {result['file']}", highlight=False)


def _status(result: Result) -> int:
    return NOT_KEPT if failed(result) else 0


COMMAND = Command(
    name="eval",
    help="a suite of tasks, or a recipe's held-out problems, with intervals",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="the samples of a suite drawn so far are kept; the same command goes on",
    status=_status,
)
