"""Which axes of variational reasoning matter on the quickstart task? Each row: train, then greedy accuracy, held out.

    python evals/quickstart_ablation.py --quickstart runs/quickstart             rows of a finished quickstart
    python evals/quickstart_ablation.py --seeds 0 1 --only vr rft vr_no_gate     more seeds, other axes

All rows of a seed spend the tokens (generated + trained) that its `vr` spent, on the same problems and the same
held-out set; only the named options differ (and the rounds, high enough for the tokens to decide). Finished rows are
read back, so rows can be added one at a time. Writes evals/results/quickstart_ablation.json after every row.

With several seeds a `pooled` row follows: a problem's score is its mean over the seeds, and differences are paired on
problems. Its interval says how far the held-out problems bear it out; `per_seed` shows what another run would change.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import quickstart

from vlm_reason.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, tuple[str, list[str], str]] = {
    "vr": (
        "quickstart.yaml",
        [],
        "prior + hinted mixture, gate on the least likely token at -2 nats, no wake",
    ),
    "rft": ("quickstart_rft.yaml", [], "no hints: rejection sampling from the current model"),
    "vr_wake": (
        "quickstart.yaml",
        ["options.min_token=-3", "options.wake=same", "trainer.rounds=3"],
        "gate at -3 nats, the hinted prompt trained too: learns one-step leaks on some seeds",
    ),
    "vr_tight_wake": (
        "quickstart.yaml",
        ["options.wake=same", "trainer.rounds=5"],
        "as vr, and the hinted prompt trained",
    ),
    "vr_no_gate": ("quickstart.yaml", ["options.min_token=null"], "without the gate"),
    "vr_joint_gate": (
        "quickstart.yaml",
        ["options.min_token=null", "options.min_joint=-6"],
        "the gate on log p(z, y*|x), at -6 nats",
    ),
    "vr_full_ratio": (
        "quickstart.yaml",
        ["options.min_token=null", "options.ratio=none", "options.min_weight=0.02"],
        "the unbiased importance weight alone, groups below 0.02 left out",
    ),
    "vr_gate_full_ratio": ("quickstart.yaml", ["options.ratio=none"], "gate and the full ratio"),
    "vr_per_token": (
        "quickstart.yaml",
        ["options.min_token=null", "options.ratio=per_token", "options.proposal=hinted"],
        "hinted traces only, length-normalised ratio (the paper's)",
    ),
    "vr_posterior": (
        "quickstart.yaml",
        ["options.partner=posterior", "options.wake=same"],
        "a separate posterior adapter",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument(
        "--quickstart", type=Path, help="take base, vr, rft and sft from this quickstart folder, and stop"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--problems",
        type=int,
        default=1000,
        help="drawn for evaluation, before those of training are left out",
    )
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.quickstart is not None:
        _write(_from_quickstart(arguments.quickstart), arguments.output)
        return 0
    stages = quickstart.Stages(arguments.output / "stages")
    shots = quickstart.MEASURED["base_shots"]
    base = _evaluate(stages, arguments.output, "base", 0, shots, arguments.problems)
    rows = [{"name": "base", "what": f"{shots} worked examples in the prompt", **_row(base)}]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        budget = _train(stages, arguments.output, "vr", seed, None)["tokens_used"]
        for name in arguments.only:
            trained = _train(stages, arguments.output, name, seed, None if name == "vr" else budget)
            result = _evaluate(stages, arguments.output, name, seed, 0, arguments.problems)
            results.setdefault(name, []).append(result)
            rows.append(
                {
                    "name": name,
                    "what": VARIANTS[name][2],
                    "seed": seed,
                    "tokens_used": trained["tokens_used"],
                    **_row(result),
                    "minus_base": _difference(result, base),
                    "minus_rft": _against(stages, arguments.output, "rft", seed, result),
                }
            )
            _write(rows + _pooled(results, base), arguments.output)
    return 0


def _pooled(results: dict[str, list[dict[str, Any]]], base: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a variant that has been run with several seeds."""
    means = {name: _mean_per_problem(runs) for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        if len(runs) < 2:
            continue
        reference = {"per_problem": means["rft"]} if len(results.get("rft", [])) == len(runs) else None
        own = {"per_problem": means[name]}
        rows.append(
            {
                "name": f"{name} pooled",
                "what": VARIANTS[name][2],
                "seeds": len(runs),
                "value": sum(means[name].values()) / len(means[name]),
                "per_seed": [run["accuracy"]["value"] for run in runs],
                "problems": len(means[name]),
                "minus_base": _difference(own, base),
                "minus_rft": None if reference is None or name == "rft" else _difference(own, reference),
            }
        )
    return rows


def _mean_per_problem(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(run["per_problem"][key] for run in runs) / len(runs) for key in runs[0]["per_problem"]}


def _from_quickstart(folder: Path) -> list[dict[str, Any]]:
    """The rows that a quickstart has already paid for."""

    def stage(name: str) -> dict[str, Any]:
        return json.loads((folder / "stages" / f"{name}.json").read_text())["result"]

    results = {name: stage(f"eval_{name}")["eval"] for name in ("base", "vr", "rft", "sft")}
    rows = [{"name": "base", "what": "worked examples in the prompt", **_row(results["base"])}]
    for name in ("vr", "rft", "sft"):
        rows.append(
            {
                "name": name,
                "what": VARIANTS[name][2]
                if name in VARIANTS
                else "answers alone, no trace; the problems of vr",
                "seed": 0,
                "tokens_used": stage(f"train_{name}")["tokens_used"],
                **_row(results[name]),
                "minus_base": _difference(results[name], results["base"]),
                "minus_rft": None if name == "rft" else _difference(results[name], results["rft"]),
            }
        )
    return rows


def _config(output: Path, name: str, seed: int, budget: int | None) -> Any:
    recipe, options, _ = VARIANTS["vr" if name == "base" else name]
    spent = [] if budget is None else [f"trainer.token_budget={budget}"]
    return quickstart.config_of(recipe, output / f"{name}_{seed}", [*options, f"seed={seed}", *spent])


def _train(stages: Any, output: Path, name: str, seed: int, budget: int | None) -> dict[str, Any]:
    from vlm_reason.config import to_dict
    from vlm_reason.traces.run import run_training

    config = _config(output, name, seed, budget)
    return stages.run(f"train_{name}_{seed}", to_dict(config), lambda: run_training(config))


def _evaluate(stages: Any, output: Path, name: str, seed: int, shots: int, problems: int) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        config = _config(output, name, seed, None)
        config.eval_task["size"] = problems
        adapters = None if name == "base" else Path(config.output_dir) / "adapters"
        return quickstart.Held(config, adapters, shots).accuracy(f"{name} {seed}")

    return stages.run(f"eval_{name}_{seed}", [name, seed, shots, problems], work)


def _row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "value": result["accuracy"]["value"],
        "interval": result["accuracy"]["ci"],
        "problems": result["problems"],
        "unparsed": result["unparsed"]["value"],
        "truncated": result["truncated"]["value"],
        "trace_tokens": result["trace_length"]["value"],
    }


def _difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    from vlm_reason.stats import paired_difference

    paired = paired_difference(a["per_problem"], b["per_problem"])
    return {
        "value": paired.value,
        "interval": list(paired.ci),
        "p": paired.p,
        "wins": paired.wins,
        "losses": paired.losses,
    }


def _against(
    stages: Any, output: Path, other: str, seed: int, result: dict[str, Any]
) -> dict[str, Any] | None:
    path = stages.folder / f"eval_{other}_{seed}.json"
    return _difference(result, json.loads(path.read_text())["result"]) if path.is_file() else None


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    body = {
        "schema": 1,
        "suite": "quickstart_ablation",
        "metric": "accuracy, greedy, held out; 95% intervals, differences paired on problems",
        "config": {name: {"recipe": f, "overrides": o} for name, (f, o, _) in VARIANTS.items()},
        "commit": commit.stdout.strip() or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    for path in (
        output / "quickstart_ablation.json",
        ROOT / "evals" / "results" / "quickstart_ablation.json",
    ):
        write_atomically(path, json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
