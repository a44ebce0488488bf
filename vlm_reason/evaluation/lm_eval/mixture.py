"""One model, or M members of a posterior over weights, as a law over continuations and as a writer of text.

    sequence level    log p(y | x) = log (1/M) sum_m p_m(y | x)                  the predictive of a whole answer
    token level       log p(y | x) = sum_t log (1/M) sum_m p_m(y_t | x, y_<t)    members averaged anew at every token

The two differ as soon as members disagree (Jensen: neither bounds the other). The sequence level is the posterior
predictive: one draw of the weights writes the whole answer. With one member both are the plain model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import logsumexp

from ...engines.base import Engine, Law, SampleRequest, ScoreRequest
from ...engines.hf import HFEngine
from ...engines.seeds import counter_seed
from ...engines.token_mixture import MIXTURE, TokenMixtureEngine, mix_tokens
from ...errors import UserError
from ...types import Completion
from ..members import Member, Members, ResidentMembers
from .asking import Asker
from .encoding import Decoding, Encoder, Ids
from .responses import Responses, Scored

Level = Literal["sequence", "token"]

Pair = tuple[Ids, Ids]
"""(context, target)"""


@dataclass(frozen=True)
class Mixed:
    """log p(y | x) of the mixture and of each member, nats. greedy: every member would write y greedily."""

    value: float
    greedy: bool
    members: tuple[float, ...]


@dataclass(frozen=True)
class Draft:
    """A text that a member wrote, or a rationale (`trace`) and the answer behind it: None where it was cut."""

    member: int | None
    completion: Completion | None
    prompt: Ids
    trace: Completion | None = None
    canonical: str | None = None

    @property
    def ids(self) -> Ids:
        return () if self.completion is None else self.completion.ids


@dataclass(frozen=True)
class Written:
    """The text that answers a request, and everything it was chosen from. chosen: index into drafts, None where no
    draft holds it (no rationale was complete). decoding: how drafts were written (rationales: at temperature 1)."""

    text: str
    chosen: int | None
    drafts: tuple[Draft, ...]
    decoding: Decoding


@dataclass(frozen=True)
class Ask:
    """A text to be written. `name` and `repeat` make its seed."""

    name: str
    repeat: int
    context: str
    decoding: Decoding


class WeightMixture:
    """M >= 1 members at one of two levels. UserError for the token level with whole models or another engine than hf:
    it needs all members in step."""

    def __init__(
        self,
        members: Members,
        level: Level,
        encoder: Encoder,
        responses: Responses,
        seed: int,
        progress: str | None,
    ) -> None:
        self.members, self.level, self.encoder, self.responses = members, level, encoder, responses
        self.seed, self.progress = seed, progress
        self._together = _in_step(members) if level == "token" and len(members) > 1 else None

    def score(self, pairs: Sequence[Pair]) -> list[Mixed]:
        """Result i belongs to pair i. An empty target has probability 1."""
        requests = [ScoreRequest(context, target) for context, target in pairs]
        by_member: list[list[Scored]] = []
        for member in self.members:
            with self.members.serve(member) as engine:
                by_member.append(self._asker(engine, member).score_greedy(requests, self.progress))
        return [self._mix(each) for each in zip(*by_member, strict=True)]

    def _mix(self, scored: Sequence[Scored]) -> Mixed:
        rows = [logps for logps, _ in scored]
        totals = tuple(math.fsum(row) for row in rows)
        value = math.fsum(mix_tokens(rows)) if self.level == "token" else log_mean_exp(totals)
        return Mixed(value, all(greedy for _, greedy in scored), totals)

    def rolling(self, texts: Sequence[Sequence[Pair]]) -> list[Mixed]:
        """Whole texts, each a row of windows: p_m(text) is the product over its windows. No window: probability 1."""
        scored = iter(self.score([pair for windows in texts for pair in windows]))
        found = []
        for windows in texts:
            parts = [next(scored) for _ in windows]
            totals = tuple(math.fsum(p.members[m] for p in parts) for m in range(len(self.members)))
            value = math.fsum(p.value for p in parts) if self.level == "token" else log_mean_exp(totals)
            found.append(Mixed(value, all(p.greedy for p in parts), totals))
        return found

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """Sampled: from the mixture (at the sequence level one member, drawn by the seed, writes all of it). Greedy:
        token level, the likeliest token of the mixture at each step; sequence level, of the members' greedy texts the
        one that is likeliest under the mixture (the likeliest text of all cannot be searched for)."""
        if self._together is not None:
            together, member = self._together
            drafts = self._draw(self._asker(together, member), member, asks, range(len(asks)))
            return [self._written((draft,), 0, ask) for draft, ask in zip(drafts, asks, strict=True)]
        if len(self.members) == 1:
            (member,) = self.members
            with self.members.serve(member) as engine:
                drafts = self._draw(self._asker(engine, member), member, asks, range(len(asks)))
            return [self._written((draft,), 0, ask) for draft, ask in zip(drafts, asks, strict=True)]
        return self._write_by_members(asks)

    def _write_by_members(self, asks: Sequence[Ask]) -> list[Written]:
        drafts: list[list[Draft]] = [[] for _ in asks]
        for m, member in enumerate(self.members):
            mine = [i for i, ask in enumerate(asks) if ask.decoding.temperature == 0 or self._lot(ask) == m]
            with self.members.serve(member) as engine:
                drawn = self._draw(self._asker(engine, member), member, asks, mine)
            for i, draft in zip(mine, drawn, strict=True):
                drafts[i].append(draft)
        open_ = [(i, d) for i, own in enumerate(drafts) if len(own) > 1 for d in own]
        scored = self.score([(d.prompt, d.ids) for _, d in open_]) if open_ else []
        best: dict[int, tuple[float, int]] = {}
        place = [0] * len(asks)
        for (i, _), mixed in zip(open_, scored, strict=True):
            if i not in best or mixed.value > best[i][0]:
                best[i] = (mixed.value, place[i])
            place[i] += 1
        return [
            self._written(tuple(own), best[i][1] if i in best else 0, asks[i]) for i, own in enumerate(drafts)
        ]

    def _lot(self, ask: Ask) -> int:
        return counter_seed(self.seed, "order", 0, ask.name, ask.repeat) % len(self.members)

    def _draw(self, asker: Asker, member: Member, asks: Sequence[Ask], mine: Sequence[int]) -> list[Draft]:
        prompts = {i: self.encoder.prompt(asks[i].context) for i in mine}
        requests = []
        for i in mine:
            ask, how = asks[i], asks[i].decoding
            self.encoder.check_room(len(prompts[i]) + 1, ask.name)
            requests.append(
                SampleRequest(
                    prompts[i],
                    counter_seed(self.seed, "eval", 0, ask.name, ask.repeat) if how.temperature else 0,
                    how.max_tokens,
                    Law(None, how.temperature, how.top_p),
                    self.encoder.stop_rule(how.until),
                )
            )
        drawn = asker.sample(requests, self.progress)
        return [Draft(member.index, c, prompts[i]) for i, c in zip(mine, drawn, strict=True)]

    def _written(self, drafts: tuple[Draft, ...], chosen: int, ask: Ask) -> Written:
        text = self.encoder.text(drafts[chosen].ids, ask.decoding.until)
        return Written(text, chosen, drafts, ask.decoding)

    def _asker(self, engine: Engine, member: Member) -> Asker:
        return Asker(engine, member, self.responses)


def _in_step(members: Members) -> tuple[TokenMixtureEngine, Member]:
    if not isinstance(members, ResidentMembers) or not isinstance(members.engine, HFEngine):
        raise UserError(
            "mixture=token needs all members in step: PEFT adapters of one model, under the hf engine; "
            "use mixture=sequence"
        )
    hf = members.engine
    engine = TokenMixtureEngine(
        hf.model, hf.tokenizer, [m.adapter for m in members], hf.batch_size, hf.score_tokens
    )
    return engine, Member(None, "the mixture of all members", MIXTURE, f"tokens of {identity(members)}")


def identity(members: Members) -> str:
    """16 hex digits of all members' weights, in order."""
    text = "\x1f".join(member.weights for member in members)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def log_mean_exp(values: Sequence[float]) -> float:
    """log (1/n) sum_i exp v_i; -inf counts in n."""
    if len(values) == 1:
        return values[0]
    return float(logsumexp(np.asarray(values, dtype=np.float64)) - math.log(len(values)))
