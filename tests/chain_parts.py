"""A tiny classification job, and a likelihood that stops a run part-way, for methods that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlm_reason.weights import Choice, Example, Job, Training
from vlm_reason.weights.adapter import adapter_tensors, whole
from vlm_reason.weights.artefact import Tree
from vlm_reason.weights.examples import Batch


class Stopped(Exception):
    pass


@dataclass(frozen=True)
class StoppingChoice(Choice):
    """Raises at batch number `left` from now on."""

    left: ClassVar[float] = float("inf")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        StoppingChoice.left -= 1
        if StoppingChoice.left < 0:
            raise Stopped
        return super().outputs(model, batch)


def adapted(base: Any, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config)


def examples(count: int = 24) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(4, 64, (4 + n % 3,), generator=generator).tolist() for n in range(count)]
    return [Example(str(n), tuple(row), n % 3) for n, row in enumerate(rows)]


def tiny_job(base: Any, epochs: float = 4, **keys: Any) -> Job:
    """6 steps an epoch, each one micro-batch."""
    StoppingChoice.left = float("inf")
    settings = Training(epochs=epochs, batch_size=4, learning_rate=1e-2, warmup_share=0.1, save_steps=5)
    return Job(adapted(base), examples(), StoppingChoice((3, 5, 7)), settings, seed=3, **keys)


def stop_after(batches: int) -> None:
    StoppingChoice.left = batches


def state_of(job: Job) -> Tree:
    return {k: whole(p) for k, p in adapter_tensors(job.model, job.adapter).items()}


def same_trees(a: list[Tree], b: list[Tree]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )
