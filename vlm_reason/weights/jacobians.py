"""df / dtheta of every example: one backward pass an output, all examples at once.

Each row of the batch gets its own copy of the adapter's factors, so the gradient of sum_b f_bc with respect to the
copies is the Jacobian row of every example by itself. Memory: B times the adapter, for each of C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from ..compat.peft import Update, lora_updates
from .examples import Batch
from .likelihoods import Likelihood
from .per_row import A, B, _row_update
from .posterior import adapter_tensors


def jacobians(
    model: PeftModel,
    batch: Batch,
    likelihood: Likelihood,
    keys: Sequence[str] | None = None,
    adapter: str = "default",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(f [B, C], {key: J [B, C, *shape]}), fp32, at the weights the adapter holds now. keys: which tensors of the
    adapter (default all of them; plain LoRA factors)."""
    tensors = adapter_tensors(model, adapter)
    wanted = list(tensors) if keys is None else list(keys)
    copies = {
        key: tensors[key].detach().float()[None].repeat(len(batch), 1, 1).requires_grad_(key in set(wanted))
        for key in tensors
    }

    def make(name: str, layer: object) -> Update:
        scaling = float(layer.scaling[adapter])  # type: ignore[attr-defined]
        return _row_update(copies[name + A], copies[name + B], scaling, layer.weight)  # type: ignore[attr-defined]

    with torch.enable_grad(), lora_updates(model, adapter, make):
        f = likelihood.outputs(model, batch)
        leaves = [copies[key] for key in wanted]
        rows = [
            torch.autograd.grad(f[:, c].sum(), leaves, retain_graph=c + 1 < f.shape[1])
            for c in range(f.shape[1])
        ]
    return f.detach(), {key: torch.stack([row[n] for row in rows], 1) for n, key in enumerate(wanted)}
