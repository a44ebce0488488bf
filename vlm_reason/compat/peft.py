"""LoRA layers of PEFT, without gradient: the same update in the base model's own dtype, with a third of the operations.

    y = W x + s B A x

PEFT casts x to the adapter's fp32, multiplies there, scales, adds and casts back: right for training, and a good part
of the time of a decoding step of a small bf16 model on a CPU. Here A and s B are cast once. In fp32 the result is
PEFT's to rounding; in bf16 it differs by the rounding of the update, which is smaller than that of W x itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def lean_lora(model: nn.Module) -> Iterator[None]:
    """Inside the block, plain LoRA linear layers of `model` take the short path; others (DoRA, several active adapters,
    merged, disabled) are left to PEFT. Only for no-grad use: weights are copied when the block is entered."""
    replaced: list[Linear] = []
    try:
        for module in model.modules():
            if type(module) is Linear and (short := _short_forward(module)) is not None:
                module.forward = short  # type: ignore[method-assign, assignment]
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward  # the instance's; the class's comes back


def _short_forward(layer: Linear) -> Callable[[Tensor], Tensor] | None:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    name = active[0]
    base = layer.base_layer
    if not isinstance(base, nn.Linear) or not isinstance(
        base.weight, Tensor
    ):  # quantised layers have a path of their own
        return None
    dtype = base.weight.dtype
    a, b = layer.lora_A[name], layer.lora_B[name]
    if (
        not isinstance(a, nn.Linear)
        or not isinstance(b, nn.Linear)
        or a.bias is not None
        or b.bias is not None
    ):
        return None
    if not dtype.is_floating_point:
        return None
    down = a.weight.detach().to(dtype)
    up = (b.weight.detach() * float(layer.scaling[name])).to(dtype)

    def forward(x: Tensor) -> Tensor:
        return base(x).add_(F.linear(F.linear(x, down), up))

    return forward


def is_lean(model: nn.Module) -> bool:
    """Whether any layer of `model` is on the short path now."""
    return any("forward" in vars(m) for m in model.modules() if type(m) is Linear)


Update = Callable[[Tensor], Tensor]
"""x [R, T, in] -> what the adapter adds to W x, but for a bias of B, [R, T, out]."""


@contextmanager
def lora_updates(
    model: nn.Module, adapter: str, make: Callable[[str, Linear], Update | None]
) -> Iterator[list[str]]:
    """Inside the block, a plain LoRA linear layer gives base(x) + update(x) with what `make(name, layer)` returns, and
    s b more where B has a bias b; None leaves the layer to PEFT. Gives the names replaced: what a layer's keys have
    before `.lora_A.weight` in an adapter file. Works with gradients. A layer of another kind that holds `adapter`
    (DoRA, embeddings, convolutions, saved modules) is not offered."""
    replaced: list[Linear] = []
    names: list[str] = []
    try:
        for name, module in model.named_modules():
            if type(module) is not Linear or adapter not in module.lora_A or adapter in module.lora_variant:
                continue
            if (update := make(name, module)) is not None:
                module.forward = _with_update(module, adapter, update)  # type: ignore[method-assign, assignment]
                replaced.append(module)
                names.append(name)
        yield names
    finally:
        for module in replaced:
            del module.forward


def _with_update(layer: Linear, adapter: str, update: Update) -> Callable[[Tensor], Tensor]:
    base, bias = layer.base_layer, cast("Tensor | None", layer.lora_B[adapter].bias)
    scaling = float(layer.scaling[adapter])

    def forward(x: Tensor) -> Tensor:
        y = base(x)
        added = update(x)
        if bias is not None:
            added = added + scaling * bias
        added = added.to(y.dtype)
        return y + added if torch.is_grad_enabled() else y.add_(added)

    return forward


def plain_lora_keys(model: PeftModel, adapter: str) -> set[str]:
    """Keys, as in an adapter file, of the factors that `lora_updates` would replace."""
    found: set[str] = set()

    def note(name: str, layer: Linear) -> None:
        if layer.lora_A[adapter].bias is None and layer.lora_B[adapter].bias is None:
            found.update((f"{name}.lora_A.weight", f"{name}.lora_B.weight"))

    with lora_updates(model, adapter, note):
        pass
    return found


def mixes_saved_modules(model: nn.Module) -> bool:
    """Whether PEFT's mixed batches take all modules that adapters of `model` keep whole: norms are refused there."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    saved = (m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
    return all(isinstance(m.original_module, kinds) for m in saved)


@contextmanager
def draws_as_adapters(
    model: PeftModel, adapter: str, draws: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[Callable[[Sequence[str]], AbstractContextManager[None]]]:
    """Inside the block, `model` holds one more adapter for each of `draws`, of the kind of `adapter`; what is given is
    a function: within `in_use(names)`, row r of a batch goes through adapter names[r] (PEFT's mixed batches: a loop
    over adapters in every layer). Afterwards they are gone, and everything is trainable or frozen as before."""
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    added: list[str] = []

    @contextmanager
    def in_use(names: Sequence[str]) -> Iterator[None]:
        with cast(Any, model.base_model)._enable_peft_forward_hooks(adapter_names=list(names)):
            yield

    try:
        for name, tree in draws.items():
            model.add_adapter(name, copy.deepcopy(model.peft_config[adapter]))
            added.append(name)
            set_peft_model_state_dict(model, dict(tree), adapter_name=name)
        model.eval()
        yield in_use
    finally:
        for name in added:
            model.delete_adapter(name)
        for name, p in model.named_parameters():
            if name in trainable:
                p.requires_grad_(trainable[name])
