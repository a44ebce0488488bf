"""Several adapters of one shape in one forward: each row of a batch goes through its own.

    y_r = W x_r + s B_r A_r x_r          one product with W for all rows, a batched one with the small factors

`draws_in_rows`: S draws of a posterior. The model is given B rows and answers S B, draw by draw; layers below the first
one that any draw changes run on B rows alone. Equal to S passes one after another up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..compat.peft import Update, lora_updates
from ..errors import UserError
from .artefact import Tree

A, B = ".lora_A.weight", ".lora_B.weight"
Stack = Mapping[str, Tensor]
"""PEFT key -> [S, *shape]."""


def stack(trees: Iterable[Tree]) -> dict[str, Tensor]:
    """S trees as one: PEFT key -> [S, *shape]; a key that is the same tensor value in all is kept as [1, *shape]."""
    draws = list(trees)
    stacked = {}
    for key in draws[0]:
        values = [tree[key] for tree in draws]
        same = all(torch.equal(values[0], v) for v in values[1:])
        stacked[key] = values[0][None] if same else torch.stack(values)
    return stacked


@contextmanager
def draws_in_rows(model: PeftModel, draws: Stack, adapter: str = "default") -> Iterator[int]:
    """Inside, `model` answers B rows with S B rows: rows s B to (s + 1) B - 1 are what draw s says. Gives the number of
    the decoder layer from which on draws differ. Works with gradients with respect to the tensors of `draws`.

    UserError for draws that change anything but plain LoRA factors of linear layers inside the decoder layers.
    """
    count = max(len(v) for v in draws.values())
    varied = {key for key, value in draws.items() if len(value) > 1}
    layers = decoder_layers(model)
    first = min((_layer_of(key) for key in varied), default=0)
    used: set[str] = set()

    def make(name: str, layer: Any) -> Update | None:
        if name + A not in draws:
            return None
        used.update((name + A, name + B))
        return _row_update(draws[name + A], draws[name + B], float(layer.scaling[adapter]), layer.weight)

    with lora_updates(model, adapter, make):
        left = sorted(draws.keys() - used)
        if left:
            raise UserError(f"draws in one forward: only plain LoRA linear layers, not {left[0]!r}")
        with _expanded(list(layers)[first:], count):
            yield first


def _row_update(a: Tensor, b: Tensor, scaling: float, weight: Tensor) -> Update:
    """a [S or 1, r, in], b [S or 1, out, r]."""
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32) * scaling
    if not weight.is_floating_point():
        dtype = torch.float32
    else:
        dtype = weight.dtype
    down, up = a.to(dtype).transpose(1, 2), b.to(dtype).transpose(1, 2)

    def update(x: Tensor) -> Tensor:
        shape, x = x.shape, x.to(dtype)
        return _times(_times(x.reshape(-1, shape[-2], shape[-1]), down), up).reshape(
            *shape[:-1], up.shape[-1]
        )

    return update


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x [S k, T, i] times factor [S or 1, i, o]."""
    if len(factor) == 1:
        return x @ factor[0]
    rows, tokens, size = x.shape
    return torch.bmm(x.reshape(len(factor), -1, size), factor).reshape(rows, tokens, -1)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of blocks a causal model is a chain of."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and re.search(r"(^|\.)(layers|h|blocks)$", name):
            return module
    raise UserError("the model has no list of decoder layers named layers, h or blocks")


def _layer_of(key: str) -> int:
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", key)
    if found is None:
        raise UserError(f"draws in one forward: {key!r} is not inside a decoder layer")
    return int(found[1])


@contextmanager
def _expanded(layers: Sequence[nn.Module], copies: int) -> Iterator[None]:
    """The first of `layers` sees its rows `copies` times over; the others get what was made for B rows that often."""
    size: list[int] = []  # B

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        size[:] = [len(hidden)]
        args, kwargs = _repeat(args, size[0], copies), _repeat(kwargs, size[0], copies)
        return args, kwargs

    def other(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0], *_repeat(args[1:], size[0], copies)) if args else args, {
            k: v if k == "hidden_states" else _repeat(v, size[0], copies) for k, v in kwargs.items()
        }

    handles = [
        layer.register_forward_pre_hook(other if n else first, with_kwargs=True)
        for n, layer in enumerate(layers)
    ]
    try:
        if copies == 1:
            for handle in handles:
                handle.remove()
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeat(value: Any, rows: int, copies: int) -> Any:
    """Tensors of `rows` rows `copies` times over; what has another first dimension (tables of positions) stays."""
    if isinstance(value, Tensor):
        return (
            value.repeat(copies, *[1] * (value.ndim - 1))
            if value.ndim and len(value) == rows and rows > 0
            else value
        )
    if isinstance(value, tuple):
        return tuple(_repeat(v, rows, copies) for v in value)
    if isinstance(value, dict):
        return {k: _repeat(v, rows, copies) for k, v in value.items()}
    return value
