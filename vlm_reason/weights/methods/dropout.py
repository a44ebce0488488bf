"""MC dropout: an adapter trained under random masks, which at prediction are draws of a posterior.

Each sequence of a training batch has a mask of its own, the same for all its tokens: what its gradient sees is one
function, as it will be when draws predict. PEFT's `lora_dropout` draws anew for every token. Masks come from (seed,
step, id of the example), so they do not depend on how examples lie in batches, on the number of processes, or on
having been interrupted.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from ...compat.peft import Update, lora_updates
from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict
from ..continual import start_from
from ..examples import Batch
from ..families.masks import FACTOR, Axis, Masks
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..per_row import by_row
from ..posterior import Origin, Posterior
from ..training import Trained, negative_log_likelihood, train


@dataclass(frozen=True)
class Dropout:
    """p: probability that an input of an A is dropped; those left are multiplied by 1 / (1 - p). `lora_dropout` of the
    adapter is not applied on top of it.

    When not to use it: for uncertainty in a model of a few tokens' answer after little training: B is near 0, so draws
    hardly differ. (Gal and Ghahramani 2016, arXiv 1506.02142.)
    """

    p: float = 0.1

    def __post_init__(self) -> None:
        check_probability("p", self.p)

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        return fit_fixed(job, "dropout", self.p, "columns")


def fit_fixed(job: Job, method: str, p: float, axis: Axis) -> tuple[Masks, FitReport]:
    """Train under masks of fixed probability; the posterior has the same."""
    masks = SequenceMasks(job.seed)

    def loss(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
        uniform = masks.uniform(batch.ids, mask_sizes(model, job.adapter, axis))
        factors = {name: (u >= p).float() / (1 - p) for name, u in uniform.items()}
        with masked(model, job.adapter, factors, axis):
            return negative_log_likelihood(model, batch, likelihood)

    start_from(job)
    keys = mask_sizes(job.model, job.adapter, axis)
    trained = train(job, loss=loss, callbacks=[masks], method=(method, p))
    posterior = masks_of(job, dict.fromkeys(keys, p), axis)
    return posterior, mask_report(job, method, posterior, trained)


def check_probability(name: str, p: float) -> None:
    if not 0 < p < 1:
        raise UserError(f"{name} must be in (0, 1), got {p}")


class SequenceMasks(TrainerCallback):
    """Uniform numbers that depend on the run's seed, the step and the example's id alone; as a callback it follows the
    step."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.step = state.global_step

    def uniform(self, ids: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """name -> [rows, size], in (0, 1)."""
        total = sum(sizes.values())
        rows = torch.stack([self._row(example, total) for example in ids])
        return dict(zip(sizes, rows.split(list(sizes.values()), 1), strict=True))

    def _row(self, example: str, total: int) -> Tensor:
        packed = struct.pack("<2Q", self.seed % 2**64, self.step) + example.encode()
        seed = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        return torch.rand(total, generator=torch.Generator().manual_seed(seed)).clamp(2**-24, 1 - 2**-24)


def mask_sizes(model: PeftModel, adapter: str, axis: Axis) -> dict[str, int]:
    """Layer's name in the adapter file -> units of its A. UserError for an adapter without plain LoRA linear layers."""
    sizes: dict[str, int] = {}

    def note(name: str, layer: Any) -> None:
        sizes[name] = layer.lora_A[adapter].weight.shape[1 if axis == "columns" else 0]

    with lora_updates(model, adapter, note):
        pass
    if not sizes:
        raise UserError(f"adapter {adapter!r} has no plain LoRA linear layers to put masks on")
    return sizes


@contextmanager
def masked(model: PeftModel, adapter: str, factors: Mapping[str, Tensor], axis: Axis) -> Iterator[None]:
    """Inside, row b of a batch goes through A with its units multiplied by factors[name][b]. Has gradients with respect
    to the adapter and to the factors."""

    def make(name: str, layer: Any) -> Update:
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scaling = float(layer.scaling[adapter])
        factor = factors[name].to(down.device, down.dtype)  # [rows, units]

        def update(x: Tensor) -> Tensor:
            x = x.to(down.dtype)
            if axis == "columns":
                h = F.linear(x * by_row(factor, x), down)
            else:
                h = F.linear(x, down) * by_row(factor, x)
            return F.linear(h, up) * scaling

        return update

    with lora_updates(model, adapter, make):
        yield


def masks_of(job: Job, drop: Mapping[str, float], axis: Axis) -> Masks:
    """The posterior around what the adapter holds now; drop by the layer's name."""
    mean = adapter_tensors(job.model, job.adapter)
    origin = Origin(base_fingerprint(job.model), data_size=len(job.train))
    config = peft_config_dict(job.model, job.adapter)
    return Masks(config, mean, {name + FACTOR: p for name, p in drop.items()}, axis, origin)


def mask_report(job: Job, method: str, posterior: Masks, trained: Trained, **details: float) -> FitReport:
    """train_nll is left out: what was minimised is a mean over masks, `final_loss` (of the last tenth of the steps)."""
    own = {"final_loss": trained.final_loss, "entropy": posterior.entropy(), **details}
    return FitReport(
        method, posterior.family, len(job.train), trained.steps, trained.seconds,
        held_out_nll=held_out_nll(posterior, job), details=own,
    )  # fmt: skip
