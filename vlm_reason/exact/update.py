"""The exact expected update of any `weigh`: all groups it could be shown, weighted by their probability.

    update = E sum_k [ c_z grad log pi(z_k|x) + c_q grad log q(z_k|x,y) + sum_m c_y grad log pi(y_m|x,z_k) ]

It is an ascent direction: minus the gradient of the trainer's loss. Compare it with autograd of a closed functional.

`weigh` is called once, on all groups as one batch of independent problems with equal standing. That is exact for a
weigh that looks at one group at a time. One that mixes groups (a batch mean, a moving average in `state`) sees here a
batch in which every possible group occurs once, whatever its probability, and its result is not an expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..types import Coefficients, Scores
from .expectation import Atoms, make_atoms, possible_groups

if TYPE_CHECKING:
    from .world import EnumerableWorld

State = dict[str, Any]
Weigh = Callable[[Scores, State], tuple[Coefficients, State]]
Answer = int | Collection[int]
"""The right answer, or the set of all answers that count as right."""

EVIDENCE = ("accuracy", "logp", "one")
TARGETS = ("gold", "sampled", "none")


@dataclass(frozen=True)
class ExpectedUpdate:
    """gradient        parameter name -> ascent direction.
    null_rate          probability of a group that `weigh` marks null (0 if it marks none).
    groups             how many groups were enumerated.
    on_prior [N]       expected coefficient of log pi(z|x) for each string ([N, T+1] if `weigh` is per token);
    on_posterior       the same for log q(z|x,y); on_answer [N, A] for log pi(y|x,z). None where `weigh` gives none."""

    gradient: dict[str, Tensor]
    null_rate: float
    groups: int
    on_prior: Tensor | None
    on_posterior: Tensor | None
    on_answer: Tensor | None

    def distance(self, other: dict[str, Tensor]) -> float:
        """Largest difference between this update and another gradient, relative to the larger of their largest
        entries; 0 when both are 0."""
        if other.keys() != self.gradient.keys():
            raise UserError(f"gradients of {sorted(self.gradient)} and {sorted(other)} cannot be compared")
        difference = max(float((g - other[n]).abs().max()) for n, g in self.gradient.items())
        scale = max(max(float(g.abs().max()), float(other[n].abs().max())) for n, g in self.gradient.items())
        return difference / scale if scale > 0 else 0.0


def expected_update(
    world: EnumerableWorld,
    weigh: Weigh,
    proposal: Tensor,
    answer: Answer,
    traces: int,
    evidence: str | Tensor = "logp",
    samples: int = 1,
    targets: str = "gold",
    density: Tensor | None = None,
    chain: Tensor | None = None,
    logp_ref: Tensor | None = None,
    null_group: str = "skip",
    state: State | None = None,
) -> ExpectedUpdate:
    """Exact expected update of `weigh` in `world`.

    proposal   log r(z), [N]: `world.logp_prior()`, `world.logq(y)`, any law. [K, N] gives every slot its own law (the
               components of a mixture are dealt to slots). Detached: a method does not differentiate its sampler.
    answer     the right answer, or the set of all right ones (the first is then the gold answer and q's hint).
    traces     K.
    evidence   "logp": log pi(y*|x,z). "accuracy": log of the right share of M answers sampled from pi, all outcomes of
               which are enumerated as well. "one": 0. Or any tensor [N] of log e(z).
    samples    M, for "accuracy" (and for targets "sampled").
    targets    what c_y multiplies: "gold" [G, K, 1], "sampled" [G, K, M], or "none".
    density    log r reported as Scores.logq, [N]; by default the equal mixture of the slots.
    chain      log-probabilities [N] of a stored chain's trace: it takes slot 0 and is flagged in Scores.chain. The
               exact posterior is the stationary law of TRICE.
    logp_ref   log pi_ref(z|x), [N], if `weigh` reads it.
    null_group "skip", or "renormalise": divided by the probability of a group that is not null (the limit of a large
               batch).

    Raises UserError for an unknown name, a wrong shape, or too many groups to enumerate.
    """
    right = world.right(answer)
    slots = _slots(world, proposal, traces, chain)
    sampled = evidence == "accuracy" if isinstance(evidence, str) else False
    if targets not in TARGETS:
        raise UserError(f"unknown targets {targets!r}{nearest(targets, TARGETS)}")
    if null_group not in ("skip", "renormalise"):
        raise UserError(f"null_group must be 'skip' or 'renormalise', got {null_group!r}")
    if samples < 1:
        raise UserError(f"samples (M) must be >= 1, got {samples}")
    m = samples if sampled or targets == "sampled" else 0
    logp_answers = world.logp_answers().detach()
    atoms = make_atoms(slots, logp_answers, m)
    groups, log_probability = possible_groups(atoms, traces)
    probability = log_probability.exp()
    if density is None:
        density = torch.logsumexp(slots, 0) - math.log(traces)
    scores = _scores(
        world, atoms, groups, right, evidence, targets, density.detach(), chain is not None, logp_ref
    )
    coefficients, _ = weigh(scores, {} if state is None else state)
    return _accumulate(world, atoms, groups, probability, coefficients, right, targets, null_group)


def _slots(world: EnumerableWorld, proposal: Tensor, traces: int, chain: Tensor | None) -> Tensor:
    count = world.strings.count
    slots = proposal.detach()
    if slots.shape == (count,):
        slots = slots.expand(traces, -1)
    if slots.shape != (traces, count):
        raise UserError(
            f"proposal must be log r(z), [{count}], or one law a slot, [{traces}, {count}]; got {list(proposal.shape)}"
        )
    if chain is None:
        return slots
    if chain.shape != (count,):
        raise UserError(f"chain must be log-probabilities [{count}], got {list(chain.shape)}")
    return torch.cat([chain.detach().unsqueeze(0), slots[1:]])


def _scores(
    world: EnumerableWorld,
    atoms: Atoms,
    groups: Tensor,
    right: tuple[int, ...],
    evidence: str | Tensor,
    targets: str,
    density: Tensor,
    has_chain: bool,
    logp_ref: Tensor | None,
) -> Scores:
    trace, answers = atoms.trace, atoms.answers
    logp_answers = world.logp_answers().detach()
    correct = torch.isin(answers, torch.tensor(right)).to(density.dtype)
    if targets == "sampled":
        logp_answer = logp_answers[trace.unsqueeze(1), answers]
        answer_weight = correct
    else:
        logp_answer = logp_answers[trace, right[0]].unsqueeze(1)
        answer_weight = torch.ones_like(logp_answer)
    log_evidence = _log_evidence(world, evidence, right, trace, correct)
    chain = None
    if has_chain:
        chain = torch.zeros(groups.shape, dtype=torch.bool)
        chain[:, 0] = True
    return Scores(
        logp_prior=world.logp_prior().detach()[trace][groups],
        logq=density[trace][groups],
        log_evidence=log_evidence[groups],
        logp_answer=logp_answer[groups],
        answer_weight=answer_weight[groups],
        length=world.strings.length[trace][groups],
        mask=torch.ones(groups.shape, dtype=torch.bool),
        logp_ref=None if logp_ref is None else logp_ref.detach()[trace][groups],
        chain=chain,
        problem=torch.arange(len(groups)),
    )


def _log_evidence(
    world: EnumerableWorld, evidence: str | Tensor, right: tuple[int, ...], trace: Tensor, correct: Tensor
) -> Tensor:
    if isinstance(evidence, Tensor):
        if evidence.shape != (world.strings.count,):
            raise UserError(f"evidence must be log e(z), [{world.strings.count}], got {list(evidence.shape)}")
        return evidence.detach()[trace]
    if evidence == "accuracy":
        return correct.mean(1).log()
    if evidence == "logp":
        return world.logp_answers().detach()[trace, right[0]]
    if evidence == "one":
        return torch.zeros(len(trace), dtype=torch.float64)
    raise UserError(
        f"unknown evidence {evidence!r}{nearest(evidence, EVIDENCE)}; or give a tensor [N] of log e(z)"
    )


def _accumulate(
    world: EnumerableWorld,
    atoms: Atoms,
    groups: Tensor,
    probability: Tensor,
    c: Coefficients,
    right: tuple[int, ...],
    targets: str,
    null_group: str,
) -> ExpectedUpdate:
    """Sum the coefficients of each string over groups, then differentiate one surrogate over strings."""
    null_rate = 0.0 if c.null is None else float(probability[c.null].sum())
    scale = probability
    if c.null is not None:
        scale = scale.masked_fill(c.null, 0.0)
        if null_group == "renormalise" and null_rate < 1:
            scale = scale / (1 - null_rate)
    strings = atoms.trace[groups]
    count, width = world.strings.count, world.strings.max_tokens + 1

    def per_string(values: Tensor, name: str) -> Tensor:
        shape = tuple(values.shape)
        if shape not in (tuple(groups.shape), (*groups.shape, width)):
            raise UserError(
                f"{name} must be [G, K] or [G, K, {width}] with [G, K] = {list(groups.shape)}, got {shape}"
            )
        weighted = values.detach().to(scale.dtype) * scale.reshape(-1, *[1] * (values.ndim - 1))
        total = torch.zeros(count, *shape[2:], dtype=scale.dtype)
        return total.index_add(0, strings.flatten(), weighted.reshape(strings.numel(), *shape[2:]))

    surrogate = torch.zeros((), dtype=torch.float64)
    on_prior = on_posterior = on_answer = None
    if c.c_z is not None:
        on_prior = per_string(c.c_z, "c_z")
        surrogate = surrogate + _dot(on_prior, world.token_logps_prior())
    if c.c_q is not None:
        on_posterior = per_string(c.c_q, "c_q")
        surrogate = surrogate + _dot(on_posterior, world.token_logps_posterior(right[0]))
    if c.c_y is not None:
        if targets == "none":
            raise UserError("weigh returned c_y, but targets is 'none'; ask for 'gold' or 'sampled'")
        gold = torch.full((len(atoms.trace), 1), right[0])
        on_answer = _per_answer(
            c.c_y, scale, strings, (atoms.answers if targets == "sampled" else gold)[groups], world
        )
        surrogate = surrogate + _dot(on_answer, world.logp_answers())
    gradient = (
        world.gradient(surrogate)
        if surrogate.requires_grad
        else {name: torch.zeros_like(p) for name, p in world.parameters().items()}
    )
    return ExpectedUpdate(gradient, null_rate, len(groups), on_prior, on_posterior, on_answer)


def _per_answer(
    c_y: Tensor, scale: Tensor, strings: Tensor, answers: Tensor, world: EnumerableWorld
) -> Tensor:
    if c_y.shape != answers.shape:
        raise UserError(f"c_y must be [G, K, M] = {list(answers.shape)}, got {list(c_y.shape)}")
    weighted = c_y.detach().to(scale.dtype) * scale.reshape(-1, 1, 1)
    cell = strings.unsqueeze(2) * world.n_answers + answers
    total = torch.zeros(world.strings.count * world.n_answers, dtype=scale.dtype)
    return total.index_add(0, cell.flatten(), weighted.flatten()).reshape(-1, world.n_answers)


def _dot(coefficients: Tensor, logps: Tensor) -> Tensor:
    """sum of coefficient times log-probability; a string that is impossible and has coefficient 0 adds nothing."""
    if coefficients.ndim < logps.ndim:
        coefficients = coefficients.unsqueeze(1).expand_as(logps)
    return (coefficients * logps.masked_fill(coefficients == 0, 0.0)).sum()
