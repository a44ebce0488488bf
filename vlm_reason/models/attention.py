"""Grouped-query attention without copies of the keys and values, for short queries.

With H query heads on KV < H key heads, transformers' `sdpa` path repeats keys and values H / KV times whenever there
is a padding mask, and one decoding step of a small model then spends most of its time copying its cache. Attention does
not care which query a row is, so the heads that share a key head are folded into the query axis instead:

    q [B, H, Q, D] -> [B, KV, (H/KV) Q, D],   mask [B, 1, Q, L] repeated to [B, 1, (H/KV) Q, L]

The sums are the same; measured on CPU, 64 rows of 200 keys, 9 on 3 heads, bf16: 20 ms -> 3 ms a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "folded_sdpa"

CAUSAL_LIMIT = 256
"""Longest unmasked causal query that is folded: beyond it the kernel's skipping of the upper triangle is worth more."""


@contextmanager
def folded_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, a model on transformers' `sdpa` attention uses the folded form. Any other kind (eager, flash
    attention) is left alone, and so is a model whose heads are not grouped."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    grouped = getattr(config, "num_key_value_heads", heads) != heads
    if config._attn_implementation != "sdpa" or not grouped:
        yield
        return
    AttentionInterface.register(NAME, _folded)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _folded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,  # the signature transformers calls with; handed on unread when nothing is folded
) -> tuple[Tensor, None]:
    batch, heads, width, _ = query.shape
    groups = heads // key.shape[1]
    causal = attention_mask is None and width > 1
    foldable = kwargs.get("position_bias") is None and kwargs.get("cache") is None and is_causal is not False
    if causal:  # on accelerators the native causal kernel takes grouped heads as they are
        foldable = foldable and key.device.type == "cpu" and width == key.shape[2] and width <= CAUSAL_LIMIT
    if groups == 1 or not foldable:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if causal:
        attention_mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and width > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    folded = query.reshape(batch, key.shape[1], groups * width, query.shape[-1])
    out = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, heads, width, value.shape[-1]).transpose(1, 2).contiguous(), None
