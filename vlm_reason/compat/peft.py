"""LoRA layers of PEFT, without gradient: the same update in the base model's own dtype, with a third of the operations.

    y = W x + s B A x

PEFT casts x to the adapter's fp32, multiplies there, scales, adds and casts back: right for training, and a good part
of the time of a decoding step of a small bf16 model on a CPU. Here A and s B are cast once. In fp32 the result is
PEFT's to rounding; in bf16 it differs by the rounding of the update, which is smaller than that of W x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import Linear
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
"""x [R, T, in] -> what the adapter adds to W x, [R, T, out]."""


@contextmanager
def lora_updates(
    model: nn.Module, adapter: str, make: Callable[[str, Linear], Update | None]
) -> Iterator[list[str]]:
    """Inside the block, a plain LoRA linear layer gives base(x) + update(x) with what `make(name, layer)` returns; None
    leaves the layer to PEFT. Gives the names replaced: what a layer's keys have before `.lora_A.weight` in an
    adapter file. Works with gradients. A layer of another kind that holds `adapter` (DoRA, embeddings, convolutions,
    saved modules) is not offered."""
    replaced: list[Linear] = []
    names: list[str] = []
    try:
        for name, module in model.named_modules():
            if type(module) is not Linear or adapter not in module.lora_A or adapter in module.lora_variant:
                continue
            if (update := make(name, module)) is not None:
                module.forward = _with_update(module.base_layer, update)  # type: ignore[method-assign, assignment]
                replaced.append(module)
                names.append(name)
        yield names
    finally:
        for module in replaced:
            del module.forward


def _with_update(base: nn.Module, update: Update) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = base(x)
        return y + update(x).to(y.dtype)

    return forward
