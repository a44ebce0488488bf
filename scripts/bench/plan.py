"""What `vlm-reason plan` predicts for this processor against the seconds of real training steps on it.

    python scripts/bench/plan.py                                     # about six minutes on 2 cores
    python scripts/bench/plan.py --write evals/results/plan_check.json

Each case is a short run of the trainer on the built-in model: the seconds of generation, scoring and training are those
of its metrics.jsonl. The plan gets this machine's own two-second measurement, taken before and after the run, and what
only the run can tell: mean lengths and the share of traces that were trained on. `value` is predicted over measured
seconds; nothing is fitted to the runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from command import bench_parser

from vlm_reason.config import RunConfig, from_dict
from vlm_reason.models.load import load_tokenizer
from vlm_reason.planning.cluster import Cluster
from vlm_reason.planning.hardware import Device, measure_cpu
from vlm_reason.planning.lengths import PromptLengths, measure_prompts
from vlm_reason.planning.model_size import model_size
from vlm_reason.planning.plan import Guess, Plan, make_plan, make_scenario
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.resolve import resolve_template
from vlm_reason.tasks.sources import TaskSpec, load_problems
from vlm_reason.traces.run import run_training

BAR = 0.5
KINDS = ("generate", "score", "train")
TASK = {
    "kind": "reasoning_gym", "name": "chain_sum", "size": 64, "seed": 0,
    "options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    groups: int
    traces: int
    cap: int
    shots: int
    dtype: str
    preset: str
    options: dict[str, Any]


MIXTURE = {"proposal": "mixture", "partner": "hinted", "ratio": "none", "evidence": "logp", "wake": "same"}
CASES = (
    Case("8x4_bf16", 8, 4, 32, 0, "bfloat16", "vr", MIXTURE),
    Case("16x8_4shots_bf16", 16, 8, 32, 4, "bfloat16", "vr", MIXTURE),
    Case("32x4_fp32", 32, 4, 64, 0, "float32", "vr", MIXTURE),
    Case("16x8_answers_fp32", 16, 8, 48, 2, "float32", "rloo", {}),
)


def config_of(case: Case, folder: str) -> RunConfig:
    trainer = {
        "prompts_per_window": case.groups, "prompts_per_step": case.groups // 2, "rounds": 2,
        "traces_per_prompt": case.traces, "max_trace_tokens": case.cap, "max_answer_tokens": 8,
        "learning_rate": 1e-5, "save_strategy": "no",
    }  # fmt: skip
    return from_dict(
        RunConfig,
        {
            "model": "smollm2-135m", "dtype": case.dtype, "task": TASK, "template": "arithmetic", "shots": case.shots,
            "verifier": "number", "preset": case.preset, "options": case.options, "trainer": trainer,
            "output_dir": folder,
        },
    )  # fmt: skip


def measured(folder: Path) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds by kind, rows of metrics.jsonl, and all traces, of the second window: the first one warms up."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["window"] == rows[-1]["window"]]
    text = (folder / "completions" / f"window_{last[0]['window']:05d}.jsonl").read_text()
    seconds = {kind: sum(row[f"seconds/{kind}"] for row in last) for kind in KINDS}
    return seconds, last, [json.loads(line) for line in text.splitlines()]


def predicted(
    config: RunConfig, device: Device, prompts: PromptLengths, rows: list[dict], traces: list[dict]
) -> Plan:
    """The plan with the run's own mean lengths and share of trained rows."""
    trace_tokens = sum(len(t["ids"]) for t in traces)
    answers = sum(len(t["answers"]) for t in traces)
    generated = sum(row["tokens/generated"] for row in rows)
    guess = Guess(
        trace_tokens=trace_tokens / len(traces),
        answer_tokens=(generated - trace_tokens) / answers if answers else None,
    )
    size = model_size(config.model)
    scenario = make_scenario(config, size, device, Cluster(), prompts, guess)
    foreseen = sum(r.count for phase in make_plan(scenario).phases for r in phase.work.trained)
    share = min(1.0, max(1e-3, sum(row["rows"] for row in rows) / foreseen))
    return make_plan(
        make_scenario(config, size, device, Cluster(), prompts, replace(guess, live_share=share))
    )


def run_case(case: Case) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(case, folder)
        builder = PromptBuilder(load_tokenizer(config.model), resolve_template(config.template), config.shots)
        prompts = measure_prompts(builder, load_problems(from_dict(TaskSpec, TASK, "task")), dataset=False)
        before = measure_cpu.__wrapped__()
        run_training(config, show_progress=False)
        after = measure_cpu.__wrapped__()
        seconds, rows, traces = measured(Path(folder))
    mean = {
        name: statistics.fmean((getattr(before, name), getattr(after, name)))
        for name in ("half_flops", "full_flops", "bandwidth", "dispatch", "half_weights", "full_weights")
    }
    plan = predicted(config, replace(before, **mean), prompts, rows, traces)
    (phase,) = plan.phases
    tokens = {"generate": "generated", "score": "scored", "train": "trained"}
    counted = {"generate": "tokens/generated", "train": "tokens/forwarded"}  # tokens/scored counts no sharing
    out = []
    for kind in KINDS:
        if not seconds[kind] or not getattr(phase, kind):
            continue
        ratio = getattr(phase, kind) / seconds[kind]
        detail = {
            "predicted_seconds": round(getattr(phase, kind), 3), "measured_seconds": round(seconds[kind], 3),
            "predicted_tokens": round(getattr(phase, f"{tokens[kind]}_tokens")),
            "measured_tokens": sum(row[counted[kind]] for row in rows) if kind in counted else None,
            "live_share": round(plan.scenario.guess.live_share, 3),
            "mean_trace_tokens": round(plan.scenario.trace.mean, 2),
            "groups": case.groups, "traces": case.traces, "shots": case.shots, "dtype": case.dtype,
            "gemm_gflops": round(plan.scenario.setup.device.flops(case.dtype) / 1e9, 1),
            "gemm_gflops_after_over_before": round(after.peak(case.dtype) / before.peak(case.dtype), 2),
        }  # fmt: skip
        row = {
            "bench": "plan",
            "row": f"{case.name}/{kind}",
            "value": round(ratio, 3),
            "unit": "ratio",
            "bar": BAR,
        }
        out.append({**row, "ok": BAR <= ratio <= 1 / BAR, "detail": detail})
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "schema": 1,
        "suite": "plan_check",
        "metric": "predicted over measured CPU seconds of one window, one thread; one run a case, no interval",
        "config": {case.name: vars(case) for case in CASES},
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "date": time.strftime("%Y-%m-%d"),
        "rows": [{"name": r["row"], "value": r["value"], "interval": None, **r["detail"]} for r in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--write", type=Path, help="write the rows as a results file too")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    rows = []
    for case in CASES:
        if args.case in (None, case.name):
            print(f"{case.name} ...", file=sys.stderr)
            for row in run_case(case):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.write:
        write(args.write, rows)


if __name__ == "__main__":
    main()
