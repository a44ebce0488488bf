"""TraceConfig: what a run needs beside the recipe, and everything of `transformers.TrainingArguments`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..errors import UserError
from .recipe import Recipe


@dataclass
class TraceConfig(TrainingArguments):
    """Sizes, sampling and schedule of a trace run.

    A *window* is what is sampled with one version of the weights: `prompts_per_window` problems, K traces
    each. It is then trained on in steps of `prompts_per_step` problems, `window_epochs` times over. Online
    training is a window of one step; alternating training (EM) is a large window; offline training is one
    round over given traces.

    A window is ceil(prompts_per_window / prompts_per_step) * window_epochs optimiser steps, a round is the sum of
    its phases' windows.
    """

    output_dir: str = field(default="runs/trace", metadata={"help": "Folder of checkpoints and metrics."})
    rounds: int = field(default=1, metadata={"help": "T: how often the recipe's phases are run through."})
    prompts_per_window: int = field(
        default=64, metadata={"help": "Problems sampled with one version of the weights."}
    )
    prompts_per_step: int = field(
        default=16, metadata={"help": "Problems (whole groups) in one optimiser step."}
    )
    window_epochs: int = field(default=1, metadata={"help": "Passes over a window."})
    traces_per_prompt: int | None = field(default=None, metadata={"help": "K; None takes the recipe's."})
    tokens_per_microbatch: int = field(
        default=4096,
        metadata={
            "help": "Tokens in one forward/backward, a shared prompt once; memory and speed, never the loss."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of traces; they are scored under it."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus of the traces' law; they are scored under it."}
    )
    reuse_logps: bool = field(
        default=True,
        metadata={
            "help": "Take the sampler's log-probabilities where they are of the very law that is asked for."
        },
    )
    compared_traces: int = field(
        default=4, metadata={"help": "Traces a window, scored again to log mismatch/* of sampler and scorer."}
    )
    rollout_ahead: int = field(
        default=0,
        metadata={
            "help": "1: draw the next window while this one is trained on, one window stale (ahead.py)."
        },
    )
    answer_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of answers."})
    max_trace_tokens: int = field(
        default=64, metadata={"help": "Cap on z; a longer trace is incomplete, weight 0."}
    )
    max_answer_tokens: int = field(default=16, metadata={"help": "Cap on y."})
    shots: int = field(default=0, metadata={"help": "Worked examples in the prompts that are trained."})
    proposal_shots: int = field(
        default=0,
        metadata={
            "help": "Worked examples in the prompts that sample and score, while proposal_shot_rounds last."
        },
    )
    proposal_shot_rounds: int = field(
        default=0, metadata={"help": "Rounds that use proposal_shots; 0 = none."}
    )
    loss_scale: float = field(
        default=1.0,
        metadata={
            "help": "A constant that divides the loss (a mean trace length, say); never a batch statistic."
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={"help": "Stop after the step at which generated + trained tokens reach this."},
    )
    log_completions: bool = field(default=True, metadata={"help": "Write completions/window_*.jsonl."})

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(
        default=1, metadata={"help": "Steps between rows for report_to; metrics.jsonl has all."}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "wandb, trackio, tensorboard, mlflow."}
    )
    save_steps: float = field(default=50, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of AdamW."})
    fsdp2: bool = field(
        default=False,
        metadata={
            "help": "Shard weights, gradients and optimiser state; configs/accelerate/fsdp2.yaml turns it on."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Not used: problems are not tensors."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Not used: see prompts_per_step."})

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_window", "prompts_per_step", "window_epochs", "tokens_per_microbatch",
                     "max_trace_tokens", "max_answer_tokens"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} must be >= 1, got {getattr(self, name)}")
        if self.traces_per_prompt is not None and self.traces_per_prompt < 1:
            raise UserError(f"trainer.traces_per_prompt (K) must be >= 1, got {self.traces_per_prompt}")
        if self.token_budget is not None and self.token_budget < 1:
            raise UserError(f"trainer.token_budget must be >= 1, got {self.token_budget}")
        if self.prompts_per_step > self.prompts_per_window:
            raise UserError(
                f"trainer.prompts_per_step ({self.prompts_per_step}) exceeds prompts_per_window "
                f"({self.prompts_per_window}); a step trains on problems of one window"
            )
        if self.gradient_accumulation_steps != 1 or self.per_device_train_batch_size != 1:
            raise UserError(
                "trainer.gradient_accumulation_steps and per_device_train_batch_size must stay 1: a step is "
                "prompts_per_step whole groups, split into micro-batches of tokens_per_microbatch"
            )
        self._check_numbers()
        self._check_unused()
        self._take_fsdp_from_launcher()
        self._check_deepspeed_file()
        if (
            not torch.accelerator.is_available()
        ):  # else accelerate counts one process where DeepSpeed has several
            self.use_cpu = True
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name in ("loss_scale", "temperature"):
            if not 0 < getattr(self, name) < inf:
                raise UserError(
                    f"trainer.{name} must be > 0, got {getattr(self, name)}"
                    + (
                        " (greedy traces are the recipe's choice, as in star)"
                        if name == "temperature"
                        else ""
                    )
                )
        if not 0 < self.top_p <= 1:
            raise UserError(f"trainer.top_p must be in (0, 1], got {self.top_p}")
        for name in ("answer_temperature", "learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= float(getattr(self, name)) < inf:
                raise UserError(f"trainer.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("shots", "proposal_shots", "proposal_shot_rounds", "compared_traces"):
            if getattr(self, name) < 0:
                raise UserError(f"trainer.{name} must be >= 0, got {getattr(self, name)}")
        if self.rollout_ahead not in (0, 1):
            raise UserError(f"trainer.rollout_ahead must be 0 or 1, got {self.rollout_ahead}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"trainer.seed must be in [0, 2**32), got {self.seed}")

    def _check_unused(self) -> None:
        """Settings of transformers that would be ignored, or would break what a checkpoint promises."""
        if self.max_steps != -1 or self.num_train_epochs != 3.0:
            raise UserError(
                "trainer.max_steps and num_train_epochs are not used: the steps follow from rounds, "
                "prompts_per_window, prompts_per_step and window_epochs"
            )
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no":
            raise UserError(
                "trainer.eval_strategy must stay 'no': evaluate with the eval command, after training"
            )
        if str(getattr(self.save_strategy, "value", self.save_strategy)) not in ("steps", "no"):
            raise UserError(f"trainer.save_strategy must be 'steps' or 'no', got {self.save_strategy!r}")
        for name in ("save_only_model", "load_best_model_at_end", "auto_find_batch_size"):
            if getattr(self, name):
                raise UserError(f"trainer.{name} must stay false: a run must go on exactly where it stopped")

    def _take_fsdp_from_launcher(self) -> None:
        """`accelerate launch` with an FSDP config says so in the environment. We shard ourselves (models/sharding.py),
        alike on GPUs and on a CPU, where accelerate would leave the model whole without a word."""
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
            if os.environ.get("FSDP_VERSION", "1") != "2":
                raise UserError("FSDP1 is not supported: set fsdp_version: 2 in the accelerate config")
            if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() in ("1", "true"):
                raise UserError(
                    "fsdp_offload_params is not supported: take configs/deepspeed/zero3_offload.json to keep "
                    "weights and optimiser state on the CPU"
                )
            del os.environ["ACCELERATE_USE_FSDP"]
            self.fsdp2 = True
        if self.fsdp:
            raise UserError("trainer.fsdp is transformers' own switch: set trainer.fsdp2=true")
        if self.fsdp2 and self.deepspeed:
            raise UserError("trainer.fsdp2 and trainer.deepspeed both shard the model: choose one")

    def _check_deepspeed_file(self) -> None:
        if not isinstance(self.deepspeed, str) or not self.deepspeed:
            return
        path = Path(self.deepspeed)
        if not path.is_file():
            raise UserError(
                f"trainer.deepspeed: no file {str(path)!r}; configs/deepspeed/ has some to start from"
            )
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"trainer.deepspeed: {str(path)!r} is not valid JSON: {error}") from error

    @property
    def place_model_on_device(self) -> bool | None:
        """FSDP2 moves shards to the GPU, layer by layer; the whole model may not fit there."""
        return False if self.fsdp2 else super().place_model_on_device

    def steps_per_window(self) -> int:
        return ceil(self.prompts_per_window / self.prompts_per_step) * self.window_epochs

    def steps_per_round(self, recipe: Recipe) -> int:
        return self.steps_per_window() * sum(phase.windows for phase in recipe.phases)

    def total_steps(self, recipe: Recipe) -> int:
        return self.rounds * self.steps_per_round(recipe)
