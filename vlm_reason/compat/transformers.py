"""What transformers knows of a model's attention and says only in private names."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

Attention = Literal["softmax", "recurrent", "own"]


def attention_of(causal: PreTrainedModel) -> Attention:
    """softmax: every layer calls the registered attention function with the decoder's keyword arguments. recurrent:
    some layer has a state instead of keys. own: attention the registry does not reach (ALiBi in BLOOM and MPT)."""
    if getattr(causal, "_is_stateful", False):
        return "recurrent"
    return "softmax" if causal._supports_attention_backend else "own"


def attention_kind(causal: PreTrainedModel) -> str:
    """The name of the attention function in use: `sdpa`, `eager`, `flash_attention_2`, ..."""
    return str(causal.config.get_text_config()._attn_implementation)
