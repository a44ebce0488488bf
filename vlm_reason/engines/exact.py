"""The engine over an enumerable world: samples and scores by table lookup, exactly.

Token t of a request comes from inverting the cumulative distribution at u_t = blake2b(seed, t) / 2^53. Nothing but the
request and the world's parameters enters, so results are bit-identical in any batch, any order and any process. Use it
to test a sampler, a trainer or a ranker against what `EnumerableWorld` knows; it is no fast path for anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..exact.world import EnumerableWorld
from ..types import Completion, Finish, Problem
from .base import Law, SampleRequest, ScoreRequest, StopRule


@dataclass(frozen=True)
class _Place:
    """Where a text stands: in a trace (prefix; hint = the revealed answer or None), behind a closed trace, or done."""

    prefix: int
    hint: int | None = None
    closed: bool = False
    done: bool = False


class ExactEngine:
    """`Engine` over one `EnumerableWorld`; `adapters` maps an adapter name to a world of the same shape with its own
    parameters (say {"posterior": other_world, None: reference}); names not listed are served by `world`.

    A prompt is the world's prior or hinted prompt, followed by any part of a trace, or by a closed trace (then the
    answer is sampled). A segment is closed by the world's end symbol or by an answer, finish `stop`, unless the request
    lists that id as `eos` without `eos_is_stop`; its stop strings are matched on `world.decode`. An answer behind
    a hinted trace is that of pi: in a world, pi(y|x,z) does not see the hint.
    """

    def __init__(
        self, world: EnumerableWorld, adapters: Mapping[str | None, EnumerableWorld] | None = None
    ) -> None:
        self.world = world
        self.adapters = dict(adapters or {})
        for name, other in self.adapters.items():
            if (other.strings, other.n_answers) != (world.strings, world.n_answers):
                raise UserError(
                    f"the world of adapter {name!r} has another vocabulary or length than the first one"
                )

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        tables = _Tables(self)
        return [self._sample(request, tables) for request in requests]

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        tables = _Tables(self)
        return [self._score(request, tables) for request in requests]

    def _sample(self, request: SampleRequest, tables: _Tables) -> Completion:
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {request.max_tokens}")
        place = self._place(request.prompt_ids)
        if place.done:
            raise ValueError("the prompt ends with an answer: nothing follows in this world")
        ids: list[int] = []
        logps: list[float] = []
        finish: Finish = "length"
        while len(ids) < request.max_tokens:
            row = tables.next_token(place, request.law)
            token, logp = _draw(row, request.law, _uniform(request.seed, len(ids)))
            ids.append(token)
            logps.append(logp)
            place, before = self._advance(place, token), place
            ended = self._finish(request.stop, ids, place.done or place.closed != before.closed)
            if ended is not None:
                finish = ended
                break
        return Completion(tuple(ids), tuple(logps), self.world.decode(ids), finish, request.seed)

    def _score(self, request: ScoreRequest, tables: _Tables) -> tuple[float, ...]:
        place = self._place(request.context_ids)
        logps = []
        for token in request.target_ids:
            if place.done:
                raise ValueError("target_ids go on behind the answer: nothing follows in this world")
            row = _processed(tables.next_token(place, request.law), request.law)
            logps.append(float(row[token]) if 0 <= token < len(row) else float("-inf"))
            place = self._advance(place, token)
        return tuple(logps)

    def _place(self, ids: Sequence[int]) -> _Place:
        world = self.world
        first_answer, question = world.strings.end + 1, world.question_id
        if tuple(ids[:1]) == world.prior_prompt:
            place, rest = _Place(0), ids[1:]
        elif len(ids) >= 2 and first_answer <= ids[0] < question and ids[1] == question:
            place, rest = _Place(0, hint=ids[0] - first_answer), ids[2:]
        else:
            raise ValueError(
                f"prompt {tuple(ids)} starts with neither the prior prompt {world.prior_prompt} nor a hinted one "
                "(answer, question)"
            )
        for token in rest:
            if place.done:
                raise ValueError(f"prompt {tuple(ids)} goes on behind the answer")
            place = self._advance(place, token)
        return place

    def _advance(self, place: _Place, token: int) -> _Place:
        strings = self.world.strings
        if place.closed:
            if strings.end < token < self.world.question_id:
                return _Place(place.prefix, place.hint, closed=True, done=True)
            raise ValueError(f"token {token} follows a closed trace; only an answer can")
        if token == strings.end:
            return _Place(place.prefix, place.hint, closed=True)
        if 0 <= token < strings.vocab and place.prefix < strings.open_prefixes:
            return _Place(strings.child(place.prefix, token), place.hint)
        raise ValueError(f"token {token} cannot follow trace {strings.symbols[place.prefix]} in this world")

    def _finish(self, stop: StopRule, ids: list[int], segment_ended: bool) -> Finish | None:
        if stop.strings:
            text = self.world.decode(ids)
            if any(s in text for s in stop.strings):
                return "stop"
        if ids[-1] in stop.eos:
            return "stop" if stop.eos_is_stop else "eos"
        return "stop" if segment_ended else None


class _Tables:
    """The worlds' distributions, computed once a call: parameters may have moved since the last one."""

    def __init__(self, engine: ExactEngine) -> None:
        self.engine = engine
        self.known: dict[tuple[str | None, str, int | None], Tensor] = {}

    def next_token(self, place: _Place, law: Law) -> Tensor:
        """Log-probabilities over token ids (a prefix of the vocabulary) at temperature 1."""
        world = self.engine.adapters.get(law.adapter, self.engine.world)
        strings = world.strings
        if place.closed:
            row = self._table(world, law.adapter, "answers", None)[place.prefix]
            return torch.cat([row.new_full((strings.end + 1,), float("-inf")), row])
        if place.prefix >= strings.open_prefixes:
            forced = torch.full((strings.end + 1,), float("-inf"), dtype=torch.float64)
            forced[strings.end] = 0.0
            return forced
        kind = "prior" if place.hint is None else "posterior"
        return self._table(world, law.adapter, kind, place.hint)[place.prefix]

    def _table(self, world: EnumerableWorld, adapter: str | None, kind: str, hint: int | None) -> Tensor:
        key = (adapter, kind, hint)
        if key not in self.known:
            with torch.no_grad():
                if kind == "answers":
                    table = world.laws.answers()
                elif hint is None:
                    table = world.laws.prior()
                else:
                    table = world.laws.posterior(hint)
            self.known[key] = table.detach().double()
        return self.known[key]


@dataclass(frozen=True)
class ExactPrompts:
    """Prompts of a world in the shape `roll_out` asks for: the end symbol closes the trace, one token is the answer."""

    world: EnumerableWorld

    @property
    def cue_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def trace_stop(self) -> StopRule:
        return StopRule()

    @property
    def answer_stop(self) -> StopRule:
        return StopRule()

    def prior_ids(self, problem: Problem) -> tuple[int, ...]:
        return self.world.prior_prompt

    def hinted_ids(self, problem: Problem) -> tuple[int, ...]:
        return (*self.world.encode(problem.answer), self.world.question_id)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        return self.world.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.world.decode(ids)


def _uniform(seed: int, position: int) -> float:
    """53 uniform bits in [0, 1) from the counter (seed, position)."""
    digest = hashlib.blake2b(f"{seed}\x1f{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _processed(row: Tensor, law: Law) -> Tensor:
    """Log-probabilities under the law: temperature first, then top-p; greedy keeps those of the untempered model."""
    if law.temperature > 0:
        row = (row / law.temperature).log_softmax(0)
    if law.top_p < 1:
        ordered = row.exp().sort(descending=True).values
        # The set's last member is the first whose predecessors fall short of top_p; equals of it stay too.
        short = ordered.cumsum(0) - ordered < law.top_p
        row = row.masked_fill(row.exp() < ordered[short][-1], float("-inf")).log_softmax(0)
    return row


def _draw(row: Tensor, law: Law, u: float) -> tuple[int, float]:
    row = _processed(row, law)
    if law.temperature == 0:
        token = int(row.argmax())
    else:
        cumulative = row.exp().cumsum(0)
        token = int((cumulative <= u * cumulative[-1]).sum())
        # Rounding can carry u past the last token that has mass.
        token = min(token, int((~row.isneginf()).nonzero()[-1]))
    return token, float(row[token])
