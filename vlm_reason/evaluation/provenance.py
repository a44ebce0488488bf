"""What the store keys an evaluation's samples by: weights, prompts, caps, and the engine with its version."""

from __future__ import annotations

from importlib.metadata import version

from ..compat.vllm import installed_version
from ..engines.base import Engine
from ..engines.vllm import VLLMEngine
from ..store import Provenance
from .harness import EvalConfig


def provenance_of(
    engine: Engine, prompts: str, settings: EvalConfig, weights: str, member: int | None = None
) -> Provenance:
    """Whatever changes a sample changes its key. prompts: the prompt builder's fingerprint. `member` numbers the draw
    of a weight posterior."""
    return Provenance(
        weights=weights,
        engine=engine_name(engine),
        temperature=settings.temperature,
        top_p=settings.top_p,
        member=member,
        parameters={
            "prompts": prompts,
            "max_trace_tokens": settings.max_trace_tokens,
            "max_answer_tokens": settings.max_answer_tokens,
        },
    )


def engine_name(engine: Engine) -> str:
    """Name and versions of what samples, as the store keeps it."""
    name = (
        f"vllm-{installed_version()}"
        if isinstance(engine, VLLMEngine)
        else f"hf transformers-{version('transformers')}"
    )
    return f"{name} torch-{version('torch')}"
