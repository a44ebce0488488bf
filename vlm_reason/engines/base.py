"""The engine protocol: where text comes from and where it is scored. Token ids in, token ids out.

An engine's answer to a request depends on the request and the weights alone: not on its neighbours in the batch, their
order or number (exactly in the `exact` engine, up to floating point elsewhere). That is what lets a run be resumed
from counters (see seeds.py) with no sampler state in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..errors import UserError
from ..types import Completion
from ..types import StopRule as StopRule


class EngineLost(UserError):
    """What samples went away and did not come back. The message names it. Nothing is wrong with the run: it can be
    saved, and goes on where it stopped."""


@dataclass(frozen=True)
class Law:
    """A distribution over next tokens: which adapter is active, and how its logits are processed.

    adapter None is the frozen base model. temperature 0 is greedy decoding (log-probabilities are then those of the
    untempered model, since the greedy law is degenerate). top_p keeps the smallest set of tokens whose mass reaches
    top_p, ties at the boundary kept.
    """

    adapter: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class SampleRequest:
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    law: Law = Law()
    stop: StopRule = StopRule()


@dataclass(frozen=True)
class ScoreRequest:
    """Ask for log p(target_ids | context_ids), token by token, under `law`."""

    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    law: Law = Law()


@runtime_checkable
class Engine(Protocol):
    """Both calls keep order: result i answers request i. Raise ValueError for a request they cannot serve
    (empty prompt, cap < 1, prompt longer than the model's context: never truncated silently)."""

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]: ...

    def score(
        self, requests: Sequence[ScoreRequest], progress: str | None = None
    ) -> list[tuple[float, ...]]: ...


@runtime_checkable
class Closable(Protocol):
    """An engine that samples elsewhere: `close` ends what it is asked for, in whichever thread."""

    def close(self) -> None: ...
