"""df / dtheta of every example: one backward pass an output, all examples at once.

Each row of the batch gets its own copy of the adapter's factors, so the gradient of sum_b f_bc with respect to the
copies is the Jacobian row of every example by itself. Memory: B times the adapter, for each of C outputs.

Weights that are no plain LoRA factors (DoRA, embeddings, saved modules) take a backward pass an example and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from ..compat.peft import Update, lora_updates
from .adapter import adapter_tensors
from .examples import Batch
from .likelihoods import Likelihood
from .per_row import A, B, row_update


def jacobians(
    model: PeftModel,
    batch: Batch,
    likelihood: Likelihood,
    keys: Sequence[str] | None = None,
    adapter: str = "default",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(f [B, C], {key: J [B, C, *shape]}), fp32, at the weights the adapter holds now. keys: which tensors of the
    adapter (default all of them). Layers below the first of them are not differentiated."""
    tensors = adapter_tensors(model, adapter)
    wanted = list(tensors) if keys is None else list(keys)
    copies: dict[str, Tensor] = {}

    def make(name: str, layer: object) -> Update | None:
        both = name + A, name + B
        if not any(key in wanted for key in both):
            return None
        for key in both:
            own = tensors[key].detach().float()[None]
            copies[key] = own.repeat(len(batch), 1, 1).requires_grad_() if key in wanted else own
        scaling = float(layer.scaling[adapter])  # type: ignore[attr-defined]
        return row_update(copies[both[0]], copies[both[1]], scaling)

    with torch.enable_grad(), lora_updates(model, adapter, make):
        if set(wanted) <= copies.keys():
            f = likelihood.outputs(model, batch)
            leaves = [copies[key] for key in wanted]
            rows = [
                torch.autograd.grad(f[:, c].sum(), leaves, retain_graph=c + 1 < f.shape[1])
                for c in range(f.shape[1])
            ]
            return f.detach(), {key: torch.stack([row[n] for row in rows], 1) for n, key in enumerate(wanted)}
    with torch.enable_grad():
        return _one_by_one(model, batch, likelihood, {key: tensors[key] for key in wanted})


def _one_by_one(
    model: PeftModel, batch: Batch, likelihood: Likelihood, parameters: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    frozen = [p for p in parameters.values() if not p.requires_grad]
    leaves = list(parameters.values())
    outputs, rows = [], []
    try:
        for p in frozen:
            p.requires_grad_(True)
        for n in range(len(batch)):
            f = likelihood.outputs(model, batch.rows([n]))[0]
            outputs.append(f.detach())
            rows.append([
                torch.autograd.grad(f[c], leaves, retain_graph=c + 1 < len(f), materialize_grads=True)
                for c in range(len(f))
            ])  # fmt: skip
    finally:
        for p in frozen:
            p.requires_grad_(False)
    found = {
        key: torch.stack([torch.stack([row[c][k] for c in range(len(row))]) for row in rows]).float()
        for k, key in enumerate(parameters)
    }
    return torch.stack(outputs), found
