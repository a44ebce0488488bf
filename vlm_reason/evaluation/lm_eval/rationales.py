"""The latent-variable law: a rationale z is drawn behind the prompt, and the answer is scored behind it.

    log p(y | x) = log (1/MN) sum_m sum_j p_m(y | x, z_mj),     z_mj ~ p_m(z | x), temperature 1

lm-eval's prompt ends where the answer begins ("...\\nAnswer:"). The rationale goes in front of that cue:

    context without its cue   opening   z (closed by `end`)   cue   y

z is drawn from the law that scores, so that no importance weights are needed. A rationale that was cut at its cap has
probability 0 for every answer and counts in N. When not to use it: tasks whose continuation is no answer to a question
(HellaSwag, LAMBADA, perplexity).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...engines.base import Law, ScoreRequest, StopRule
from ...engines.rollout import Draw, roll_out
from ...errors import UserError, nearest
from ...ranking import METHODS, Candidates, rank_members, score_candidates
from ...store import Provenance, SampleRecord, records_of
from ...tasks.answers import AnswerKind, canonical, extract_answer
from ...types import Problem, Trace, TraceGroup
from ..members import Member, Members
from .asking import Asker
from .encoding import Decoding, Encoder, Ids
from .mixture import Ask, Draft, Mixed, Written, log_mean_exp
from .responses import Responses

PROPOSAL = "lm_eval/rationale"
"""What the stored rationales say of the law that drew them."""


@dataclass(frozen=True)
class RationaleConfig:
    """rationales: N a member. opening, end, cue: the text around z (see the module). method: the ranker that chooses
    the answer of `generate_until`; kind: what its answers are, which decides when two are the same. on_cut: what
    happens to an item all of whose rationales were cut (`error`, or `direct`: it is scored without a rationale)."""

    rationales: int
    max_tokens: int = 128
    opening: str = "\nReasoning:"
    end: str = "\n"
    cue: str = "Answer:"
    method: str = "mixture"
    kind: AnswerKind = "text"
    on_cut: Literal["error", "direct"] = "error"

    def __post_init__(self) -> None:
        if self.rationales < 1:
            raise UserError(f"rationales must be >= 1, got {self.rationales}")
        if self.max_tokens < 1:
            raise UserError(f"max_rationale_tokens must be >= 1, got {self.max_tokens}")
        if not self.end:
            raise UserError("rationale_end is empty, so a rationale could never end")
        if self.method not in METHODS:
            raise UserError(f"unknown ranking method {self.method!r}{nearest(self.method, METHODS)}")
        if self.on_cut not in ("error", "direct"):
            raise UserError(f"on_cut must be error or direct, got {self.on_cut!r}")


@dataclass(frozen=True)
class Choice:
    """A continuation to be scored behind the rationales of `context`. Requests of one document and context share
    them."""

    name: str
    context: str
    continuation: str


class RationaleMixture:
    """N rationales of every member behind each prompt."""

    def __init__(
        self,
        members: Members,
        config: RationaleConfig,
        encoder: Encoder,
        responses: Responses,
        seed: int,
        progress: str | None,
    ) -> None:
        self.members, self.config, self.encoder, self.responses = members, config, encoder, responses
        self.seed, self.progress = seed, progress
        self.direct: set[str] = set()
        """Items that were scored without a rationale, since all of theirs were cut."""

    def score(self, choices: Sequence[Choice]) -> list[Mixed]:
        problems = [_problem(choice) for choice in choices]
        by_member: list[list[list[tuple[float, bool]]]] = []
        for m, member in enumerate(self.members):
            with self.members.serve(member) as engine:
                asker = Asker(engine, member, self.responses)
                groups = self._traces(asker, member, m, list({p.id: p for p in problems}.values()))
                own = [groups[p.id] for p in problems]
                by_member.append(self._behind(asker, choices, own))
        return [self._mix(each) for each in zip(*by_member, strict=True)]

    def _mix(self, members: Sequence[Sequence[tuple[float, bool]]]) -> Mixed:
        totals = tuple(log_mean_exp([logp for logp, _ in each]) for each in members)
        return Mixed(log_mean_exp(totals), all(greedy for each in members for _, greedy in each), totals)

    def _traces(
        self, asker: Asker, member: Member, m: int, problems: Sequence[Problem]
    ) -> dict[str, TraceGroup]:
        """The N rationales of every problem, by its id."""
        groups = self._rolled_out(asker, member, m, Prompts(self.encoder, self.config, ()), problems, None)
        return {group.problem.id: group for group in groups}

    def _rolled_out(
        self,
        asker: Asker,
        member: Member,
        m: int,
        prompts: Prompts,
        problems: Sequence[Problem],
        how: Decoding | None,
    ) -> list[TraceGroup]:
        """N rationales a problem by member m; behind each complete one an answer decoded as `how`, or none."""
        for problem in problems:
            self.encoder.check_room(len(prompts.prior_ids(problem)) + 1, problem.id)
        return roll_out(
            asker,
            prompts,
            problems,
            [Draw(PROPOSAL, member.adapter)] * self.config.rationales,
            run_seed=self.seed,
            stream="eval",
            visit=m,
            max_trace_tokens=self.config.max_tokens,
            max_answer_tokens=how.max_tokens if how else 1,
            answers_per_trace=1 if how else 0,
            answer_law=Law(member.adapter, how.temperature, how.top_p) if how else Law(member.adapter),
            progress=self.progress,
        )

    def _behind(
        self, asker: Asker, choices: Sequence[Choice], groups: Sequence[TraceGroup]
    ) -> list[list[tuple[float, bool]]]:
        """For every choice, (log p(y | x, z_j), greedy) of each rationale; -inf for a cut one."""
        prompts = Prompts(self.encoder, self.config, ())
        requests: list[ScoreRequest] = []
        slots: list[list[int]] = []  # of each choice, the request behind each rationale, -1 for a cut one
        for choice, group in zip(choices, groups, strict=True):
            target = self.encoder.behind(self.config.cue, choice.continuation)
            contexts = [prompts.context(t) if t.complete else None for t in group.traces]
            if not any(contexts):
                self._all_cut(choice.name)
                contexts = [prompts.without_rationale(group.problem)] * len(contexts)
            own = []
            for context in contexts:
                own.append(-1 if context is None else len(requests))
                if context is not None:
                    self.encoder.check_room(len(context) + len(target) - 1, choice.name)
                    requests.append(ScoreRequest(context, target))
            slots.append(own)
        values = [(math.fsum(logps), greedy) for logps, greedy in asker.score_greedy(requests, self.progress)]
        cut = (-math.inf, False)
        return [[cut if slot < 0 else values[slot] for slot in own] for own in slots]

    def _all_cut(self, name: str) -> None:
        if self.config.on_cut == "error":
            raise UserError(
                f"{name}: all {self.config.rationales} rationales were cut at {self.config.max_tokens} tokens, so no "
                "answer has a probability; raise max_rationale_tokens or rationales, or score such items without one "
                "(on_cut=direct)"
            )
        self.direct.add(name)

    # ---- writing -----------------------------------------------------------------------------------------------

    def write(self, asks: Sequence[Ask]) -> list[Written]:
        """The ranked answer: behind each rationale one is written (greedily, or as the task samples), all are scored
        behind all rationales of their member, pooled by class, and averaged over members. The text is that of the
        likeliest answer in the best class; empty where no rationale or no answer was complete."""
        found: list[Written | None] = [None] * len(asks)
        for how in dict.fromkeys(ask.decoding for ask in asks):
            mine = [i for i, ask in enumerate(asks) if ask.decoding == how]
            for i, written in zip(mine, self._write([asks[i] for i in mine]), strict=True):
                found[i] = written
        return [written for written in found if written is not None]

    def _write(self, asks: Sequence[Ask]) -> list[Written]:
        how = asks[0].decoding
        prompts = Prompts(self.encoder, self.config, how.until)
        problems = [Problem(f"{a.name}#{a.repeat}", a.context, "") for a in asks]
        drafts: list[list[Draft]] = [[] for _ in asks]
        candidates: list[list[Candidates]] = [[] for _ in asks]
        for m, member in enumerate(self.members):
            with self.members.serve(member) as engine:
                asker = Asker(engine, member, self.responses)
                groups = self._rolled_out(asker, member, m, prompts, problems, how)
                own = {g.problem.id: self._records(g, member) for g in groups}
                scored = score_candidates(asker, prompts.cue_ids, own, Law(member.adapter), self.progress)
            for i, (group, of_item) in enumerate(zip(groups, own.values(), strict=True)):
                drafts[i] += _drafts(group, of_item, member)
                candidates[i].append(scored[group.problem.id])
        return [self._choose(candidates[i], tuple(drafts[i]), ask) for i, ask in enumerate(asks)]

    def _records(self, group: TraceGroup, member: Member) -> list[SampleRecord]:
        made = records_of(group, Provenance(member.weights, "lm-eval", 1.0, member=member.index))
        return [
            replace(record, canonical=self._class(record)) if record.answered else record for record in made
        ]

    def _class(self, record: SampleRecord) -> str | None:
        if record.answer_finish != "stop":
            return None
        text = extract_answer(self.encoder.text(record.answer_ids, ()), self.config.kind)
        return None if text is None else canonical(text, self.config.kind)

    def _choose(self, candidates: Sequence[Candidates], drafts: tuple[Draft, ...], ask: Ask) -> Written:
        ranked = rank_members(candidates, self.config.method)
        if ranked.answer is None:
            return Written("", None, drafts, ask.decoding)
        inside = [i for i, draft in enumerate(drafts) if draft.canonical == ranked.answer]
        best = max(inside, key=lambda i: (_logp(drafts[i]), -i))
        text = self.encoder.text(drafts[best].ids, ask.decoding.until)
        return Written(text, best, drafts, ask.decoding)


class Prompts:
    """Prompt, cue and stop rules of the law above, as `roll_out` wants them. `question` is lm-eval's context."""

    def __init__(self, encoder: Encoder, config: RationaleConfig, until: Sequence[str]) -> None:
        self.encoder, self.config = encoder, config
        self.answer_stop = encoder.stop_rule(until)
        self.trace_stop = StopRule((config.end,), (encoder.eos,))
        self.cue_ids: Ids = tuple(encoder.encode(config.cue, add_special_tokens=False)) if config.cue else ()
        self.empty_ids: Ids = tuple(encoder.encode(config.end, add_special_tokens=False))

    def prior_ids(self, problem: Problem) -> Ids:
        return self.encoder.prompt(_without_cue(problem.question, self.config.cue) + self.config.opening)

    def hinted_ids(self, problem: Problem) -> Ids:
        raise UserError(f"{problem.id}: lm-eval's prompts hold no answer to reveal")

    def without_rationale(self, problem: Problem) -> Ids:
        return (*self.prior_ids(problem), *self.empty_ids, *self.cue_ids)

    def context(self, trace: Trace) -> Ids:
        return (*trace.prompt_ids, *trace.ids, *self.cue_ids)


def _without_cue(context: str, cue: str) -> str:
    bare = context.rstrip()
    return bare[: -len(cue)].rstrip() if cue and bare.endswith(cue.rstrip()) else context


def _problem(choice: Choice) -> Problem:
    """One a prompt: a document whose choices fill a gap in the prompt has several."""
    digest = hashlib.blake2b(choice.context.encode(), digest_size=4).hexdigest()
    return Problem(f"{choice.name}~{digest}", choice.context, "")


def _logp(draft: Draft) -> float:
    return -math.inf if draft.completion is None else math.fsum(draft.completion.logps)


def _drafts(group: TraceGroup, records: Sequence[SampleRecord], member: Member) -> list[Draft]:
    """One a rationale, in order; without an answer where it was cut."""
    classes = {record.k: record.canonical for record in records}
    return [
        Draft(
            member.index,
            trace.answers[0] if trace.answers else None,
            trace.prompt_ids,
            trace.completion,
            classes[trace.k],
        )
        for trace in group.traces
    ]
