"""An ensemble for little more than one adapter: members share A and B and differ by rank-1 factors (BatchEnsemble, Wen
et al. 2020, arXiv 2002.06715), here of a LoRA. (LoRA-Ensemble, arXiv 2405.14438, has a whole adapter a member.)

    W_i x = W x + s r_i * (B A (s_i * x)),      so member i is a LoRA with A_i = A diag(s_i), B_i = diag(r_i) B

M members cost P + M (m + n) per layer of m by n in training, and are kept as M adapters. All train at once: every row
of a batch goes through a member that hash(seed, step, example) picks, in one forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from ...compat.peft import Update, lora_updates
from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict, whole
from ..artefact import Tree
from ..chains import check_method
from ..continual import start_from
from ..examples import Batch
from ..families.particles import Particles
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..noise import REQUESTED, Draw
from ..per_row import A, B, by_row
from ..posterior import Origin, Posterior
from ..training import negative_log_likelihood, train


@dataclass(frozen=True)
class BatchEnsemble:
    """members: M >= 2. spread: r_i and s_i start at 1 + spread z, by the job's seed; at 0 all members would stay equal.
    The mean is that of the members, which share their gauge. Weight decay is not applied to r_i and s_i.

    Each member sees 1/M of the rows, so give it more epochs than one adapter. When not to use it: where an ensemble of
    whole adapters is affordable: members that share A and B disagree less. UserError for adapters without a plain LoRA
    linear layer.
    """

    members: int = 4
    spread: float = 0.5

    def __post_init__(self) -> None:
        if self.members < 2:
            raise UserError(f"batch_ensemble: members must be at least 2, got {self.members}")
        if not self.spread > 0:
            raise UserError(f"batch_ensemble: spread must be > 0, got {self.spread}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        start_from(job)
        factors = RankOneFactors.around_one(job, self.members, self.spread)
        step = _Step(self)

        def loss(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
            which = members_of(batch.ids, self.members, job.seed, step.now)
            with factors.in_rows(model, which):
                return negative_log_likelihood(model, batch, likelihood)

        def make_optimizer(chosen: list[nn.Parameter], _: int) -> torch.optim.Optimizer:
            own = {id(p) for p in factors.parameters()}
            shared = [p for p in chosen if id(p) not in own]
            t = job.training
            groups: list[dict[str, Any]] = [
                {"params": shared, "weight_decay": t.weight_decay},
                {"params": factors.parameters(), "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, lr=t.learning_rate)

        adapter = cast("dict[str, nn.Parameter]", adapter_tensors(job.model, job.adapter))
        parameters = [*adapter.values(), *factors.parameters()]
        trained = train(
            job, loss=loss, make_optimizer=make_optimizer, parameters=parameters, callbacks=[step],
            name="batch_ensemble",
        )  # fmt: skip
        origin = Origin(base_fingerprint(job.model), data_size=len(job.train))
        posterior = Particles(peft_config_dict(job.model, job.adapter), factors.trees(job), origin)
        report = FitReport(
            "batch_ensemble", posterior.family, len(job.train), trained.steps, trained.seconds, trained.final_loss,
            held_out_nll(posterior, job, self.members), {"members": self.members},
        )  # fmt: skip
        posterior.write(job.model, posterior.mean(), job.adapter)
        return posterior, report


def members_of(ids: Sequence[str], members: int, seed: int, step: int) -> Tensor:
    """The member of each row [B], by its example and the step: micro-batches and processes make no difference."""
    digests = (hashlib.blake2b(f"{seed}\x1f{step}\x1f{i}".encode(), digest_size=8).digest() for i in ids)
    return torch.tensor([int.from_bytes(d, "little") % members for d in digests])


@dataclass(frozen=True)
class RankOneFactors:
    """inputs: layer -> s [M, in]; outputs: layer -> r [M, out]; layers by what their keys have before lora_A."""

    inputs: dict[str, nn.Parameter]
    outputs: dict[str, nn.Parameter]
    adapter: str

    @staticmethod
    def around_one(job: Job, members: int, spread: float) -> RankOneFactors:
        tensors = adapter_tensors(job.model, job.adapter)
        with lora_updates(job.model, job.adapter, lambda name, layer: lambda x: x) as offered:
            names = [name for name in offered if name + A in tensors]
        if not names:
            raise UserError("batch_ensemble: the adapter has no plain LoRA linear layer to modulate")
        inputs: dict[str, nn.Parameter] = {}
        outputs: dict[str, nn.Parameter] = {}
        for number, name in enumerate(names):
            a, b = tensors[name + A], tensors[name + B]
            for place, (into, size) in enumerate(((inputs, a.shape[1]), (outputs, b.shape[0]))):
                z = _normals(Draw(job.seed, REQUESTED, number, place), members, size)
                into[name] = nn.Parameter((1 + spread * z).to(a.device))
        return RankOneFactors(inputs, outputs, job.adapter)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.inputs.values(), *self.outputs.values()]

    @contextmanager
    def in_rows(self, model: PeftModel, which: Tensor) -> Iterator[None]:
        """Inside, row b of a batch goes through member which[b]."""

        def make(name: str, layer: Any) -> Update | None:
            if name not in self.inputs:
                return None
            a, b = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
            rows = which.to(a.device)
            s, r = self.inputs[name][rows], self.outputs[name][rows]
            scaling = float(layer.scaling[self.adapter])

            def update(x: Tensor) -> Tensor:
                return F.linear(F.linear(x.to(a.dtype) * by_row(s, x), a), b) * by_row(r, x) * scaling

            return update

        with lora_updates(model, self.adapter, make):
            yield

    def trees(self, job: Job) -> list[Tree]:
        """The members as adapters: columns of A times s_i, rows of B times r_i."""
        shared = {key: whole(p) for key, p in adapter_tensors(job.model, job.adapter).items()}
        members = len(next(iter(self.inputs.values())))
        trees = [dict(shared) for _ in range(members)]
        for name, s in self.inputs.items():
            for i, tree in enumerate(trees):
                tree[name + A] = shared[name + A] * whole(s[i])
                tree[name + B] = shared[name + B] * whole(self.outputs[name][i])[:, None]
        return trees


def _normals(draw: Draw, rows: int, size: int) -> Tensor:
    """[rows, size], a block of noise a row."""
    return torch.stack([draw.normal(row, size, torch.device("cpu")) for row in range(rows)])


class _Step(TrainerCallback):
    """The number of the step under way."""

    def __init__(self, method: BatchEnsemble) -> None:
        self.now, self.method = 0, method

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.now = state.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"method": repr(self.method)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_method(self.method, state["method"])
