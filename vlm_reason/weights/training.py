"""Gradient training of one adapter under a likelihood: the loop every method that trains shares, on transformers'
Trainer (schedules, accumulation, processes, checkpoints, progress)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .examples import Batch, Example, make_batch
from .job import Job
from .likelihoods import Likelihood
from .posterior import adapter_tensors

Loss = Callable[[PeftModel, Batch, Likelihood], Tensor]
"""Mean over the batch's examples."""
MakeOptimizer = Callable[[list[nn.Parameter], int], torch.optim.Optimizer]
"""(trained parameters, number of optimiser steps planned) -> optimiser."""


@dataclass(frozen=True)
class Trained:
    steps: int
    seconds: float
    losses: tuple[float, ...]


def negative_log_likelihood(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
    return -likelihood.log_prob(likelihood.outputs(model, batch), batch).mean()


def planned_steps(job: Job) -> int:
    """Optimiser steps of a whole training run."""
    return max(1, round(-(-len(job.train) // job.training.batch_size) * job.training.epochs))


def train(
    job: Job,
    *,
    loss: Loss = negative_log_likelihood,
    make_optimizer: MakeOptimizer | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    name: str = "train",
) -> Trained:
    """Minimise the mean of `loss` over job.train, in place. parameters: what is trained (default: the adapter). name:
    subfolder of job.output_dir for checkpoints, so that stages of one method resume one by one."""
    adapter = cast("dict[str, nn.Parameter]", adapter_tensors(job.model, job.adapter))
    chosen = list(adapter.values()) if parameters is None else list(parameters)
    job.model.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    t = job.training
    steps = planned_steps(job)
    optimizer = (
        torch.optim.AdamW(chosen, lr=t.learning_rate, weight_decay=t.weight_decay)
        if make_optimizer is None
        else make_optimizer(chosen, steps)
    )
    folder = job.output_dir / name if job.output_dir else Path(tempfile.mkdtemp())
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=t.batch_size, seed=job.seed,
        learning_rate=t.learning_rate, lr_scheduler_type=t.schedule, warmup_steps=round(t.warmup_share * steps),
        max_grad_norm=t.max_grad_norm, logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=not job.show_progress, dataloader_drop_last=False,
        log_level="error",
    )  # fmt: skip
    trainer = _Trainer(
        model=job.model, args=args, train_dataset=list(job.train), data_collator=_collate,
        optimizers=(optimizer, None), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.job, trainer.loss = job, loss
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return Trained(trainer.state.global_step, time.perf_counter() - started, losses)


def _collate(examples: Sequence[Example]) -> dict[str, Any]:
    return {"batch": make_batch(examples)}


class _Trainer(Trainer):
    job: Job
    loss: Loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batch: Batch = inputs["batch"].to(self.args.device)
        return self.loss(self.job.model, batch, self.job.likelihood)
