"""The engine that a config's `engine` section describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import from_dict
from .base import Engine
from .hf import HFEngine


@dataclass(frozen=True)
class EngineConfig:
    """kind: `hf` samples with transformers in this process. batch_size: rows decoded together; score_tokens: padded
    tokens scored together. Neither changes results."""

    kind: Literal["hf"] = "hf"
    batch_size: int = 64
    score_tokens: int = 8192


def make_engine(model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Engine:
    """Raises UserError for an unknown kind or key, naming the nearest."""
    config = from_dict(EngineConfig, options, "engine")
    return HFEngine(model, tokenizer, config.batch_size, config.score_tokens)
