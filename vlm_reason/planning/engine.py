"""What of the `engine` section the cost depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engines.make import EngineConfig, engine_config


@dataclass(frozen=True)
class EngineShape:
    """kind: `hf` or `vllm`. batch: texts drawn together. separate: on devices of its own. adapter_only: adapters are
    served beside the base, and only they are synced."""

    kind: str
    batch: int
    score_tokens: int
    separate: bool = False
    tensor_parallel: int = 1
    adapter_only: bool = False


def engine_shape(section: Mapping[str, Any]) -> EngineShape:
    """UserError for an unknown kind or key, as making the engine would."""
    config = engine_config(section)
    if isinstance(config, EngineConfig):
        return EngineShape(config.kind, config.batch_size, config.score_tokens)
    return EngineShape(
        config.kind,
        config.batch_size,
        config.score_tokens,
        separate=config.mode == "server",
        tensor_parallel=config.tensor_parallel_size,
        adapter_only=config.sync in ("auto", "adapter"),
    )
