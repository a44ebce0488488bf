"""What a run asks of its devices: texts drawn, rows scored and rows trained in one window of each phase.

Counted from the recipe as `traces.window` and `traces.measure` do it: only the passes a phase `needs`, and no pass over
a trace whose sampler's own log-probabilities are of the law that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..traces.config import TraceConfig
from ..traces.measure import PRIOR_NAME, wants_gold
from ..traces.recipe import Component, Phase, deal
from ..types import Coefficients, Scores
from .lengths import PromptLengths, TextLength

Layout = Literal["padded", "packed", "tree"]
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "tree")

RETRY_SHARE = 0.5
"""Share of groups without a right answer that `hint_retry` draws again; known only after the run."""


@dataclass(frozen=True)
class Draws:
    """Texts to draw in a window: `sequences` of them behind prompts of `prompt` tokens, `prompts` of which differ.
    reused: tokens of a prompt that the engine has in its cache from drawing what came before; common: what all begin
    with, run once a batch."""

    name: str
    sequences: float
    prompts: float
    prompt: float
    length: TextLength
    reused: float = 0
    common: float = 0


@dataclass(frozen=True)
class Rows:
    """Rows to forward, group by group: `groups` prompts of `prompt` tokens, behind each `traces` traces of `trace`
    tokens, behind each of those `answers` answers of `tail` tokens (cue and answer), or none.

        padded, packed   a row for every trace and answer, each with its own copy of what is before it
        tree             what is shared is forwarded once

    labelled: tokens of a trace that meet the LM head; tail_labelled: of an answer's. common: tokens that the prompts
    of all groups begin with (worked examples), which a tree forwards once a micro-batch. The last token of a row is
    predicted and never forwarded.
    """

    name: str
    adapter: str
    groups: float
    traces: float
    prompt: float
    trace: TextLength
    answers: float = 0
    tail: float = 0
    labelled: float = 0
    tail_labelled: float = 0
    common: float = 0

    @property
    def count(self) -> float:
        return self.groups * self.traces * max(1.0, self.answers)

    @property
    def length(self) -> float:
        """Mean tokens of a row, its last one included."""
        return self.prompt + self.trace.mean + (self.tail if self.answers else 0)

    @property
    def head_rows(self) -> float:
        return self.groups * self.traces * (self.labelled + self.answers * self.tail_labelled)

    def tokens(self, layout: Layout) -> float:
        """Tokens forwarded, neither padding nor `common` counted, nor the last token of each row."""
        if layout == "tree":
            per_trace = self.trace.mean + self.answers * self.tail
            prompts = self.groups * (self.prompt - self.common)
            return prompts + self.groups * self.traces * per_trace - self.count
        return self.count * (self.length - 1)

    def context(self, layout: Layout) -> float:
        """Tokens that a forwarded token attends to on average."""
        z, p, t = self.trace, self.prompt, self.tail
        if layout == "tree":
            trace = z.mean * p + z.second_moment / 2
            answer = t * (p + z.mean + t / 2)
            prompts = self.groups * (p**2 - self.common**2) / 2
            total = prompts + self.groups * self.traces * (trace + self.answers * answer)
        else:
            behind = p + (t if self.answers else 0)
            total = self.count * (behind**2 + 2 * behind * z.mean + z.second_moment) / 2
        return total / max(self.tokens(layout), 1.0)


@dataclass(frozen=True)
class PhaseWork:
    """One window of a phase, all devices together. trained: rows of one pass over the window."""

    name: str
    windows: int
    trains: tuple[str, ...]
    draws: tuple[Draws, ...]
    scored: tuple[Rows, ...]
    trained: tuple[Rows, ...]


def phase_work(
    phase: Phase,
    config: TraceConfig,
    traces: int,
    prompts: PromptLengths,
    trace: TextLength,
    answer: TextLength,
    live_share: float = 1.0,
    prefix_cache: bool = False,
) -> PhaseWork:
    """Work of one window. traces: K. live_share: share of traces whose coefficients are not 0 (1: an upper bound).
    prefix_cache: whether the engine remembers what it has drawn, as vLLM does."""
    if phase.proposal.empty:
        trace, traces = TextLength(1, 1, 0), 1
    elif phase.proposal.dataset and prompts.given is not None:
        trace = TextLength(prompts.given, math.inf, trace.spread)
    sizes = _Sizes(config.prompts_per_window, traces, prompts, trace, answer, config, prefix_cache)
    return PhaseWork(
        name=phase.name,
        windows=phase.windows,
        trains=tuple(phase.trains),
        draws=tuple(_draws(phase, sizes)),
        scored=tuple(_scored(phase, sizes, live_share)),
        trained=tuple(_trained(phase, sizes, live_share)),
    )


@dataclass(frozen=True)
class _Sizes:
    groups: int
    traces: int
    prompts: PromptLengths
    trace: TextLength
    answer: TextLength
    config: TraceConfig
    prefix_cache: bool

    def prompt(self, kind: str) -> float:
        return self.prompts.hinted if kind == "hinted" else self.prompts.prior

    def common(self, kind: str) -> float:
        return self.prompts.common_hinted if kind == "hinted" else self.prompts.common_prior

    @property
    def sampled_as_scored(self) -> bool:
        return (self.config.temperature, self.config.top_p) == (1.0, 1.0)


def _draws(phase: Phase, sizes: _Sizes) -> list[Draws]:
    proposal = phase.proposal
    if proposal.dataset or proposal.empty:
        return []
    out = []
    retry = RETRY_SHARE if phase.null_group == "hint_retry" else 0.0
    for component, k in _dealt(phase, sizes.traces):
        prompt, common = sizes.prompt(component.prompt), sizes.common(component.prompt)
        drawn = Draws(component.name, sizes.groups * k, sizes.groups, prompt, sizes.trace, common=common)
        out.append(drawn)
    if retry:
        again, prompt = sizes.groups * retry, sizes.prompts.hinted
        out.append(Draws("reasoner/hinted (retry)", again * sizes.traces, again, prompt, sizes.trace))
    if phase.evidence.samples_answers or phase.targets == "sampled":
        contexts = sizes.groups * sizes.traces * (1 + retry)
        prompt = sizes.prompts.prior + sizes.trace.mean + sizes.prompts.cue
        reused = sizes.prompts.prior + sizes.trace.mean if sizes.prefix_cache else 0
        common = 0 if sizes.prefix_cache else sizes.prompts.common_prior
        count = contexts * phase.evidence.samples
        out.append(Draws("answers", count, contexts, prompt, sizes.answer, reused, common))
    return out


def _dealt(phase: Phase, traces: int) -> list[tuple[Component, int]]:
    dealt = deal(phase.proposal.components, traces)
    return [(component, dealt.count(component)) for component in phase.proposal.components]


def _scored(phase: Phase, sizes: _Sizes, live_share: float) -> list[Rows]:
    """Mirrors `measure`: the prior pass, the no-trace answer, the proposal's density, the reference, the comparison of
    sampler and scorer, and what clip and KL remember of the rows."""
    p, z, out = sizes.prompts, sizes.trace, []
    dealt = _dealt(phase, sizes.traces) if phase.proposal.components else []
    reuse = sizes.config.reuse_logps
    wants_trace, gold = bool(phase.needs & {"logp_prior", "worst_token"}), wants_gold(phase)
    drawn_by_prior = sum(k for c, k in dealt if c.name == PRIOR_NAME) if sizes.sampled_as_scored else 0
    stale = sizes.config.rollout_ahead > 0
    own = (
        drawn_by_prior if reuse and not stale else 0
    )  # traces whose own log-probabilities serve as log pi(z|x)
    # the prior pass knows log pi(z|x) of every trace that it or the sampler has seen
    knows = sizes.sampled_as_scored and wants_trace

    def rows(name: str, count: float, prompt: float, labelled: float) -> Rows:
        adapter = name.split("/")[0]
        common = p.common_prior if prompt == p.prior else p.common_hinted
        return Rows(name, adapter, sizes.groups, count, prompt, z, labelled=labelled, common=common)

    if gold:
        new = sizes.traces - own if wants_trace else 0
        tail, y = p.cue + p.answer, p.answer
        both = rows("reasoner/prior", new, p.prior, z.mean)
        out.append(replace(both, answers=1, tail=tail, tail_labelled=tail))
        alone = rows("reasoner/prior", sizes.traces - new, p.prior, 0)
        out.append(replace(alone, answers=1, tail=tail, tail_labelled=y))
    elif wants_trace:
        out.append(rows("reasoner/prior", sizes.traces - own, p.prior, z.mean))
    if phase.evidence.kind == "minus_no_trace":
        none = replace(rows("reasoner/no trace", 1, p.prior, 0), trace=TextLength(1, 1, 0))
        out.append(replace(none, answers=1, tail=p.cue + p.answer, tail_labelled=p.answer))
    for component, k in dealt if "logq" in phase.needs else ():
        if not (knows and component.name == PRIOR_NAME):
            count = sizes.traces - (k if reuse else 0)
            out.append(rows(component.name, count, sizes.prompt(component.prompt), z.mean))
    if "logp_ref" in phase.needs:
        out.append(rows("base/prior", sizes.traces, p.prior, z.mean))
    if dealt:
        out.extend(_compared(phase, sizes, dealt, knows, rows))
    # drawn ahead, the clip is on the ratio to the sampler's own numbers
    for remembered in (phase.clip is not None and not stale, bool(phase.kl)):
        if remembered:
            out.extend(_trained(phase, sizes, live_share))
    return [r for r in out if r.traces and r.groups]


def _compared(
    phase: Phase,
    sizes: _Sizes,
    dealt: Sequence[tuple[Component, int]],
    knows: bool,
    rows: Callable[[str, float, float, float], Rows],
) -> list[Rows]:
    """Traces scored again under the law that drew them: the first of a few groups, or without reuse every one that no
    other pass has scored."""
    z = sizes.trace.mean
    if sizes.config.reuse_logps:
        first = dealt[0][0]
        if sizes.config.rollout_ahead and knows and first.name == PRIOR_NAME:
            return []
        one = rows(first.name, 1, sizes.prompt(first.prompt), z)
        return [replace(one, groups=min(sizes.config.compared_traces, sizes.groups))]
    if "logq" in phase.needs:
        return []
    return [
        rows(c.name, k, sizes.prompt(c.prompt), z) for c, k in dealt if not (knows and c.name == PRIOR_NAME)
    ]


def _trained(phase: Phase, sizes: _Sizes, live_share: float) -> list[Rows]:
    """Mirrors `group_rows`, with every live row there: equal rows, which the trainer merges, are not foreseen."""
    p, kinds, out = sizes.prompts, coefficient_kinds(phase, sizes.traces), []
    live = sizes.traces * live_share
    if not live:
        return []
    of_trace = sizes.trace.mean if "c_z" in kinds else 0
    if "reasoner" in phase.trains and kinds & {"c_z", "c_y"}:
        answers, answer = 0.0, 0.0
        if "c_y" in kinds and phase.targets != "none":
            answers = phase.evidence.samples if phase.targets == "sampled" else 1
            answer = sizes.answer.mean if phase.targets == "sampled" else p.answer
        tail = p.cue + answer if answers else 0
        out.append(
            Rows(
                "reasoner", "reasoner", sizes.groups, live, p.prior, sizes.trace, answers=answers, tail=tail,
                labelled=of_trace, tail_labelled=answer, common=p.common_prior,
            )
        )  # fmt: skip
    if phase.posterior in phase.trains and "c_q" in kinds:
        z = sizes.trace
        hinted = Rows("posterior", phase.posterior, sizes.groups, live, p.hinted, z, labelled=z.mean)
        out.append(replace(hinted, common=p.common_hinted))
    return out


def coefficient_kinds(phase: Phase, traces: int) -> frozenset[str]:
    """Which of c_z, c_q, c_y a phase's `weigh` returns. It is a pure function, so it can be asked with one made-up
    group in which one trace is better than the others."""
    answers = phase.evidence.samples if phase.targets == "sampled" else 1
    low = torch.full((1, traces), -1.0)
    evidence = low.clone()
    evidence[0, 0] = 0.0
    scores = Scores(
        logp_prior=low,
        logq=low,
        log_evidence=evidence,
        logp_answer=low.unsqueeze(-1).expand(1, traces, answers).clone(),
        answer_weight=torch.ones(1, traces, answers),
        length=torch.full((1, traces), 8.0),
        mask=torch.ones(1, traces, dtype=torch.bool),
        logp_ref=low,
        chain=torch.zeros(1, traces, dtype=torch.bool),
        problem=torch.zeros(1, dtype=torch.long),
        logp_empty=torch.full((1,), -1.0),
        worst_token=low,
    )
    given: Coefficients = phase.weigh(scores, {})[0]
    return frozenset(name for name in ("c_z", "c_q", "c_y") if getattr(given, name) is not None)


def total_tokens(rows: Sequence[Rows], layout: Layout) -> float:
    return sum(r.tokens(layout) for r in rows)
