"""A window: what one version of the weights sampled, measured and weighed, ready to be trained on.

    sample K traces a problem -> measure (Scores) -> weigh (Coefficients) -> null-group policy -> rows

Everything is computed once, from whole groups, with detached numbers: splitting a window into steps and
micro-batches afterwards cannot change the loss. Of several processes each samples and measures the groups of its own
problems; all of them then weigh the whole window, alike.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..engines.base import Engine, Law, ScoreRequest
from ..engines.rollout import Draw, roll_out
from ..engines.seeds import counter_seed
from ..errors import UserError
from ..tasks.prompts import PromptBuilder
from ..tasks.verifiers import Verifier
from ..types import Coefficients, Completion, Problem, Trace, TraceGroup
from .ahead import Drawn
from .config import TraceConfig
from .diagnostics import generated_tokens, window_metrics
from .distributed import Ranks
from .measure import EvidenceFunction, Measured, adapter_name, measure, verify_answers
from .recipe import Component, Phase, State, deal
from .replay import ChainMemory
from .rows import Row, dataset_rows, group_rows, sampler_logps
from .shares import Share, merged


@dataclass(frozen=True)
class Window:
    """`rows[g]` are group g's training rows; `counts[g]` is 1 if it is in the 1/G of its step, else 0."""

    index: int
    phase: int
    rows: tuple[tuple[Row, ...], ...]
    counts: tuple[int, ...]
    metrics: dict[str, float | int | None]
    completions: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    def fingerprint(self) -> str:
        """16 hex digits of what is trained on."""
        return hashlib.blake2b(repr((self.index, self.rows, self.counts)).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class WindowMaker:
    """What stays the same from window to window."""

    engine: Engine
    config: TraceConfig
    verifier: Verifier | None
    run_seed: int
    callable_evidence: EvidenceFunction | None = None
    show_progress: bool = True
    ranks: Ranks = field(default_factory=Ranks)

    def make(
        self,
        index: int,
        phase_index: int,
        phase: Phase,
        problems: Sequence[Problem],
        visits: Sequence[int],
        traces: int,
        policy_version: int,
        state: State,
        memory: ChainMemory,
        sampling: PromptBuilder,
        training: PromptBuilder,
        ahead: Callable[[], Drawn] | None = None,
    ) -> tuple[Window, State]:
        """One window and the preset's next state; `memory` takes the chains that `weigh` keeps. `sampling`
        prompts draw and score the traces, `training` prompts are trained. `ahead` gives the groups that an earlier
        version drew; without it they are drawn here."""
        seconds: dict[str, float] = {}
        versions: list[int] = []

        def own_share() -> Share:
            started = time.perf_counter()
            if ahead is None:
                drawn = self.draw(index, phase, problems, visits, traces, policy_version, memory, sampling)
            else:
                drawn = ahead()
            seconds["generate"], seconds["waited"] = drawn.seconds, time.perf_counter() - started
            versions.append(drawn.version)
            return self._measured(drawn, phase, sampling, drawn.version != policy_version, seconds)

        groups, measured, discarded = merged(self.ranks.together(own_share))
        scored = time.perf_counter()
        coefficients, state = phase.weigh(_with_problem_keys(measured, groups).scores, state)
        _check_finite(coefficients, phase)
        staleness = policy_version - versions[0]
        rows, counts = self._rows(groups, phase, coefficients, training, staleness > 0)
        metrics = window_metrics(groups, measured, coefficients, [bool(r) for r in rows])
        metrics["tokens/generated"] = generated_tokens(groups) + discarded
        metrics["staleness"] = staleness
        metrics["seconds/generate"] = seconds.get("generate", 0.0)
        metrics["seconds/waited"] = seconds.get("waited", 0.0)
        metrics["seconds/score"] = seconds.get("score", 0.0)
        metrics["seconds/weigh"] = time.perf_counter() - scored
        table = _completions(groups, measured, coefficients) if self.config.log_completions else ()
        _keep_chains(memory, groups, coefficients)  # last: a window that fails before leaves no chain behind
        return Window(index, phase_index, rows, counts, metrics, table), state

    def draw(
        self,
        index: int,
        phase: Phase,
        problems: Sequence[Problem],
        visits: Sequence[int],
        traces: int,
        policy_version: int,
        memory: ChainMemory,
        prompts: PromptBuilder,
    ) -> Drawn:
        """This process's groups of window `index`, sampled. No other process is asked for anything."""
        indices = self.ranks.share(len(problems))
        if not indices:
            return Drawn(index, policy_version, (), ())
        started = time.perf_counter()
        own, visited = [problems[i] for i in indices], [visits[i] for i in indices]
        label = phase.name if self.show_progress else None
        groups = self._draw(phase, own, visited, traces, policy_version, memory, prompts, label)
        discarded: list[TraceGroup] = []
        if phase.null_group == "hint_retry":
            first = groups
            groups = self._retry_with_hint(first, phase, visited, policy_version, prompts, label)
            discarded = [old for old, new in zip(first, groups, strict=True) if old is not new]
        seconds = time.perf_counter() - started
        return Drawn(
            index, policy_version, tuple(indices), tuple(groups), generated_tokens(discarded), seconds
        )

    def _measured(
        self, drawn: Drawn, phase: Phase, prompts: PromptBuilder, stale: bool, seconds: dict[str, float]
    ) -> Share:
        """What was drawn, with its scores; what scoring took is noted in `seconds`."""
        if not drawn.indices:
            return Share((), (), None, drawn.discarded)
        started = time.perf_counter()
        measured = measure(
            drawn.groups,
            phase,
            self.engine,
            prompts,
            self.verifier,
            temperature=self._temperature(phase),
            top_p=self.config.top_p,
            callable_evidence=self.callable_evidence,
            reuse=self.config.reuse_logps,
            stale=stale,
            compared=self.config.compared_traces,
            progress=phase.name if self.show_progress else None,
        )
        seconds["score"] = time.perf_counter() - started
        return Share(drawn.indices, drawn.groups, measured, drawn.discarded)

    def _temperature(self, phase: Phase) -> float:
        return 0.0 if phase.proposal.greedy else self.config.temperature

    def _draw(
        self,
        phase: Phase,
        problems: Sequence[Problem],
        visits: Sequence[int],
        traces: int,
        policy_version: int,
        memory: ChainMemory,
        prompts: PromptBuilder,
        label: str | None,
    ) -> list[TraceGroup]:
        if phase.proposal.empty:
            return [
                _one_trace_each(problem, prompts, [prompts.empty_trace_ids], [""]) for problem in problems
            ]
        if phase.proposal.dataset:
            return [_given(problem, prompts, traces) for problem in problems]
        plan = self._plan(deal(phase.proposal.components, traces), phase)
        groups = self._roll_out(phase, problems, visits, plan, policy_version, prompts, label)
        return [memory.extend(group) for group in groups] if phase.proposal.chain else groups

    def _plan(self, components: Sequence[Component], phase: Phase) -> list[Draw]:
        temperature = self._temperature(phase)
        return [
            Draw(c.name, adapter_name(c), c.prompt == "hinted", temperature, self.config.top_p)
            for c in components
        ]

    def _roll_out(self, phase, problems, visits, plan, policy_version, prompts, label) -> list[TraceGroup]:
        wants_answers = phase.evidence.samples_answers or phase.targets == "sampled"
        temperature = 0.0 if phase.proposal.greedy else self.config.answer_temperature
        return roll_out(
            self.engine,
            prompts,
            problems,
            plan,
            run_seed=self.run_seed,
            stream="posterior" if any(d.hinted for d in plan) else "prior",
            policy_version=policy_version,
            visit=visits,
            max_trace_tokens=self.config.max_trace_tokens,
            max_answer_tokens=self.config.max_answer_tokens,
            answers_per_trace=phase.evidence.samples if wants_answers else 0,
            answer_law=Law("reasoner", temperature),
            progress=label,
        )

    def _retry_with_hint(self, groups, phase, visits, policy_version, prompts, label) -> list[TraceGroup]:
        """Groups without one right answer are drawn again behind the hint (STaR's rationalisation)."""
        if self.verifier is None:
            raise UserError(f"phase {phase.name!r}: null_group hint_retry needs a verifier")
        verdicts = verify_answers(groups, self.verifier, prompts)
        missing = [
            g
            for g, traces in enumerate(verdicts)
            if not any(v.correct for answers in traces for v in answers)
        ]
        if not missing:
            return groups
        plan = self._plan([Component("reasoner", "hinted")] * len(groups[0].traces), phase)
        again = self._roll_out(
            phase,
            [groups[g].problem for g in missing],
            [visits[g] for g in missing],
            plan,
            policy_version,
            prompts,
            label and f"{label} (hinted retry)",
        )
        out = list(groups)
        for g, group in zip(missing, again, strict=True):
            out[g] = group
        return out

    def _rows(
        self,
        groups: Sequence[TraceGroup],
        phase: Phase,
        coefficients: Coefficients,
        prompts: PromptBuilder,
        stale: bool,
    ) -> tuple[tuple[tuple[Row, ...], ...], tuple[int, ...]]:
        rows, counts = [], []
        for g, group in enumerate(groups):
            made = group_rows(g, group, phase, coefficients, prompts)
            null = not made or (coefficients.null is not None and bool(coefficients.null[g]))
            if null and phase.null_group == "dataset":
                made, null = dataset_rows(group, phase, prompts), False
            if stale and phase.clip is not None:
                made = [replace(row, old=sampler_logps(row, group, prompts.cue_ids)) for row in made]
            rows.append(() if null else tuple(made))
            counts.append(0 if null and phase.null_group == "renormalise" else 1)
        return self._with_references(rows, phase), tuple(counts)

    def _with_references(self, rows: list[tuple[Row, ...]], phase: Phase) -> tuple[tuple[Row, ...], ...]:
        """Old and reference log-probabilities of the rows' targets, for phases that clip or have a KL term."""
        if phase.clip is None and not phase.kl:
            return tuple(rows)
        flat = [row for group in rows for row in group]

        def own_share() -> list[tuple[tuple[float, ...] | None, tuple[float, ...] | None]]:
            own = [flat[i] for i in self.ranks.share(len(flat))]
            old: list = [r.old for r in own]  # the sampler's, where an earlier version drew
            ref: list = [None] * len(own)
            if phase.clip is not None and any(o is None for o in old):
                old = self.engine.score([ScoreRequest(r.context, r.target, Law(r.adapter)) for r in own])
            if phase.kl:
                ref = self.engine.score([ScoreRequest(r.context, r.target, Law(None)) for r in own])
            return list(zip(old, ref, strict=True))

        shares = [iter(share) for share in self.ranks.together(own_share)]
        scored = [next(shares[i % len(shares)]) for i in range(len(flat))]
        done = iter(replace(row, old=old, ref=ref) for row, (old, ref) in zip(flat, scored, strict=True))
        return tuple(tuple(next(done) for _ in group) for group in rows)


def _given(problem: Problem, prompts: PromptBuilder, traces: int) -> TraceGroup:
    """The traces that come with a problem, at most K of them."""
    texts = given_traces(problem)[:traces]
    return _one_trace_each(problem, prompts, [prompts.trace_ids(text) for text in texts], texts)


def given_traces(problem: Problem) -> list[str]:
    """`metadata["traces"]` (a list of texts) or the one `rationale`. UserError when there is neither."""
    texts = problem.metadata.get("traces") or [problem.metadata.get("rationale")]
    if texts[0] is None:
        raise UserError(
            f"problem {problem.id!r} has no trace to learn from: this recipe trains on given traces; add a "
            "'rationale' field to the data, or choose a preset that samples (rft, vr)"
        )
    return [str(text) for text in texts]


def _one_trace_each(
    problem: Problem, prompts: PromptBuilder, ids: Sequence[tuple[int, ...]], texts: Sequence[str]
) -> TraceGroup:
    """A group of traces that nothing sampled: their density is not known, log r is taken as 0."""
    completions = [
        Completion(tuple(z), (0.0,) * len(z), text, "stop", 0) for z, text in zip(ids, texts, strict=True)
    ]
    prompt = prompts.prior_ids(problem)
    return TraceGroup(
        problem,
        tuple(Trace(problem.id, k, "dataset", prompt, c, saw_answer=True) for k, c in enumerate(completions)),
    )


def _with_problem_keys(measured: Measured, groups: Sequence[TraceGroup]) -> Measured:
    """Adds the integer key of each group's problem, for presets that keep per-problem state."""
    keys = torch.tensor([counter_seed(0, "order", 0, group.problem.id) for group in groups])
    return replace(measured, scores=replace(measured.scores, problem=keys))


def _keep_chains(memory: ChainMemory, groups: Sequence[TraceGroup], coefficients: Coefficients) -> None:
    if coefficients.keep is None:
        return
    for group, k in zip(groups, coefficients.keep.tolist(), strict=True):
        if k >= 0:
            memory.store(group.traces[k])


def _check_finite(coefficients: Coefficients, phase: Phase) -> None:
    for name in ("c_z", "c_q", "c_y"):
        value = getattr(coefficients, name)
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"phase {phase.name!r}: weigh returned a non-finite {name}; coefficients must be finite"
            )


def _completions(
    groups: Sequence[TraceGroup], measured: Measured, coefficients: Coefficients
) -> tuple[dict[str, Any], ...]:
    """One row a trace for completions/: what a person wants to read when a run goes wrong."""

    def value(tensor: torch.Tensor | None, g: int, k: int) -> float | None:
        if tensor is None:
            return None
        number = float(tensor[g, k].sum())
        return number if abs(number) != float("inf") else None

    return tuple(
        {
            "problem": group.problem.id,
            "question": group.problem.question,
            "answer": group.problem.answer,
            "k": k,
            "proposal": trace.proposal,
            "trace": trace.completion.text,
            "ids": list(trace.ids),
            "finish": trace.completion.finish,
            "answers": [a.text for a in trace.answers],
            "correct": [v.correct for v in measured.verdicts[g][k]],
            "log_evidence": value(measured.scores.log_evidence, g, k),
            "logp_prior": value(measured.scores.logp_prior, g, k),
            "logq": value(measured.scores.logq, g, k),
            "c_z": value(coefficients.c_z, g, k),
            "c_q": value(coefficients.c_q, g, k),
            "c_y": value(coefficients.c_y, g, k),
        }
        for g, group in enumerate(groups)
        for k, trace in enumerate(group.traces)
    )
