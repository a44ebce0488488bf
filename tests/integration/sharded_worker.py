"""What tests/integration/test_sharded.py launches in two processes: small runs in one mode of sharding after the other.

    torchrun --nproc_per_node 2 tests/integration/sharded_worker.py FOLDER MODE...

FOLDER holds a tiny model with its tokenizer. Rank 0 leaves FOLDER/MODE/RUN/{metrics.jsonl, adapters|model, ...}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from vlm_reason.models.adapters import AdapterConfig
from vlm_reason.models.sharding import whole_parameters
from vlm_reason.tasks.templates import Shot, Template
from vlm_reason.traces import TraceConfig, TraceTrainer, build
from vlm_reason.traces.checkpoint import latest_checkpoint
from vlm_reason.types import Problem

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = Template(
    name="tiny",
    prior="{question}=",
    posterior="{question}={hint}=",
    cue="a:",
    shots=(Shot("1+1", " 1+1", "2"),),
)
PROBLEMS = [
    Problem(f"p{i}", f"{i}+{i + 1}", str(2 * i + 1), metadata={"rationale": f"{i} and {i + 1}"})
    for i in range(8)
]


@dataclass(frozen=True)
class Run:
    """preset with options; adapters or full weights; what differs from `make`'s settings, and in several processes."""

    preset: str
    options: dict[str, Any] = field(default_factory=dict)
    adapters: bool = True
    dtype: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    sharded: dict[str, Any] = field(default_factory=dict)


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
RUNS: dict[str, Run] = {
    "vr": Run("vr", {"evidence": "logp", "ratio": "none", "partner": "posterior"}),  # two adapters alternate
    "both": Run("iwae", sharded=CHECKPOINTED),  # two adapters in one step
    "full": Run("jepo", adapters=False),  # the model's own weights
    "bf16": Run("sft", dtype="bfloat16"),  # fp32 adapters on a bf16 base
    "mixed": Run("sft", settings={"rounds": 3, "bf16": True}),  # fp32 weights or masters, computed in bf16
}
RESUMED = {  # only ZeRO keeps weights beside those it computes with
    "ddp": ("vr", "full"), "fsdp2": ("vr", "full"), "zero2": ("vr", "full", "mixed"), "zero3": ("vr", "full", "mixed"),
}  # fmt: skip
STOP = 4  # one step behind checkpoint-3
MODES: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {},
    "fsdp2": {"fsdp2": True},
    "zero2": {"deepspeed": str(REPO / "configs/deepspeed/zero2.json")},
    "zero3": {"deepspeed": str(REPO / "configs/deepspeed/zero3.json")},
    "zero3_offload": {"deepspeed": str(REPO / "configs/deepspeed/zero3_offload.json")},
}


@contextmanager
def clean_environment() -> Iterator[None]:
    """accelerate writes what it was told into the environment and would believe it in the next mode."""
    before = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[key]
        os.environ.update(before)


def make(
    folder: Path, out: Path, mode: str, run: str, engine: Mapping[str, Any] | None = None, **more: Any
) -> TraceTrainer:
    chosen = RUNS[run]
    args = TraceConfig(
        output_dir=str(out),
        **{
            "prompts_per_window": 8,
            "prompts_per_step": 4,
            "window_epochs": 1,
            "rounds": 2,
            "traces_per_prompt": 4,
            "max_trace_tokens": 16,
            "max_answer_tokens": 4,
            "tokens_per_microbatch": 96,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "adam_epsilon": 1e-4,  # else Adam divides gradients that are rounding noise by themselves
            "save_steps": 3,
            "save_total_limit": None,
            "use_cpu": True,
            "seed": 11,
            **chosen.settings,
            **({} if mode == "one" else chosen.sharded),
            **MODES[mode],
            **more,
        },
    )
    return TraceTrainer(
        str(folder),
        args,
        build(chosen.preset, chosen.options),
        PROBLEMS,
        template=TEMPLATE,
        verifier="number",
        adapter=AdapterConfig(r=2, alpha=4) if chosen.adapters else None,
        dtype=chosen.dtype,
        engine_options=engine,
        show_progress=False,
    )


class StopAfter(TrainerCallback):
    """A kill at the worst moment: behind the optimiser step, before anything of it is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class OtherAdapter(TrainerCallback):
    """Compares weights and moments of the adapter that a step does not train before and after it, to the bit."""

    def __init__(self, trainer: TraceTrainer) -> None:
        self.trainer = trainer
        self.seen = self.changed = self.moved = self.with_moments = 0

    def snapshot(self) -> dict[str, dict[str, Any]]:
        trainer, out = self.trainer, {}
        names = [k for k, _ in trainer.model.named_parameters() if "lora_" in k]
        weights = {k: v.to("cpu", copy=True) for k, v in whole_parameters(trainer.model, names, masters=True)}
        state = trainer.parallel.read_state()
        for group in state["param_groups"]:
            name = group["adapter"]
            moments = {n: state["state"].get(n, {}) for n in group["params"]}
            out[name] = {
                "weights": {k: v for k, v in weights.items() if f".{name}." in k},
                "moments": {
                    (n, k): torch.as_tensor(v).clone() for n, own in moments.items() for k, v in own.items()
                },
            }
        return out

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.snapshot()

    def on_step_end(self, args, state, control, **kwargs):
        trained = self.trainer._row["phase"]
        other = "reasoner" if trained == "posterior" else "posterior"
        after = self.snapshot()
        self.seen += 1
        self.with_moments += bool(self.before[other]["moments"])
        for kind in ("weights", "moments"):
            own, now = self.before[other][kind], after[other][kind]
            self.changed += own.keys() != now.keys() or any(
                not torch.equal(now[k], v) for k, v in own.items()
            )
        own, now = self.before[trained]["weights"], after[trained]["weights"]
        self.moved += any(not torch.equal(now[k], v) for k, v in own.items())


def report(out: Path, trainer: TraceTrainer, other: OtherAdapter | None) -> None:
    """How the run was really sharded, for the test to check."""
    sharded = sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in trainer.model.parameters())
    facts = {
        "parallel": type(trainer.parallel).__name__,
        "processes": trainer.ranks.size,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "sharded": sharded,
        "parameters": sum(1 for _ in trainer.model.parameters()),
    }
    if other is not None:
        facts |= {k: getattr(other, k) for k in ("seen", "changed", "moved", "with_moments")}
    if trainer.ranks.main:
        (out / "report.json").write_text(json.dumps(facts))


def whole_run(folder: Path, mode: str, run: str) -> None:
    out = folder / mode / run
    trainer = make(folder, out, mode, run)
    other = OtherAdapter(trainer) if run == "vr" else None
    if other is not None:
        trainer.add_callback(other)
    trainer.train()
    report(out, trainer, other)
    trainer.save_model(str(out / "final"))


def stopped_run(folder: Path, mode: str, run: str) -> None:
    """Stopped behind step STOP and resumed by a trainer that knows only the folder."""
    out = folder / mode / f"{run}-stopped"
    first = make(folder, out, mode, run)
    first.add_callback(StopAfter(STOP))
    try:
        first.train()
    except KeyboardInterrupt:
        pass
    resumed_run(folder, out, mode, run)


def resumed_run(folder: Path, out: Path, mode: str, run: str) -> None:
    trainer = make(folder, out, mode, run)
    trainer.train(resume_from_checkpoint=str(latest_checkpoint(out)))
    trainer.save_model(str(out / "final"))


def main(folder: Path, modes: list[str]) -> None:
    """A mode runs everything; `MODE<OTHER` goes on from checkpoint-3 of what OTHER did before."""
    for mode in modes:
        mode, _, source = mode.partition("<")
        jobs: list[Callable[[], None]] = []
        if source:
            for run in ("vr", "full"):
                out = folder / f"{mode}-from-{source}" / run
                if os.environ.get("RANK", "0") == "0":
                    shutil.copytree(folder / source / run / "checkpoint-3", out / "checkpoint-3")
                jobs.append(partial(resumed_run, folder, out, mode, run))
            if dist.is_initialized():
                dist.barrier()
        else:
            brief = mode == "zero3_offload"  # what it shares with zero3 is tested there
            jobs += [partial(whole_run, folder, mode, run) for run in (("vr", "both") if brief else RUNS)]
            jobs += [partial(stopped_run, folder, mode, run) for run in RESUMED.get(mode, ())]
        for job in jobs:
            with clean_environment():
                job()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_out_compiled_communication() -> None:
    """DeepSpeed would compile shared-memory collectives for CPUs, which takes minutes; gloo's do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    torch.set_num_threads(1)
    if any(mode.startswith("zero") for mode in sys.argv[2:]):
        leave_out_compiled_communication()
    main(Path(sys.argv[1]), sys.argv[2:])
