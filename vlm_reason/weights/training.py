"""Gradient training of one adapter under a likelihood: the loop that every method which trains shares, on transformers'
Trainer (schedule, clipping, checkpoints).

    step s:   loss = mean over the step's `batch_size` examples of l(theta; x, y)

Which examples a step has follows from (seed, s) alone. They are dealt to the processes and cut into micro-batches of
at most `tokens_per_microbatch` tokens, each weighed by its number of examples, and gradients are summed over all of
them: neither the micro-batches nor the number of processes changes a step but for the order of fp32 sums. There is no
DistributedDataParallel: likelihoods run the decoder inside the model themselves, where its hooks are not.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..engines.processes import check_one_gpu, rank, together, world
from ..errors import UserError
from .adapter import adapter_tensors
from .checkpoints import Checkpoint, latest, saved_atomically
from .examples import Batch, Example, make_batch
from .job import Job
from .likelihoods import Likelihood

Loss = Callable[[PeftModel, Batch, Likelihood], Tensor]
"""Mean over the batch's examples; what does not depend on the data (KL / N) is in it once, at full size."""
MakeOptimizer = Callable[[list[nn.Parameter], int], torch.optim.Optimizer]
"""(trained parameters, number of optimiser steps planned) -> optimiser."""


@dataclass(frozen=True)
class Trained:
    """losses: of every step, also of those before a resume. seconds: of this call."""

    steps: int
    seconds: float
    losses: tuple[float, ...]
    optimizer: torch.optim.Optimizer

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


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
    dropout: bool = False,
    method: object = None,
) -> Trained:
    """Minimise the mean of `loss` over job.train, in place and where the model is (nothing moves it); the model is in
    eval mode afterwards.

    parameters  what is trained (default: the adapter); also parameters that are not the model's. They become fp32
    callbacks   transformers' TrainerCallbacks. What one with `state_dict` and `load_state_dict` holds is checkpointed
    name        subfolder of job.output_dir for checkpoints, so that the stages of one method resume one by one
    dropout     train mode, for adapters with dropout; the base model has none. Without it everything is in eval mode
    method      the settings that `loss` and the optimiser are made of, where they are not job.training alone: its repr
                is among what a checkpoint must share with this run

    Started again with the same job, it goes on from the last checkpoint, on the CPU as if it had never stopped, and a
    finished stage is only read back. UserError for a loss or gradient that is not finite, naming the step, and for
    checkpoints of other settings, data or parameters.
    """
    chosen = _choose(job, parameters)
    steps, t = planned_steps(job), job.training
    optimizer = (
        torch.optim.AdamW(chosen, lr=t.learning_rate, weight_decay=t.weight_decay)
        if make_optimizer is None
        else make_optimizer(chosen, steps)
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vlm-reason-") as scratch:
        folder = Path(scratch) if job.output_dir is None else job.output_dir / name
        args = _arguments(job, folder, steps)
        identity = _identity(job, name, chosen, steps, method)
        found = None if job.output_dir is None else together(lambda: latest(folder, identity))[0]
        stateful = [c for c in callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]
        try:
            if found is not None and found.step >= steps:
                found.load(chosen, stateful)
                optimizer.load_state_dict(found.optimizer_state())
                losses = found.losses()
            else:
                trainer = AdapterTrainer(job, loss, chosen, optimizer, args, steps, callbacks, dropout)
                trainer.identity, trainer.stateful = identity, stateful
                trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
                losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        finally:
            for p in chosen:
                p.grad = None
            job.model.eval()
    return Trained(steps, time.perf_counter() - started, tuple(losses), optimizer)


def step_members(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """Which examples a step trains on: epoch by epoch a permutation, cut into batches, the last one smaller."""
    per_epoch = -(-examples // batch_size)
    epoch, position = divmod(step, per_epoch)
    digest = hashlib.blake2b(f"order\x1f{seed}\x1f{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    order = torch.randperm(examples, generator=generator)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def micro_batches(examples: Sequence[Example], tokens: int) -> list[Batch]:
    """All of them, longest first, in batches of at most `tokens` tokens with padding (one row at least)."""
    queue = sorted(examples, key=lambda e: -_length(e))
    batches = []
    while queue:
        size = max(1, tokens // _length(queue[0]))
        batches.append(make_batch(queue[:size]))
        queue = queue[size:]
    return batches


def _length(example: Example) -> int:
    return max(1, len(example.ids) + len(example.rejected))


# ----------------------------------------------------------------------------------------------------------- set up


def _choose(job: Job, parameters: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
    """Only these require gradients; fp32, so that small updates are not lost to rounding."""
    adapter = cast("dict[str, nn.Parameter]", adapter_tensors(job.model, job.adapter))
    chosen = list(adapter.values()) if parameters is None else list(parameters)
    if not chosen:
        raise UserError("nothing to train: the list of parameters is empty")
    job.model.requires_grad_(False)
    for p in chosen:
        p.data = p.data.float()
        p.requires_grad_(True)
    return chosen


def join_processes() -> torch.device:
    """Meet the other processes of a launcher, if one started this one; the device this one trains on."""
    with tempfile.TemporaryDirectory() as folder:
        return _one_device(TrainingArguments(output_dir=folder, use_cpu=_no_accelerator(), report_to=[]))


def _no_accelerator() -> bool:
    return not torch.accelerator.is_available()


def _one_device(args: TrainingArguments) -> torch.device:
    device = args.device
    check_one_gpu(args.n_gpu)
    return device


def _arguments(job: Job, folder: Path, steps: int) -> TrainingArguments:
    t = job.training
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, seed=job.seed,
        learning_rate=t.learning_rate, lr_scheduler_type=t.schedule, warmup_steps=round(t.warmup_share * steps),
        max_grad_norm=t.max_grad_norm, logging_steps=1, save_steps=t.save_steps, report_to=[],
        save_strategy="no" if job.output_dir is None else "steps", remove_unused_columns=False,
        use_cpu=_no_accelerator(), disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    _one_device(args)
    return args


def _identity(
    job: Job, name: str, chosen: Sequence[nn.Parameter], steps: int, method: object
) -> dict[str, Any]:
    """What must be equal for a checkpoint to go on."""
    t = replace(job.training, save_steps=1, tokens_per_microbatch=1)
    data = hashlib.blake2b(digest_size=8)
    for example in job.train:
        data.update(repr(example).encode())
    return {
        "stage": name, "method": "" if method is None else repr(method), "steps": steps, "seed": job.seed,
        "training": {k: v for k, v in vars(t).items()},
        "examples": data.hexdigest(),
        "likelihood": [type(job.likelihood).__name__, *getattr(job.likelihood, "label_ids", ())],
        "parameters": [list(p.shape) for p in chosen],
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the loop


def _first(rows: Sequence[dict[str, int]]) -> dict[str, int]:
    return rows[0]


class AdapterTrainer(Trainer):
    """What it overrides is pinned in tests/contract/test_transformers_trainer.py."""

    def __init__(
        self, job: Job, loss: Loss, chosen: list[nn.Parameter], optimizer: torch.optim.Optimizer,
        args: TrainingArguments, steps: int, callbacks: Sequence[TrainerCallback], dropout: bool,
    ) -> None:  # fmt: skip
        self.job, self.loss, self.chosen, self.dropout = job, loss, chosen, dropout
        self.identity: dict[str, Any] = {}
        self.stateful: list[Any] = []
        self._saving_to: Path | None = None
        self._steps: Any = [{"step": n} for n in range(steps)]  # `step_members` says what each trains on
        super().__init__(
            model=job.model, args=args, train_dataset=self._steps, data_collator=_first,
            optimizers=(optimizer, None), callbacks=list(callbacks),
        )  # fmt: skip
        self.remove_callback(PrinterCallback)  # both print to stdout
        self.remove_callback(ProgressCallback)
        if job.show_progress and rank() == 0:
            self.add_callback(_Bar())

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not at all: losses, priors and optimisers hold tensors that were made where the model is."""

    def get_train_dataloader(self) -> DataLoader:
        """Every process sees every step; they share its examples."""
        return DataLoader(self._steps, batch_size=1, collate_fn=_first)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """As transformers does, without a wrapper around the model."""
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the step's mean loss into `chosen`; returns that loss, the same in every process."""
        t = self.job.training
        model.train(self.dropout)
        for p in self.chosen:
            p.grad = None
        members = step_members(self.state.global_step, len(self.job.train), t.batch_size, self.job.seed)
        own = [self.job.train[i] for i in members[rank() :: world()]]
        device = next(self.job.model.parameters()).device
        total = torch.zeros((), device=device)
        for batch in micro_batches(own, t.tokens_per_microbatch):
            share = len(batch) / len(members)
            part = self.loss(self.job.model, batch.to(device), self.job.likelihood) * share
            part.backward()
            total += part.detach().float().to(device)
        if world() > 1:
            total = _summed_over_processes(self.chosen, total)
        self._check_finite(total)
        return total.to(self.args.device)  # where transformers adds losses up

    def _check_finite(self, loss: Tensor) -> None:
        sums = [p.grad.sum().to(loss.device) for p in self.chosen if p.grad is not None]
        good = (
            torch.isfinite(loss) & torch.isfinite(torch.stack(sums)).all() if sums else torch.isfinite(loss)
        )
        if not bool(good):
            what = (
                f"the loss is {float(loss):g}" if not torch.isfinite(loss) else "the gradient is not finite"
            )
            raise UserError(
                f"{what} at step {self.state.global_step + 1} of {self.args.max_steps}: lower training.learning_rate "
                f"(now {self.job.training.learning_rate:g}), or look at the weights and data it began from"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Of all that is trained, the model's or not."""
        return nn.utils.clip_grad_norm_(self.chosen, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would warn that it finds no tokens in a step's number."""
        return 0

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers does it, into a folder that gets its name when it is whole; older ones then go."""
        with saved_atomically(Path(self.args.output_dir or ""), self.state.global_step) as staging:
            self._saving_to = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        Checkpoint.write(
            Path(output_dir or self.args.output_dir or ""), self.chosen, self.stateful, self.identity
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        Checkpoint(Path(resume_from_checkpoint)).load(self.chosen, self.stateful)


def _summed_over_processes(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Sum every gradient over the processes, in one message; the sum of `loss`. One that no process has stays None."""
    grads = [p.grad for p in parameters]
    device = loss.device
    has = torch.tensor([float(g is not None) for g in grads], device=device)
    parts = [
        (torch.zeros_like(p) if g is None else g).reshape(-1).to(device)
        for p, g in zip(parameters, grads, strict=True)
    ]
    flat = torch.cat([loss.view(1), has, *parts])
    dist.all_reduce(flat)
    at = 1 + len(grads)
    for n, p in enumerate(parameters):
        if flat[1 + n] > 0:
            p.grad = flat[at : at + p.numel()].view_as(p).to(p.device)
        at += p.numel()
    return flat[0]


class _Bar(TrainerCallback):
    """Over optimiser steps, on stderr."""

    _bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fit", unit="step", file=sys.stderr,
                         dynamic_ncols=True)  # fmt: skip

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3g}")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.close()
