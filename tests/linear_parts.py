"""A model that is linear in its adapter, so that posteriors over it have closed forms: f = B x, x looked up by id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlm_reason.weights import Example
from vlm_reason.weights.examples import Batch

UP = "base_model.model.linear.lora_B.weight"
DOWN = "base_model.model.linear.lora_A.weight"


class Lookup(nn.Module):
    """ids [B, 1] -> W table[ids], [B, 1, C]; W is 0."""

    def __init__(self, table: Tensor, outputs: int) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.linear = nn.Linear(table.shape[1], outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.table[ids])  # type: ignore[index]


def linear_model(table: Tensor, outputs: int) -> PeftModel:
    """The adapter's A is the identity and its scaling 1, so the layer's weight is its B, [outputs, features]."""
    size = table.shape[1]
    config = LoraConfig(r=size, lora_alpha=size, target_modules=["linear"])
    model = get_peft_model(Lookup(table, outputs), config)  # type: ignore[arg-type]
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(size))
    return model


def up_of(model: PeftModel) -> nn.Parameter:
    return model.base_model.model.linear.lora_B["default"].weight


def rows(targets: Tensor) -> list[Example]:
    return [Example(f"e{n}", (n,), t) for n, t in enumerate(targets.tolist())]


@dataclass(frozen=True)
class Linear:
    """Any likelihood with the outputs of `Lookup`."""

    inner: Any

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.input_ids[:, :1])[:, 0].float()

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        return self.inner.log_prob(f, batch)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        return self.inner.sample(f, generator)

    def hessian(self, f: Tensor) -> Tensor:
        return self.inner.hessian(f)

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return self.inner.residual(f, batch)
