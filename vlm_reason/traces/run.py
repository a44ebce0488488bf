"""One training run from a RunConfig: build everything, resume what can be resumed, train, save, summarise.

output_dir/config.yaml          what was run, resolved
output_dir/metrics.jsonl        a row per optimiser step
output_dir/completions/         the sampled traces of every window
output_dir/checkpoint-N/        complete checkpoints only
output_dir/adapters/reasoner    the result: a stock PEFT adapter (and adapters/posterior)
output_dir/posterior            over its weights, where the optimiser learns one
output_dir/summary.json         written last: its presence means the run is finished
"""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..atomic import write_atomically
from ..config import RunConfig, check_same_run, convert, from_dict, save_resolved
from ..errors import UserError
from ..models.adapters import AdapterConfig
from ..tasks.resolve import resolve_template
from ..tasks.sources import TaskSpec, load_problems
from ..tasks.verifiers import Verifier, make_verifier
from .checkpoint import latest_checkpoint, truncate_metrics
from .config import TraceConfig
from .presets import build
from .trainer import TraceTrainer

SUMMARY = "summary.json"


class Optimization(Protocol):
    """An optimiser that the caller brings to a run (`optim` of a config)."""

    def make(self, groups: list[dict[str, Any]], args: TraceConfig, problems: int) -> torch.optim.Optimizer:
        """groups: one an adapter, named in its key `adapter`. problems: how many are trained on."""
        ...

    def keep(self, trainer: TraceTrainer) -> dict[str, Any]:
        """Save what belongs beside the adapters, which are saved already. All processes call it; what it returns goes
        into the summary."""
        ...


def run_training(
    config: RunConfig, show_progress: bool = True, optimization: Optimization | None = None
) -> dict[str, Any]:
    """Train as `config` says and return the summary. Started again with the same config, it goes on from the last
    complete checkpoint, and returns at once when the run is finished. Of several processes rank 0 has the summary.

    UserError when output_dir holds a run of another config: nothing there is touched.
    """
    output_dir = Path(config.output_dir)
    _same_run_or_none(config, output_dir)
    done = output_dir / SUMMARY
    if done.is_file():
        return {**json.loads(done.read_text()), "already_finished": True}
    trainer = make_trainer(config, show_progress, optimization)
    ranks = trainer.ranks
    checkpoint = latest_checkpoint(output_dir)
    ranks.agree(checkpoint and checkpoint.name, f"the last checkpoint in {output_dir}")
    if ranks.main:
        save_resolved(config, output_dir)
    started = time.perf_counter()
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    elif ranks.main:  # stopped before the first checkpoint: its rows come again
        truncate_metrics(output_dir / "metrics.jsonl", 0)
    if not trainer.out_of_tokens:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    elif optimization is not None and checkpoint is not None:  # killed between the last step and this summary
        trainer.load_optimizer_state(checkpoint)
    _save_result(trainer, output_dir)
    kept = {} if optimization is None else optimization.keep(trainer)
    if not ranks.main:
        return {"output_dir": str(output_dir), "rank": ranks.rank}
    summary = {
        "output_dir": str(output_dir),
        "preset": config.preset,
        "steps": trainer.state.global_step,
        "tokens_used": trainer.tokens_used,
        "resumed_from": checkpoint.name if checkpoint else None,
        "seconds": time.perf_counter() - started,
        **kept,
        **_phase_totals(output_dir / "metrics.jsonl"),
    }
    write_atomically(done, json.dumps(summary, indent=2) + "\n")
    return summary


def make_trainer(
    config: RunConfig, show_progress: bool = True, optimization: Optimization | None = None
) -> TraceTrainer:
    """The trainer that `config` describes, not yet started: whatever is wrong with a config is found here."""
    recipe = build(config.preset, config.options)
    args = trace_config(config)
    spec = from_dict(TaskSpec, config.task, "task")
    adapter = adapter_config(config)
    problems = load_problems(spec)
    return TraceTrainer(
        config.model,
        args,
        recipe,
        problems,
        template=resolve_template(config.template),
        verifier=resolve_verifier(config.verifier, spec),
        adapter=adapter,
        dtype=config.dtype,
        optimizer_factory=partial(optimization.make, problems=len(problems)) if optimization else None,
        engine_options=config.engine,
        show_progress=show_progress,
    )


def trace_config(config: RunConfig) -> TraceConfig:
    own = {"output_dir": config.output_dir, "seed": config.seed, "shots": config.shots}
    for key in ("output_dir", "seed"):
        if key in config.trainer:
            raise UserError(f"trainer.{key} is set by the top-level {key!r}: move it there")
    return from_dict(TraceConfig, {**own, **config.trainer}, "trainer")


def adapter_config(config: RunConfig) -> AdapterConfig | None:
    """`adapter: {full: true}` trains the model's own weights; else the section's keys are AdapterConfig's."""
    section = dict(config.adapter)
    if convert(bool, section.pop("full", False), "adapter.full"):
        if section:
            raise UserError(
                f"adapter.full trains without adapters, so adapter.{next(iter(section))} has no meaning"
            )
        return None
    return from_dict(AdapterConfig, {"seed": config.seed, **section}, "adapter")


def resolve_verifier(name: str, spec: TaskSpec) -> Verifier:
    """`auto`: the generator's own score for reasoning-gym, mathematics otherwise."""
    if name == "auto":
        name = "reasoning_gym" if spec.kind == "reasoning_gym" else "math"
    return make_verifier(name)


def _same_run_or_none(config: RunConfig, output_dir: Path) -> None:
    if (output_dir / "config.yaml").is_file():  # what other commands read may change after training
        check_same_run(config, output_dir, {"sampling", "evaluation", "eval_task"})


def _save_result(trainer: TraceTrainer, output_dir: Path) -> None:
    """adapters/ (or model/) appears whole or not at all. All processes take part, rank 0 writes."""
    name = "adapters" if trainer.adapter is not None else "model"
    staging, final = output_dir / f".{name}", output_dir / name
    if trainer.ranks.main:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        trainer.save_model(str(staging))
        if not trainer.ranks.main:
            return
        if trainer.adapter is None:
            (staging / "training_args.bin").unlink(missing_ok=True)
            trainer.tokenizer.save_pretrained(staging)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
    finally:
        if trainer.ranks.main:
            shutil.rmtree(staging, ignore_errors=True)


def _phase_totals(metrics: Path) -> dict[str, Any]:
    """Seconds and tokens by kind of work, over the whole run (also the parts before a resume)."""
    totals: dict[str, float] = {}
    last: dict[str, Any] = {}
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        last = row
        for key, value in row.items():
            if key.startswith(("seconds/", "tokens/")) and value is not None:
                totals[key] = totals.get(key, 0) + value
    kept = (
        "bound",
        "ess",
        "null_rate",
        "accuracy",
        "unhinted_accuracy",
        "answer_copied",
        "steps_right",
        "truncated",
    )
    return {"totals": totals, "last_window": {key: last.get(key) for key in kept}}
