"""Run what is never trained once: the frozen layers below the first adapter, for every token of every example.

    top, own = above_trunk(model, first, [train, test])      # a model and examples that begin at layer `first`

The hidden state in front of layer `first` becomes the embedding of a token of its own, so `own` are the same examples
under other ids, and everything that takes a model and examples (training, Jacobians, draws in rows, likelihoods) works
on `top` as on `model`, with the same results. The layers keep their numbers: an adapter trained on `top` fits `model`.
Memory: hidden size x tokens, in the model's dtype.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..models.adapters import AdapterConfig
from .examples import Batch, Example, make_batch
from .per_row import decoder_layers

_TOLERANCE = 1e-3  # of the largest hidden value


class _Passed(nn.Module):
    """A layer that has been run already."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def first_adapted_layer(model: nn.Module, adapter: AdapterConfig) -> int:
    """The lowest decoder layer that `adapter` changes: the first of `layers`, else the first with a module that
    `target_modules` names (by full match of a regular expression, or by the end of its name); 0 for `all-linear`."""
    target = adapter.target_modules
    if adapter.layers is not None:
        return min(adapter.layers)
    if target == "all-linear":
        return 0
    layers = []
    for name, _ in model.named_modules():
        found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        hit = (
            re.fullmatch(target, name)
            if isinstance(target, str)
            else any(name == t or name.endswith(f".{t}") for t in target)
        )
        if found and hit:
            layers.append(int(found[1]))
    return min(layers, default=0)


@torch.no_grad()
def above_trunk(
    model: PreTrainedModel, first: int, parts: Sequence[Sequence[Example]], tokens: int = 4096
) -> tuple[PreTrainedModel, list[tuple[Example, ...]]]:
    """`model` from layer `first` on, sharing its weights, and `parts` of examples for it. `model` stays as it is.

    UserError where the upper half does not give what the whole gives: a model that does more between its embeddings
    and its layers than hand the hidden states on.
    """
    layers = decoder_layers(model)
    if not 0 <= first < len(layers):
        raise UserError(f"the trunk must end before one of the {len(layers)} decoder layers, got {first}")
    examples = [e for part in parts for e in part]
    rows: dict[tuple[int, ...], int] = {}  # sequence -> id of its first token
    sequences = list(dict.fromkeys(seq for e in examples for seq in (e.ids, e.rejected) if seq))
    sequences.sort(key=len)
    hidden: list[Tensor] = []
    at = 0
    while sequences:
        batch = [sequences.pop()]
        while sequences and (len(batch) + 1) * len(batch[0]) <= tokens:
            batch.append(sequences.pop())
        states = _before(model, layers[first], make_batch([Example("", ids) for ids in batch]))
        for ids, state in zip(batch, states, strict=True):
            hidden.append(state[: len(ids)])
            rows[ids] = at
            at += len(ids)
    table = torch.cat(hidden)
    top = _upper(model, first, table)

    def renamed(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(range(rows[ids], rows[ids] + len(ids))) if ids else ()

    own = [
        tuple(replace(e, ids=renamed(e.ids), rejected=renamed(e.rejected)) for e in part) for part in parts
    ]
    _check(model, top, examples[0], next(e for part in own for e in part))
    return top, own


def _before(model: PreTrainedModel, layer: nn.Module, batch: Batch) -> Tensor:
    """What `layer` is given, [B, T, H]; the layers above it do not run."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(input_ids=batch.input_ids.to(model.device), use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


class _Enough(Exception):
    pass


def _upper(model: PreTrainedModel, first: int, table: Tensor) -> PreTrainedModel:
    memo = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}  # weights are shared
    top = copy.deepcopy(model, memo)
    layers = decoder_layers(top)
    for n in range(first):
        layers[n] = _Passed()
    embedding = nn.Embedding(len(table), table.shape[1], device=table.device, dtype=table.dtype)
    embedding.weight.data.copy_(table)
    top.set_input_embeddings(embedding.requires_grad_(False))
    return top


def _check(model: PreTrainedModel, top: PreTrainedModel, before: Example, after: Example) -> None:
    whole, half = (
        m.base_model(
            input_ids=torch.tensor([e.ids], device=m.device), use_cache=False
        ).last_hidden_state.float()
        for m, e in ((model, before), (top, after))
    )
    apart, size = float((whole - half).abs().max()), float(whole.abs().max())
    if not apart <= _TOLERANCE * size + (0.05 * size if model.dtype == torch.bfloat16 else 0):
        raise UserError(
            f"this model's upper layers alone do not give what it gives ({apart:.3g} apart, values up to "
            f"{size:.3g}): train on the whole model"
        )
