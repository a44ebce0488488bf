"""Requests to every member of a mixture, answered from what is stored where it can be, and checked.

Members are asked one after another (whole models are in memory one at a time), in chunks whose answers are on disk
before the next begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar, cast

from ...compat.vllm import installed_version
from ...engines.base import Engine, SampleRequest, ScoreRequest, StopRule
from ...engines.vllm import VLLMEngine
from ...errors import UserError
from ...types import Completion
from ..members import Member
from .responses import Responses, Scored, distinct, key_of

SCORE_CHUNK = 2048
SAMPLE_CHUNK = 256

Request = TypeVar("Request", SampleRequest, ScoreRequest)


class Asker:
    """An engine: one member's weights behind the store of responses. Whatever adapter a request's law names, the
    member's is used."""

    def __init__(
        self, engine: Engine, member: Member, responses: Responses, progress: str | None = None
    ) -> None:
        self.engine, self.member, self.responses, self.progress = engine, member, responses, progress
        self.name = engine_name(engine)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        return [logps for logps, _ in self.score_greedy(requests, progress)]

    def score_greedy(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[Scored]:
        """log p of each target token, and whether greedy decoding would write the target."""
        mine, keys = self._mine(requests)
        self._fill(mine, keys, self.responses.scored, self._score, SCORE_CHUNK)
        return [cast(Scored, self.responses.scored(key)) for key in keys]

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        mine, keys = self._mine(requests)
        self._fill(mine, keys, self.responses.completion, self._sample, SAMPLE_CHUNK)
        return [cast(Completion, self.responses.completion(key)) for key in keys]

    def _mine(self, requests: Sequence[Request]) -> tuple[list[Request], list[str]]:
        mine = [replace(r, law=replace(r.law, adapter=self.member.adapter)) for r in requests]
        return mine, [key_of(self.member.weights, self.name, request) for request in mine]

    def _fill(
        self,
        requests: Sequence[Request],
        keys: Sequence[str],
        have: Callable[[str], Any],
        ask: Callable[[list[Request]], Sequence[Scored | Completion]],
        size: int,
    ) -> None:
        todo = distinct(requests, keys, have)
        for chunk in _chunks(list(todo.items()), size):
            answers = ask([request for _, request in chunk])
            self.responses.put(dict(zip([key for key, _ in chunk], answers, strict=True)))

    def _score(self, requests: list[ScoreRequest]) -> list[Scored]:
        scored = score_greedy(self.engine, requests, self.progress)
        for request, (logps, _) in zip(requests, scored, strict=True):
            _check_finite(logps, len(request.target_ids), self.member)
        return scored

    def _sample(self, requests: list[SampleRequest]) -> list[Completion]:
        drawn = self.engine.sample(requests, progress=self.progress)
        for completion in drawn:
            _check_finite(completion.logps, len(completion.ids), self.member)
        return drawn


def score_greedy(engine: Engine, requests: Sequence[ScoreRequest], progress: str | None) -> list[Scored]:
    """An engine that cannot say whether a target is greedy is asked to write as many tokens greedily, unless every
    token has more than half of the probability."""
    if (both := getattr(engine, "score_greedy", None)) is not None:
        return list(both(requests, progress))
    logps = engine.score(requests, progress)
    sure = [min(row, default=0.0) > math.log(0.5) for row in logps]
    open_ = [i for i, known in enumerate(sure) if not known]
    written = engine.sample(
        [
            SampleRequest(r.context_ids, 0, len(r.target_ids), replace(r.law, temperature=0.0), StopRule())
            for r in (requests[i] for i in open_)
        ],
        progress=progress,
    ) if open_ else []  # fmt: skip
    same = {i: w.ids == tuple(requests[i].target_ids) for i, w in zip(open_, written, strict=True)}
    return [(tuple(row), known or same[i]) for i, (row, known) in enumerate(zip(logps, sure, strict=True))]


def engine_name(engine: Engine) -> str:
    if isinstance(engine, VLLMEngine):
        return f"vllm-{installed_version()} torch-{version('torch')}"
    return f"{type(engine).__name__} transformers-{version('transformers')} torch-{version('torch')}"


def _check_finite(logps: Sequence[float], tokens: int, member: Member) -> None:
    """lm-eval takes the argmax of whatever it gets, and the argmax of NaN is the first choice."""
    wrong = next((logp for logp in logps if not math.isfinite(logp)), None)
    if wrong is not None or len(logps) != tokens:
        what = f"log-probability {wrong}" if wrong is not None else f"{len(logps)} log-probabilities"
        raise UserError(
            f"the model {member.name!r} gave {what} for {tokens} tokens: its weights are damaged, or its dtype "
            "overflows; try dtype=float32"
        )


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
