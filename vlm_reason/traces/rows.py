"""From coefficients to training rows: one forward a row, a coefficient a token.

A row is (context, target, coefficient of each target token). The trace and the first answer behind it share a
row, since log pi(z|x) + log pi(y|x,z) is one forward over [x | z | cue | y] with the cue's coefficient 0;
further answers get a row each. The loss is linear in the log-probabilities, so rows may be split over
micro-batches in any way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..tasks.prompts import PromptBuilder
from ..types import Coefficients, TraceGroup
from .recipe import Phase


@dataclass(frozen=True)
class Row:
    """`weight[t]` multiplies log p(target[t] | context, target[:t]) of `adapter`; tokens of weight 0 are
    context. `old` and `ref` hold the target's log-probabilities when the window was made, under the trained
    weights and under the reference; present only when the phase clips or has a KL term."""

    adapter: str
    context: tuple[int, ...]
    target: tuple[int, ...]
    weight: tuple[float, ...]
    old: tuple[float, ...] | None = None
    ref: tuple[float, ...] | None = None

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.target)

    @property
    def useful(self) -> int:
        return sum(w != 0.0 for w in self.weight)


def _per_token(coefficient: Tensor | None, g: int, k: int, length: int) -> list[float]:
    """The coefficient of each of `length` tokens: one number for all, or the first `length` of [G, K, T]."""
    if coefficient is None:
        return [0.0] * length
    value = coefficient[g, k]
    return [float(value)] * length if value.ndim == 0 else [float(v) for v in value[:length]]


def group_rows(
    g: int, group: TraceGroup, phase: Phase, coefficients: Coefficients, prompts: PromptBuilder
) -> list[Row]:
    """Training rows of one group, at the prompts that are trained (which may differ from those that sampled)."""
    rows: list[Row] = []
    prior = prompts.prior_ids(group.problem)
    for k, trace in enumerate(group.traces):
        z = trace.ids
        c_z = _per_token(coefficients.c_z, g, k, len(z))
        answers = _answers(group, k, phase, prompts)
        c_y = [
            0.0 if coefficients.c_y is None else float(coefficients.c_y[g, k, m]) for m in range(len(answers))
        ]
        live = [(ids, c) for ids, c in zip(answers, c_y, strict=True) if c != 0.0]
        if "reasoner" in phase.trains:
            head, *rest = live or [((), 0.0)]
            rows.append(_joined("reasoner", prior, z, c_z, prompts.cue_ids, *head))
            behind = (*prior, *z, *prompts.cue_ids)
            rows.extend(Row("reasoner", behind, ids, (c,) * len(ids)) for ids, c in rest)
        if phase.posterior in phase.trains and coefficients.c_q is not None:
            weight = tuple(_per_token(coefficients.c_q, g, k, len(z)))
            rows.append(Row(phase.posterior, prompts.hinted_ids(group.problem), z, weight))
    useful = [row for row in rows if row.useful]
    return useful if phase.clip is not None or phase.kl else merged(useful)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same tokens become one with the summed coefficients: the same linear objective, at one forward.
    Not for phases that clip or have a KL, which are not linear in the coefficients."""
    together: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Row] = {}
    for row in rows:
        key = (row.adapter, row.context, row.target)
        before = together.get(key)
        summed = (
            row.weight
            if before is None
            else tuple(a + b for a, b in zip(before.weight, row.weight, strict=True))
        )
        together[key] = Row(*key, summed)
    return [row for row in together.values() if row.useful]


def _answers(group: TraceGroup, k: int, phase: Phase, prompts: PromptBuilder) -> list[tuple[int, ...]]:
    if phase.targets == "gold":
        return [prompts.answer_ids(group.problem.answer)]
    if phase.targets == "sampled":
        return [answer.ids for answer in group.traces[k].answers]
    return []


def _joined(
    adapter: str,
    prior: Sequence[int],
    z: Sequence[int],
    c_z: Sequence[float],
    cue: Sequence[int],
    y: Sequence[int],
    c_y: float,
) -> Row:
    if c_y == 0.0:
        return Row(adapter, tuple(prior), tuple(z), tuple(c_z))
    return Row(adapter, tuple(prior), (*z, *cue, *y), (*c_z, *(0.0 for _ in cue), *(c_y for _ in y)))


def sampler_logps(row: Row, group: TraceGroup, cue_ids: Sequence[int]) -> tuple[float, ...]:
    """The sampler's log-probabilities of a row's target: of the trace, of the answer behind it, 0 at the cue between
    them (`cue_ids`). For rows at the prompt that sampled, with sampled answers. ValueError for one that the group did
    not draw."""
    cue = tuple(cue_ids)
    for trace in group.traces:
        tail = row.target[len(trace.ids) :]
        if row.context == trace.prompt_ids and row.target[: len(trace.ids)] == trace.ids:
            if not tail:
                return trace.completion.logps
            for answer in trace.answers:
                if tail == (*cue, *answer.ids):
                    return (*trace.completion.logps, *(0.0,) * len(cue), *answer.logps)
        elif row.context == (*trace.prompt_ids, *trace.ids, *cue):
            for answer in trace.answers:
                if row.target == answer.ids:
                    return answer.logps
    raise ValueError(f"a row of problem {group.problem.id!r} was not drawn by the sampler")


def dataset_rows(group: TraceGroup, phase: Phase, prompts: PromptBuilder) -> list[Row]:
    """The null-group fallback `dataset`: the problem's own rationale and answer, weight 1. UserError without one."""
    problem = group.problem
    rationale = problem.metadata.get("rationale")
    if rationale is None:
        raise UserError(
            f"problem {problem.id!r} has no rationale to fall back on: add a 'rationale' field to the data, or "
            "choose another null_group"
        )
    z = prompts.trace_ids(str(rationale))
    rows: list[Row] = []
    if "reasoner" in phase.trains:
        prior, y = prompts.prior_ids(problem), prompts.answer_ids(problem.answer)
        rows.append(_joined("reasoner", prior, z, [1.0] * len(z), prompts.cue_ids, y, 1.0))
    if "posterior" in phase.trains:
        rows.append(Row("posterior", prompts.hinted_ids(problem), tuple(z), (1.0,) * len(z)))
    return rows


def _padded(rows: Sequence[tuple[float, ...] | None], like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    for i, values in enumerate(rows):
        if values is None:
            raise AssertionError(
                "rows of a clipped or KL-regularised phase carry their old and reference scores"
            )
        out[i, : len(values)] = torch.tensor(values, dtype=like.dtype)
    return out


def rows_objective(rows: Sequence[Row], logps: Tensor, phase: Phase) -> Tensor:
    """What the rows add to the maximised objective: a scalar, linear in `logps` without clip and KL.

        sum_rows sum_t  w_t log p_t                                          (plain)
        sum_rows sum_t  min(w_t rho_t, w_t clip(rho_t, 1 - c, 1 + c))        (clip; rho = exp(log p - old): the
                                                                              plain gradient at rho = 1)
        - kl * sum_rows sum_t [ exp(ref - log p) - (ref - log p) - 1 ]       (kl, tokens with w_t != 0)

    logps [N, T] is right-padded; padding is selected away, never multiplied by 0, since it may hold anything.
    """
    weight = _padded([row.weight for row in rows], logps)
    live, zero = weight != 0, logps.new_zeros(())
    if phase.clip is None:
        value = weight * logps
    else:
        ratio = torch.exp(torch.where(live, logps - _padded([row.old for row in rows], logps), zero))
        value = torch.minimum(weight * ratio, weight * ratio.clamp(1 - phase.clip, 1 + phase.clip))
    if phase.kl:
        gap = torch.where(live, _padded([row.ref for row in rows], logps) - logps, zero)
        value = value - phase.kl * (torch.exp(gap) - gap - 1)
    return torch.where(live, value, zero).sum()
