"""The main job, end to end: train the built-in model with latent chains of thought, and see what it gained.

    bash scripts/quickstart.sh                 # sets up, then runs this
    python scripts/quickstart.py --output runs/quickstart

1. The base model at its best prompt (worked examples) on held-out problems.
2. `vr`: variational reasoning. Traces drawn with and without a hint, weighted by how well they explain the answer.
3. Two controls: `rft` (rejection sampling, no hints) at the tokens that `vr` generated and trained on, and `sft`
   (answers, no traces) on the problems that `vr` saw.
4. Every model on the same held-out problems, greedy, with paired differences; the bound on log p(y*|x) before and
   after; and rationales ranked by the answer they support.

Every stage leaves its result in OUTPUT/stages: started again, a finished stage is read back and an interrupted training
goes on from its last checkpoint. OUTPUT/summary.json has the figures, OUTPUT/result.png the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from vlm_reason.atomic import write_atomically
from vlm_reason.compat.deepspeed_log import keep_stdout_clean
from vlm_reason.config import RunConfig, from_dict, load_config, to_dict
from vlm_reason.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "recipes"
MEASURED = {
    "base_shots": 4,  # the base's best prompt: 0, 2 and 4 worked examples were tried
    "max_trace_tokens": 32,
    "max_answer_tokens": 8,
    "bound_traces": 8,
    "bound_problems": 40,
    "rank_traces": 8,
    "rank_problems": 40,
    "seed": 17,
}
CONTROLS = {"rft": "quickstart_rft.yaml", "sft": "quickstart_sft.yaml"}
console = Console(stderr=True, highlight=False)


class Stages:
    """Results on disk, one JSON a stage, keyed by what went into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, inputs: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = hashlib.blake2b(
            json.dumps(inputs, sort_keys=True, default=str).encode(), digest_size=8
        ).hexdigest()
        path = self.folder / f"{name}.json"
        if path.is_file() and (stored := json.loads(path.read_text())).get("key") == key:
            console.print(f"[dim]{name}: done before[/dim]")
            return stored["result"]
        console.rule(f"[bold]{name}")
        started = time.perf_counter()
        result = work()
        body = {"key": key, "seconds": time.perf_counter() - started, "result": result}
        write_atomically(path, json.dumps(body, indent=1))
        return result

    def seconds(self) -> dict[str, float]:
        return {
            path.stem: json.loads(path.read_text())["seconds"] for path in sorted(self.folder.glob("*.json"))
        }


class Remembering:
    """An engine that answers a request it has seen from memory: a sample is a function of its request and the weights,
    and the bound and the ranking ask for the same traces."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seen = engine, {}

    def sample(self, requests: Any, progress: str | None = None) -> list[Any]:
        new = [r for r in dict.fromkeys(requests) if r not in self.seen]
        self.seen |= dict(zip(new, self.engine.sample(new, progress) if new else [], strict=True))
        return [self.seen[r] for r in requests]

    def score(self, requests: Any, progress: str | None = None) -> list[tuple[float, ...]]:
        return self.engine.score(requests, progress)


class Held:
    """A model on the held-out problems: accuracy (greedy), the bound, and ranked rationales."""

    def __init__(self, config: RunConfig, adapters: Path | None, shots: int) -> None:
        from vlm_reason.engines.make import make_engine
        from vlm_reason.evaluation import make_judge
        from vlm_reason.models.adapters import add_adapters, load_adapters
        from vlm_reason.models.load import load_model
        from vlm_reason.tasks.prompts import PromptBuilder
        from vlm_reason.tasks.resolve import resolve_template
        from vlm_reason.tasks.sources import TaskSpec, held_out, load_problems
        from vlm_reason.traces.run import adapter_config, resolve_verifier

        model, tokenizer = load_model(config.model, dtype=config.dtype)
        if adapters is not None:
            model = add_adapters(model, adapter_config(config), names=("reasoner",))
            load_adapters(model, adapters, names=("reasoner",))
        self.adapter = "reasoner" if adapters is not None else None
        self.engine = Remembering(make_engine(model, tokenizer, config.engine))
        self.prompts = PromptBuilder(tokenizer, resolve_template(config.template), shots=shots)
        spec = from_dict(TaskSpec, config.eval_task, "eval_task")
        self.problems = held_out(load_problems(spec), load_problems(from_dict(TaskSpec, config.task, "task")))
        self.judge = make_judge(resolve_verifier(config.verifier, spec), self.prompts)

    def accuracy(self, label: str) -> dict[str, Any]:
        from vlm_reason.evaluation import EvalConfig, evaluate

        lengths = {k: MEASURED[k] for k in ("max_trace_tokens", "max_answer_tokens")}
        config = EvalConfig(adapter=self.adapter, **lengths)
        result = evaluate(
            self.engine, self.prompts, self.problems, self.judge, config, progress=f"{label}: greedy"
        )
        return {**result.to_json(), "per_problem": dict(result.per_problem)}

    def bound(self, label: str) -> dict[str, Any]:
        from vlm_reason.evaluation import BoundConfig, bound

        config = BoundConfig(
            MEASURED["bound_traces"],
            MEASURED["max_trace_tokens"],
            self.adapter,
            MEASURED["seed"],
        )
        problems = self.problems[: MEASURED["bound_problems"]]
        return bound(self.engine, self.prompts, problems, config, progress=f"{label}: bound").to_json()

    def ranking(self, label: str) -> dict[str, Any]:
        """K sampled rationales a problem; accuracy of the top-ranked answer, and one problem spelled out."""
        from vlm_reason.engines.base import Law
        from vlm_reason.evaluation import EvalConfig, answer_kind, draw
        from vlm_reason.ranking import candidates_from_records, rank
        from vlm_reason.ranking.scores import score_matrices
        from vlm_reason.store import Provenance
        from vlm_reason.tasks.answers import canonical

        problems = self.problems[: MEASURED["rank_problems"]]
        config = EvalConfig(
            MEASURED["rank_traces"], 1, 1.0, 1.0, MEASURED["max_trace_tokens"],
            MEASURED["max_answer_tokens"], self.adapter, MEASURED["seed"],
        )  # fmt: skip
        provenance = Provenance("quickstart", "quickstart", 1.0, 1.0)
        records = draw(
            self.engine, self.prompts, problems, self.judge, config, provenance, f"{label}: rationales"
        )
        right: dict[str, list[bool]] = {"majority": [], "mixture": []}
        example: dict[str, Any] = {}
        groups = {p.id: [r for r in records if r.problem_id == p.id] for p in problems}
        matrices = score_matrices(self.engine, self.prompts.cue_ids, groups, Law(self.adapter))
        for problem in problems:
            own = groups[problem.id]
            candidates = replace(candidates_from_records(own), logp_answer=matrices[problem.id])
            gold = canonical(problem.answer, answer_kind(problem))
            for method in right:
                ranking = rank(candidates, method)
                right[method].append(ranking.answer == gold)
                if (
                    method == "mixture"
                    and not example
                    and ranking.answer == gold
                    and len(set(candidates.classes)) > 1
                ):
                    example = _spelled_out(problem, own, ranking)
        single = [bool(r.correct) for r in records]
        return {
            "problems": len(problems),
            "traces": config.traces,
            "one_sample": sum(single) / len(single),
            **{method: sum(values) / len(values) for method, values in right.items()},
            "example": example,
        }


def _spelled_out(problem: Any, records: list[Any], ranking: Any) -> dict[str, Any]:
    best = zip(ranking.rationale_posterior, ranking.rationales, strict=True)
    return {
        "question": problem.question,
        "answer": problem.answer,
        "answers": list(zip(ranking.classes, ranking.posterior, strict=True))[:4],
        "rationales": [
            [weight, records[n].trace_text.strip(), records[n].answer_text.strip()]
            for weight, n in list(best)[:4]
        ],
    }


def run(output: Path, overrides: list[str]) -> dict[str, Any]:
    from vlm_reason.stats import paired_difference
    from vlm_reason.traces.run import run_training

    started = time.perf_counter()
    stages = Stages(output / "stages")
    main = config_of("quickstart.yaml", output / "vr", overrides)
    base_shots = MEASURED["base_shots"]

    def judged(name: str, config: RunConfig, trained: bool, shots: int, parts: str = "") -> dict[str, Any]:
        def work() -> dict[str, Any]:
            held = Held(config, Path(config.output_dir) / "adapters" if trained else None, shots)
            result = {"eval": held.accuracy(name)}
            if "bound" in parts:
                result["bound"] = held.bound(name)
            if "ranking" in parts:
                result["ranking"] = held.ranking(name)
            return result

        read = (
            "model",
            "dtype",
            "task",
            "eval_task",
            "template",
            "verifier",
        )  # all that the base depends on
        inputs = to_dict(config) if trained else {key: to_dict(config)[key] for key in read}
        return stages.run(f"eval_{name}", [inputs, MEASURED, shots, parts], work)

    results = {"base": judged("base", main, trained=False, shots=base_shots, parts="bound")}
    runs = {"vr": stages.run("train_vr", to_dict(main), lambda: run_training(main))}
    results["vr"] = judged("vr", main, trained=True, shots=main.shots, parts="bound ranking")
    budget = runs["vr"]["tokens_used"]
    for name, recipe in CONTROLS.items():
        spent = [f"trainer.token_budget={budget}"] if name == "rft" else []
        config = config_of(recipe, output / name, [*overrides, *spent])
        runs[name] = stages.run(f"train_{name}", to_dict(config), lambda config=config: run_training(config))
        results[name] = judged(name, config, trained=True, shots=config.shots)

    per_problem = {name: r["eval"]["per_problem"] for name, r in results.items()}
    against_base = {
        n: paired_difference(v, per_problem["base"]) for n, v in per_problem.items() if n != "base"
    }
    against_controls = {n: paired_difference(per_problem["vr"], per_problem[n]) for n in CONTROLS}
    gain = against_base["vr"]
    totals = runs["vr"]["totals"]
    spent = stages.seconds()
    phases = {
        "generate": _rate(totals, "tokens/generated", "seconds/generate"),
        "score": _rate(totals, "tokens/scored", "seconds/score"),
        "train": _rate(totals, "tokens/trained", "seconds/train"),
    }
    summary = {
        "base": _short(results["base"], shots=base_shots),
        "trained": _short(results["vr"], shots=main.shots),
        "gain": {"value": gain.value, "ci": list(gain.ci)},
        "bound": {
            "before": results["base"]["bound"]["iwae"]["value"],
            "after": results["vr"]["bound"]["iwae"]["value"],
            "k": MEASURED["bound_traces"],
        },
        "controls": {
            n: {
                **_short(results[n], shots=0),
                "gain": _difference(against_base[n]),
                "vr_minus_control": _difference(against_controls[n]),
            }
            for n in CONTROLS
        },
        "ranking": results["vr"]["ranking"],
        "tokens_used": {n: r["tokens_used"] for n, r in runs.items()},
        "tokens_per_second": phases,
        "seconds": spent,
        "wall_seconds": sum(spent.values()),
        "this_call_seconds": time.perf_counter() - started,
    }
    write_atomically(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    _plot(output, results, against_base)
    return summary


def config_of(name: str, output: Path, overrides: list[str]) -> RunConfig:
    return from_dict(RunConfig, load_config(RECIPES / name, [*overrides, f"output_dir={output}"]))


def _rate(totals: dict[str, float], tokens: str, seconds: str) -> float | None:
    return totals[tokens] / totals[seconds] if totals.get(seconds) else None


def _short(result: dict[str, Any], shots: int) -> dict[str, Any]:
    evaluated = result["eval"]
    short = {
        "accuracy": evaluated["accuracy"]["value"],
        "ci": evaluated["accuracy"]["ci"],
        "problems": evaluated["problems"],
        "shots": shots,
        "unparsed": evaluated["unparsed"]["value"],
        "truncated": evaluated["truncated"]["value"],
        "trace_tokens": evaluated["trace_length"]["value"],
        "eval_tokens_per_second": evaluated["tokens_per_second"],
    }
    if bound := result.get("bound"):
        short |= {
            "bound": bound["iwae"]["value"],
            "bound_ci": bound["iwae"]["ci"],
            "logp_traced": bound["logp_traced"]["value"],
            "logp_empty": bound["logp_empty"]["value"],
        }
    return short


def _difference(paired: Any) -> dict[str, Any]:
    return {"value": paired.value, "ci": list(paired.ci), "p": paired.p}


def _plot(output: Path, results: dict[str, Any], against_base: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "base": "base\n(few-shot)",
        "sft": "sft\n(no trace)",
        "rft": "rft\n(no hint)",
        "vr": "vr\n(variational)",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 4))
    values = [results[n]["eval"]["accuracy"]["value"] for n in names]
    low = [v - results[n]["eval"]["accuracy"]["ci"][0] for n, v in zip(names, values, strict=True)]
    high = [results[n]["eval"]["accuracy"]["ci"][1] - v for n, v in zip(names, values, strict=True)]
    colours = ["#9aa5b1", "#c2b280", "#6c8ebf", "#b85450"]
    left.bar(list(names.values()), values, yerr=[low, high], color=colours, capsize=4)
    left.set(ylabel="accuracy, greedy, held out", ylim=(0, None))
    for name, colour in (("rft", "#6c8ebf"), ("vr", "#b85450")):
        lines = (output / name / "metrics.jsonl").read_text().splitlines()
        rows = [r for r in map(json.loads, lines) if r.get("unhinted_accuracy") is not None]
        windows = {r["window"]: (r["step"], r["unhinted_accuracy"]) for r in reversed(rows)}
        points = sorted(windows.values())
        right.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=name)
    right.set(xlabel="optimiser step", ylabel="right answers among\nun-hinted training samples")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output / "result.png", dpi=150)
    plt.close(figure)


def show(summary: dict[str, Any], output: Path) -> None:
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(title="Held-out accuracy (greedy)", title_justify="left", box=None, pad_edge=False)
    for column in ("model", "shots", "acc", "95%", "gain", "95%", "unread", "cut", "len"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    rows = [("base", summary["base"], None), ("vr", summary["trained"], summary["gain"])]
    rows += [(name, c, c["gain"]) for name, c in summary["controls"].items()]
    for name, row, gain in rows:
        table.add_row(
            name,
            str(row["shots"]),
            f"{row['accuracy']:.3f}",
            _interval(row["ci"], ".2f"),
            f"{gain['value']:+.3f}" if gain else "",
            _interval(gain["ci"], "+.2f") if gain else "",
            f"{row['unparsed']:.3f}",
            f"{row['truncated']:.3f}",
            f"{row['trace_tokens']:.1f}",
        )
    out.print(table)
    for name, control in summary["controls"].items():
        d = control["vr_minus_control"]
        out.print(
            f"vr minus {name}, paired: {d['value']:+.3f} {_interval(d['ci'], '+.3f')}, p = {d['p']:.2g}"
        )
    b = summary["bound"]
    out.print(
        f"bound on log p(y*|x), IWAE with K = {b['k']}: {b['before']:.2f} before, {b['after']:.2f} after (nats)"
    )
    for name, row in (("before", summary["base"]), ("after", summary["trained"])):
        out.print(
            f"log p(y*|x,z) {name}: {row['logp_traced']:.2f} behind sampled traces, {row['logp_empty']:.2f} behind none"
        )
    r = summary["ranking"]
    out.print(
        f"{r['traces']} rationales a problem on {r['problems']} problems: one sample {r['one_sample']:.3f}, majority "
        f"{r['majority']:.3f}, mixture likelihood {r['mixture']:.3f}"
    )
    if example := r["example"]:
        out.print(f"\n[bold]{example['question']}[/bold]  (answer {example['answer']})", markup=True)
        for weight, text, answer in example["rationales"]:
            out.print(f"  {weight:5.2f}  {text}  -> {answer}", markup=False)
    rates = ", ".join(f"{k} {v:.0f}" for k, v in summary["tokens_per_second"].items() if v)
    out.print(
        f"\ntokens per second: {rates}; {summary['wall_seconds']:.0f} s in all; {output / 'result.png'}"
    )


def _interval(ci: list[float], form: str = ".3f") -> str:
    return f"[{ci[0]:{form}}, {ci[1]:{form}}]"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder of results (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of the table")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, as for vlm-reason train"
    )
    arguments = parser.parse_args()
    keep_stdout_clean()
    try:
        summary = run(arguments.output, arguments.overrides)
    except UserError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; start it again to go on from here", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps(summary))
    else:
        show(summary, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
