"""What no engine serves, whatever it runs on: refused before anything is sampled or scored."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .base import SampleRequest, ScoreRequest


def room(request: SampleRequest, context: int | None) -> int:
    """Tokens that may be written: the request's cap, and no more than `context` has left behind the prompt."""
    return (
        request.max_tokens if context is None else min(request.max_tokens, context - len(request.prompt_ids))
    )


def check_sample(requests: Sequence[SampleRequest], context: int | None) -> None:
    """UserError for an empty prompt, a cap below 1, an empty stop string, a prompt that fills the context."""
    for i, request in enumerate(requests):
        if not request.prompt_ids:
            raise UserError(f"sample request {i} has an empty prompt; give at least one token")
        if request.max_tokens < 1:
            raise UserError(f"sample request {i}: max_tokens must be >= 1, got {request.max_tokens}")
        if any(not s for s in request.stop.strings):
            raise UserError(f"sample request {i} has an empty stop string, which every text holds")
        if room(request, context) < 1:
            raise UserError(
                f"sample request {i}: the prompt has {len(request.prompt_ids)} tokens and the model's context is "
                f"{context}; shorten the prompt (it is never truncated silently)"
            )


def check_score(requests: Sequence[ScoreRequest], context: int | None) -> None:
    """UserError for an empty context, or context and target that do not fit together."""
    for i, request in enumerate(requests):
        if not request.context_ids:
            raise UserError(f"score request {i} has an empty context; give at least one token")
        total = len(request.context_ids) + len(request.target_ids)
        if context is not None and total > context + 1:  # the last target is never an input
            raise UserError(
                f"score request {i}: context and target have {total} tokens and the model's context is "
                f"{context}; shorten them (nothing is truncated silently)"
            )
