"""Attention along the paths of a prefix forest.

A row of a tree attends to itself and its ancestors (forest.py). Rows are in depth-first order, so a segment's
descendants are the rows right behind it, and the whole of tree attention is made of contiguous blocks:

    every segment on itself                        causal
    everything behind a segment on that segment    full

No mask, no copy of a shared prefix, no operation on a pair that does not attend. Blocks are joined by their
log-normalisers, softmax over a union of keys being a mixture of the softmaxes over its parts:

    L = log(e^{L_1} + e^{L_2}),    o = e^{L_1 - L} o_1 + e^{L_2 - L} o_2

and the backward pass of a block is the ordinary one with the joint L and o (Ring Attention, Liu et al. 2023). Grouped
heads are not copied either: key heads go to the batch axis and their query heads see one key by stride 0.

That is the CPU's way. On CUDA the same law is a block mask of flex attention. A mask per tree through SDPA is the
reference, and what serves sliding windows shorter than a path, attention dropout and other devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from .enter import unwrap
from .forest import Forest, Segment

NAME = "prefix_tree"

REPLACES = ("sdpa", "folded_sdpa")
"""Attention kinds whose law tree attention computes: plain softmax attention, nothing added to the scores."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def tree_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, a model on SDPA attention takes forests (`tree=` in its decoder's call) and nothing else.
    Other kinds of attention are left alone. With gradient checkpointing the backward pass belongs inside too."""
    causal = unwrap(model)
    before = causal.config.get_text_config()._attn_implementation
    if before not in REPLACES:
        yield
        return
    AttentionInterface.register(NAME, attend)
    causal.set_attn_implementation(NAME)
    try:
        yield
    finally:
        causal.set_attn_implementation(before)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    tree: Forest | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,  # the signature transformers calls with
) -> tuple[Tensor, None]:
    """query [1, H, S, D], key and value [1, KV, S, D] of one forest -> [1, S, H, D], as transformers wants it."""
    if tree is None:
        raise RuntimeError(
            "within tree_attention the decoder must be given tree=Forest; leave the block first"
        )
    if torch.is_autocast_enabled(
        query.device.type
    ):  # as SDPA itself would cast; rotary embeddings leave q, k in fp32
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    kv, width = key.shape[1], tree.depth
    window = sliding_window if sliding_window is not None and sliding_window < width else None
    q = query[0].unflatten(0, (kv, -1))  # [KV, H/KV, S, D], a view
    k = key[0].unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    v = value[0].unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and not dropout:
        out = _flex(query, key, value, tree, window, scale)
    elif query.device.type == "cpu" and window is None and not dropout and q.shape[-1] == v.shape[-1]:
        out = _Segmented.apply(q, k, v, scale, tree.segments).flatten(0, 1)
    else:
        out = masked_attention(q, k, v, tree, window, scale, dropout).flatten(0, 1)
    return out.transpose(0, 1).unsqueeze(0), None


class _Segmented(torch.autograd.Function):
    """Tree attention in blocks. q [B, H, S, D]; k, v the same shape, possibly with stride 0 over H."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, segments: tuple[Segment, ...]
    ) -> Tensor:
        joined = len(segments) > 1 and any(s.stop > s.end for s in segments)
        out = q.new_empty(q.shape, dtype=torch.float32 if joined else q.dtype)
        norm = q.new_empty(q.shape[:3], dtype=torch.float32)
        for start, end, _ in segments:
            own = slice(start, end)
            out[:, :, own], norm[:, :, own] = _forward(
                q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale
            )
        for start, end, stop in segments:
            if stop > end:
                above, below = slice(start, end), slice(end, stop)
                part, part_norm = _forward(
                    q[:, :, below], k[:, :, above], v[:, :, above], 0.0, False, scale=scale
                )
                _join(out[:, :, below], norm[:, :, below], part, part_norm)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, norm)
        ctx.scale, ctx.segments = scale, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, norm = ctx.saved_tensors
        total = [torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, v)]
        for start, end, stop in ctx.segments:
            above = slice(start, end)
            for rows, causal in ((above, True), (slice(end, stop), False)):
                if rows.start == rows.stop:
                    continue
                parts = _backward(
                    grad[:, :, rows], q[:, :, rows], k[:, :, above], v[:, :, above], out[:, :, rows], norm[:, :, rows],
                    0.0, causal, scale=ctx.scale,
                )  # fmt: skip
                for sum_, part, where in zip(total, parts, (rows, above, above), strict=True):
                    sum_[:, :, where] += part
        return (*(x.to(q.dtype) for x in total), None, None)


def _join(out: Tensor, norm: Tensor, part: Tensor, part_norm: Tensor) -> None:
    """Add the attention over further keys to (out, norm) in place."""
    both = torch.logaddexp(norm, part_norm)
    out.mul_((norm - both).exp_().unsqueeze(-1)).add_(part * (part_norm - both).exp_().unsqueeze(-1))
    norm.copy_(both)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Forest,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The reference: SDPA with a mask, a tree at a time. q [B, H, S, D]; k, v the same shape."""
    parts = []
    for start, stop in tree.trees():
        key = (start, window, q.device, q.dtype)
        if key not in tree.masks:
            allowed = tree.mask(start, stop, window).to(q.device)
            tree.masks[key] = torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~allowed, -torch.inf
            )
        rows = slice(start, stop)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, rows], v[:, :, rows], tree.masks[key], dropout, scale=scale
            )
        )
    return torch.cat(parts, dim=2)


def block_mask(tree: Forest, window: int | None, device: torch.device) -> BlockMask:
    """The forest's mask for flex attention; blocks of other trees and branches are skipped by the kernel."""
    key = ("flex", window, device)
    if key not in tree.masks:
        stop = torch.from_numpy(tree.stop).to(device)
        position = torch.from_numpy(tree.position).to(device)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            path = (j <= i) & (i < stop[j])
            return path if window is None else path & (position[i] - position[j] < window)

        tree.masks[key] = create_block_mask(sees, None, None, len(tree), len(tree), device=str(device))
    return tree.masks[key]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, tree: Forest, window: int | None, scale: float
) -> Tensor:
    """[H, S, D]"""
    kernel = _compiled_flex() if query.is_cuda else flex_attention
    mask = block_mask(tree, window, query.device)
    grouped = query.shape[1] != key.shape[1]
    return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)[0]
