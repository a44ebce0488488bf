"""The tree scorer: log-probabilities of many sequences from one row that holds every shared token once.

    sequences (context, target) -> forest -> one decoder pass [1, S] -> rows that predict a wanted token -> LM head

K traces of T tokens behind a prompt of P take P + K T tokens in place of K (P + T), answers behind each trace add only
their own, and nothing is padded. Training, prefix rewards and ranking score through here.

How a model takes a forest depends on its attention:

    tree    SDPA: tree attention in blocks (attention.py)
    mask    eager or flex attention: the forest's mask is handed to the model's own attention
    packed  flash attention, which knows sequences but no branches: a forest of single paths, positions starting anew
    padded  recurrent layers, ALiBi, chunked attention: no forest can be expressed; a padded batch (padded.py)

The last two say once that prefixes are not shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.transformers import attention_kind, attention_of
from .attention import NAME, REPLACES, block_mask, tree_attention
from .enter import entered, unwrap
from .forest import Forest, TokenPair, Wanted, grow
from .head import head_logprobs

Way = Literal["tree", "mask", "packed", "padded"]

Reader = Callable[[PreTrainedModel, Tensor, Tensor, float, float], Tensor]
"""(causal, hidden [R, H], targets [R], temperature, top_p) -> [R] or [R, C] fp32: what is read at the wanted rows."""

_ATTENTION = {
    "recurrent": "recurrent layers",
    "own": "attention of its own making (ALiBi, or written before transformers' attention interface)",
}


def way(model: nn.Module) -> Way:
    """How `model` takes a forest."""
    causal = unwrap(model)
    kind, name = attention_of(causal), type(causal).__name__
    layers = set(getattr(causal.config.get_text_config(), "layer_types", None) or ())
    unknown = layers - {"full_attention", "sliding_attention"}
    if kind != "softmax" or unknown:
        what = f"layers of type {sorted(unknown)}" if kind == "softmax" else _ATTENTION[kind]
        _once(
            f"{name} has {what}, which no prefix tree can express: sequences are padded, prefixes run again"
        )
        return "padded"
    implementation = attention_kind(causal)
    if implementation in (*REPLACES, NAME):
        return "tree"
    if implementation in ("eager", "flex_attention"):
        return "mask"
    _once(
        f"{name} runs {implementation}, which knows no branches: sequences are packed without padding, but shared "
        "prefixes run again; load it with sdpa attention to share them"
    )
    return "packed"


def score_tree(
    model: nn.Module,
    sequences: Sequence[TokenPair],
    temperature: float = 1.0,
    top_p: float = 1.0,
    wanted: Wanted | None = None,
    read: Reader = head_logprobs,
) -> tuple[Tensor, Tensor]:
    """log p(target | context) token by token, as `logprobs.score_sequences` says. The model takes forests (`way`)."""
    device = next(model.parameters()).device

    def values(inputs: Sequence[tuple[int, ...]], mask: Tensor) -> Tensor:
        how = way(model)
        forest = grow(inputs, how != "packed")
        pairs, place = _labels(forest, sequences, mask)
        rows, targets = torch.tensor(pairs, device=device).unbind(1)
        ids = torch.from_numpy(forest.ids).to(device)[None]
        position = torch.from_numpy(forest.position).to(device)[None]

        def body(causal: PreTrainedModel) -> Tensor:
            with tree_attention(causal):
                hidden = causal.get_decoder()(
                    input_ids=ids,
                    position_ids=position,
                    use_cache=False,
                    **_structure(causal, forest, how, device),
                ).last_hidden_state[0]  # [S, H]
            return read(causal, hidden.index_select(0, rows), targets, temperature, top_p)

        return entered(model, body)[torch.tensor(place, device=device)]

    return at_wanted(sequences, wanted, device, values)


def at_wanted(
    sequences: Sequence[TokenPair],
    wanted: Wanted | None,
    device: torch.device,
    values: Callable[[Sequence[tuple[int, ...]], Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`values` of the W wanted targets, [W] or [W, C], from what is forwarded of each sequence and the mask [N, T] on
    the CPU; laid out as [N, T] or [N, T, C], with the mask. Where nothing is wanted nothing is forwarded."""
    mask = wanted_mask(sequences, wanted)
    if not bool(mask.any()):
        return torch.zeros(mask.shape, dtype=torch.float32, device=device), mask.to(device)
    found = values([inputs_of(pair, keep) for pair, keep in zip(sequences, mask, strict=True)], mask)
    mask = mask.to(device)
    return laid_out(found, mask), mask


def laid_out(values: Tensor, mask: Tensor) -> Tensor:
    """What was read at the wanted targets, [W] or [W, C], at their places: [N, T] or [N, T, C], 0 elsewhere."""
    if values.dim() > 1:
        mask = mask[..., None].expand(*mask.shape, values.shape[-1])
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, values)


def wanted_mask(sequences: Sequence[TokenPair], wanted: Wanted | None) -> Tensor:
    """[N, longest target] bool on the CPU: the target tokens that are scored. ValueError for a wanted target that
    nothing precedes."""
    lengths = [len(target) for _, target in sequences]
    mask = torch.zeros(len(sequences), max(lengths, default=0), dtype=torch.bool)
    for n, (context, target) in enumerate(sequences):
        mask[n, : len(target)] = True if wanted is None else torch.tensor(wanted[n], dtype=torch.bool)
        if not len(context) and bool(mask[n].any()):
            raise ValueError(
                f"sequence {n} has an empty context: its first target has nothing to be conditioned on"
            )
    return mask


def inputs_of(pair: TokenPair, keep: Tensor) -> tuple[int, ...]:
    """What of a sequence is forwarded: everything before its last wanted target."""
    context, target = pair
    last = int(keep.nonzero()[-1]) if bool(keep.any()) else -1
    return (*context, *target[:last]) if last >= 0 else ()


def _labels(
    forest: Forest, sequences: Sequence[TokenPair], mask: Tensor
) -> tuple[list[tuple[int, int]], list[int]]:
    """Distinct (row that predicts, target token), and for every wanted target in order which of them it is."""
    index: dict[tuple[int, int], int] = {}
    place = []
    for n, t in mask.nonzero().tolist():
        context, target = sequences[n]
        pair = (int(forest.paths[n][len(context) + t - 1]), int(target[t]))
        place.append(index.setdefault(pair, len(index)))
    return list(index), place


def _structure(causal: PreTrainedModel, forest: Forest, how: Way, device: torch.device) -> dict[str, Any]:
    """What the decoder needs beside ids and positions to know who attends to whom."""
    if how == "tree":
        return {"tree": forest}
    if how == "packed":  # transformers reads sequence boundaries from positions that start anew
        return {}
    config = causal.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" in layers:
        return {
            "attention_mask": {
                "full_attention": _own_mask(causal, forest, None, device),
                "sliding_attention": _own_mask(causal, forest, window, device),
            }
        }
    everywhere = window if layers is None and getattr(config, "use_sliding_window", True) else None
    return {"attention_mask": _own_mask(causal, forest, everywhere, device)}


def _own_mask(causal: PreTrainedModel, forest: Forest, window: int | None, device: torch.device) -> Any:
    if attention_kind(causal) == "flex_attention":
        return block_mask(forest, window, device)
    allowed = forest.mask(0, len(forest), window).to(device)
    least = torch.finfo(causal.dtype).min
    return torch.zeros(allowed.shape, dtype=causal.dtype, device=device).masked_fill_(~allowed, least)[
        None, None
    ]


_said: set[str] = set()


def _once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
