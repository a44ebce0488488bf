"""Several adapters of one shape in one forward: each row of a batch goes through its own.

    y_r = W x_r + s B_r A_r x_r          one product with W for all rows, a batched one with the small factors

`draws_in_rows`: S draws of a posterior. The model is given B rows and answers S B, draw by draw; layers below the first
one that any draw changes run on B rows alone. Equal to S passes one after another up to rounding.

Factors stay in fp32 under a base in bf16 or quantised, as PEFT keeps them: a draw differs from the mean by less than
bf16 resolves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..compat.peft import Update, lora_updates
from ..errors import UserError
from ..scoring.enter import unwrap
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
def draws_in_rows(
    model: PeftModel, draws: Stack, adapter: str = "default", repeat: bool = True
) -> Iterator[int]:
    """Inside, `model` answers B rows with S B rows: rows s B to (s + 1) B - 1 are what draw s says. Gives the number of
    the decoder layer from which on draws differ; their number where only the LM head does. Works with gradients with
    respect to the tensors of `draws`.

    repeat=False: the model is given S B rows, draw by draw, itself (decoding, where draws go on differently).
    What is read behind an adapter on the LM head must be as many rows a draw, draw by draw, too.

    UserError for draws that change anything but plain LoRA factors of linear layers in the decoder or the LM head.
    Tensors of other kinds must hold in the model what all draws have.
    """
    count = max(len(v) for v in draws.values())
    chain = _Chain.of(model)
    first = min((chain.place(key) for key, value in draws.items() if len(value) > 1), default=0)
    used: set[str] = set()

    def make(name: str, layer: Any) -> Update | None:
        if name + A not in draws:
            return None
        used.update((name + A, name + B))
        return row_update(draws[name + A], draws[name + B], float(layer.scaling[adapter]))

    with ExitStack() as inside:
        inside.enter_context(lora_updates(model, adapter, make))
        for key in sorted(draws.keys() - used):
            if len(draws[key]) > 1:
                raise UserError(f"draws in one forward: only plain LoRA linear layers, not {key!r}")
        if repeat and count > 1:
            inside.enter_context(_expanded(chain.layers, first, count))
        yield first


def row_update(a: Tensor, b: Tensor, scaling: float) -> Update:
    """a [S or 1, r, in], b [S or 1, out, r]: x [S k, ..., in] -> s B_r A_r x_r [S k, ..., out], fp32; each of the S
    gets k rows in turn."""
    cache: list[tuple[Tensor, Tensor]] = []

    def factors(device: torch.device) -> tuple[Tensor, Tensor]:
        if cache and cache[0][0].device == device:
            return cache[0]
        down = a.to(device, torch.float32).transpose(1, 2)
        up = (b.to(device, torch.float32) * scaling).transpose(1, 2)
        if not (a.requires_grad or b.requires_grad):  # with gradients every forward needs a graph of its own
            cache[:] = [(down, up)]
        return down, up

    def update(x: Tensor) -> Tensor:
        down, up = factors(x.device)
        copies = max(len(down), len(up))
        rows = x.reshape(copies, -1, x.shape[-1]).to(down.dtype)
        return _times(_times(rows, down), up).reshape(*x.shape[:-1], up.shape[-1])

    return update


def by_row(values: Tensor, x: Tensor) -> Tensor:
    """values [R, n], shaped to multiply x [R, ..., n] row by row. UserError for an x of other rows: an LM head under a
    token likelihood is given positions, not examples."""
    if len(x) != len(values):
        raise UserError(
            f"a layer was given {len(x)} rows for {len(values)} examples: where every example goes through weights of "
            "its own it needs one row an example; leave the LM head out of the adapter"
        )
    return values.view(len(values), *[1] * (x.ndim - 2), -1)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x [S, R, i] times factor [S or 1, i, o]."""
    return x @ factor[0] if len(factor) == 1 else torch.bmm(x, factor)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of blocks a causal model is a chain of; of a vision-language model, those of its decoder."""
    return _layers_and_name(model)[0]


def _layers_and_name(model: nn.Module) -> tuple[nn.ModuleList, str]:
    causal = unwrap(model)
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else causal
    if decoder is None:
        decoder = causal
    inner = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) in inner and _BLOCKS.search(name):
            return module, name
    raise UserError("the model has no list of decoder layers named layers, h or blocks")


_BLOCKS = re.compile(r"(^|\.)(layers|h|blocks)$")


@dataclass(frozen=True)
class _Chain:
    """Where a model's adapters are: layers, the name of their list, the name of the LM head."""

    layers: nn.ModuleList
    name: str
    head: str | None

    @staticmethod
    def of(model: nn.Module) -> _Chain:
        layers, name = _layers_and_name(model)
        output = unwrap(model).get_output_embeddings()
        head = (
            next((n for n, m in model.named_modules() if m is output), None) if output is not None else None
        )
        return _Chain(layers, name, head)

    def holds(self, key: str) -> bool:
        in_head = self.head is not None and key in (self.head + A, self.head + B)
        return in_head or key.startswith(self.name + ".")

    def place(self, key: str) -> int:
        """Number of the layer that `key` belongs to; that of the layers for the LM head."""
        if key.startswith(self.name + "."):
            return int(key[len(self.name) + 1 :].split(".")[0])
        if self.head is not None and key in (self.head + A, self.head + B):
            return len(self.layers)
        raise UserError(f"draws in one forward: {key!r} is neither in a decoder layer nor in the LM head")


def in_head(model: nn.Module, key: str) -> bool:
    """Whether `key` is a LoRA factor of the LM head."""
    head = _Chain.of(model).head
    return head is not None and key.startswith(head + ".")


def can_differ_by_row(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Those of `keys` that lie in a decoder layer or in the LM head, where draws may differ in one forward."""
    chain = _Chain.of(model)
    return {key for key in keys if chain.holds(key)}


@contextmanager
def _expanded(layers: nn.ModuleList, first: int, copies: int) -> Iterator[None]:
    """Layer `first` sees its rows `copies` times over; those behind it get what was made for B rows that often. Where
    `first` is none of them, what the last one gives is repeated."""
    size: list[int] = []  # B

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        size[:] = [len(hidden)]
        return _repeat(args, size[0], copies), _repeat(kwargs, size[0], copies)

    def go_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rest = {k: v if k == "hidden_states" else _repeat(v, size[0], copies) for k, v in kwargs.items()}
        return (args[0], *_repeat(args[1:], size[0], copies)) if args else args, rest

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        return _repeat(output, len(hidden), copies)

    blocks: Sequence[nn.Module] = list(layers)
    if first == len(blocks):
        handles = [blocks[-1].register_forward_hook(leave)]
    else:
        handles = [
            layer.register_forward_pre_hook(go_on if n else enter, with_kwargs=True)
            for n, layer in enumerate(blocks[first:])
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _repeat(value: Any, rows: int, copies: int) -> Any:
    """Tensors of `rows` rows `copies` times over. What has another first dimension (a row of positions for all) stays,
    and so does what has no second one (positions in the cache)."""
    if isinstance(value, Tensor):
        if value.ndim < 2 or len(value) != rows or rows == 0:
            return value
        return value.repeat(copies, *[1] * (value.ndim - 1))
    if isinstance(value, tuple):
        return tuple(_repeat(v, rows, copies) for v in value)
    if isinstance(value, dict):
        return {k: _repeat(v, rows, copies) for k, v in value.items()}
    return value
