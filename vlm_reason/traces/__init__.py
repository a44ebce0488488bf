"""Latent chains of thought: one trainer, methods as presets.

from vlm_reason.traces import PRESETS, TraceConfig, TraceTrainer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .presets import PRESETS, build
from .recipe import Component, Evidence, Phase, Proposal, Recipe

if TYPE_CHECKING:
    from .config import TraceConfig
    from .trainer import TraceTrainer

__all__ = [
    "PRESETS",
    "Component",
    "Evidence",
    "Phase",
    "Proposal",
    "Recipe",
    "TraceConfig",
    "TraceTrainer",
    "build",
]


def __getattr__(name: str):
    """The trainer brings transformers with it (seconds), so it is loaded when asked for: --help stays quick."""
    if name == "TraceConfig":
        from .config import TraceConfig

        return TraceConfig
    if name == "TraceTrainer":
        from .trainer import TraceTrainer

        return TraceTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
