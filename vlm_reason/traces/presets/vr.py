"""Variational Reasoning: traces from a posterior that sees the answer, weighted back to the model that does not.

    phase 1 (posterior)  z_1..K ~ pi,  c_q = e / sum e          forward KL(P(z|x,Y) || q): wake phase on the prior
    phase 2 (reasoner)   z_1..K ~ r,   log w = log e + s(log pi(z|x) - log r(z)),   c_z = normalise(w),
                         c_y = c_z shared by the trace's right answers

    e: accuracy of M sampled answers (verifier), or the answer's likelihood.  s: the ratio's stabiliser.

Options
    proposal   posterior  the adapter trained in phase 1            hinted  the reasoner itself, told the answer
               mixture    prior and posterior (or hinted) side by side, weighted by the mixture density: a weight
                          is then at most e K / n, n of the K traces being the prior's, so the full ratio keeps a
                          useful effective sample size
    ratio      per_token (the paper: length-normalised, close to no ratio) | none (exact) | ess_floor | clip
               | sqrt | zero
    min_weight groups whose estimate of log pi(Y|x) is below log(min_weight) are null: no trace of theirs explains
               the answer without the hint
    min_token  a trace with a token (of z or y*) that pi finds less likely than this log-probability, in nats, has
               evidence 0. A leak penalty: behind a hint the model writes steps that end in the answer whether or
               not they follow; pi, which has not seen the hint, finds the one token where they stop following
    min_joint  a trace with log pi(z|x) + log e(z) below this, in nats, has evidence 0: the same penalty on the whole of
               z and the answer. It keeps more of the sound traces at one purity while traces are short; its meaning
               shifts with their length, that of min_token does not
    wake       prior  phase 1 as above      same  q learns from phase 2's own weights      none  q is never trained

With `ratio="none"` the coefficients are the gradient of the K-trace bound; any other ratio makes it biased
towards r. Zhou et al. 2025 (arXiv 2509.22637), Algorithm 1.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch

from ...errors import UserError
from ...objectives import Ratio, ratio_named, self_normalised
from ...objectives.groups import log_mean_exp
from ...objectives.ratios import Clip, EssFloor
from ...types import Coefficients, Scores
from ..recipe import PRIOR, Component, Evidence, EvidenceKind, Phase, Proposal, Recipe, State
from ..weighing import log_ratio, no_signal, per_answer


def weigh_posterior(scores: Scores, state: State) -> tuple[Coefficients, State]:
    c_q = self_normalised(scores.log_evidence, scores.mask)
    return Coefficients(c_q=c_q, null=no_signal(c_q)), state


def weigh_reasoner(
    scores: Scores,
    state: State,
    *,
    ratio: Ratio,
    min_weight: float,
    min_token: float | None,
    min_joint: float | None,
    both: bool,
) -> tuple[Coefficients, State]:
    evidence = scores.log_evidence
    if min_joint is not None:
        evidence = evidence.masked_fill(scores.logp_prior + evidence < min_joint, -math.inf)
    if min_token is not None:
        assert scores.worst_token is not None
        evidence = evidence.masked_fill(scores.worst_token < min_token, -math.inf)
    logw = evidence + ratio(log_ratio(scores), evidence, scores.length, scores.mask)
    logw = logw.masked_fill(~scores.mask, -math.inf)
    if min_weight > 0:
        exact = evidence + log_ratio(scores)
        too_small = log_mean_exp(exact.masked_fill(~scores.mask, -math.inf), scores.mask) < math.log(
            min_weight
        )
        logw = torch.where(too_small.unsqueeze(1), torch.full_like(logw, -math.inf), logw)
    c = self_normalised(logw, scores.mask)
    return Coefficients(c_z=c, c_q=c if both else None, c_y=per_answer(c, scores), null=no_signal(c)), state


def _needs(ratio: str, min_weight: float, min_token: float | None, min_joint: float | None) -> frozenset[str]:
    """Without a ratio, the proposal's density is not asked for: that saves a scoring pass per component of it."""
    densities = {"logp_prior", "logq"} if ratio != "zero" or min_weight > 0 else set()
    densities |= {"logp_prior"} if min_joint is not None else set()
    return frozenset(densities | ({"logp_answer", "worst_token"} if min_token is not None else set()))


def recipe(
    proposal: Literal["posterior", "hinted", "mixture"] = "posterior",
    partner: Literal["posterior", "hinted"] = "posterior",
    prior_share: float = 0.5,
    ratio: str = "per_token",
    ess_floor: float = 0.5,
    clip_low: float = -math.inf,
    clip_high: float = 0.0,
    min_weight: float = 0.0,
    min_token: float | None = None,
    min_joint: float | None = None,
    evidence: EvidenceKind = "accuracy",
    samples: int = 8,
    wake: Literal["prior", "same", "none"] = "prior",
    null_group: Literal["skip", "renormalise"] = "skip",
) -> Recipe:
    """partner: who shares the mixture with the prior. ess_floor, clip_*: settings of those ratios (nats for
    the clip)."""
    if min_weight < 0:
        raise UserError(
            f"option 'min_weight' of preset 'vr' must be >= 0 (a probability; 0 = off), got {min_weight}"
        )
    for name, gate in (("min_token", min_token), ("min_joint", min_joint)):
        if gate is not None and gate > 0:
            raise UserError(
                f"option '{name}' of preset 'vr' is a log-probability in nats: it must be <= 0, got {gate}"
            )
    one_network = "hinted" in (proposal, partner if proposal == "mixture" else proposal)
    adapter: Literal["reasoner", "posterior"] = "reasoner" if one_network else "posterior"
    guide = Component(adapter, "hinted", share=1 - prior_share if proposal == "mixture" else 1.0)
    parts = (Component("reasoner", "prior", share=prior_share), guide) if proposal == "mixture" else (guide,)
    settings: dict[str, Ratio] = {"ess_floor": EssFloor(ess_floor), "clip": Clip(clip_low, clip_high)}
    shared = Evidence(evidence, samples=samples if evidence in ("accuracy", "verifier") else 1)
    targets: Literal["gold", "sampled"] = "sampled" if shared.samples_answers else "gold"
    reasoner = Phase(
        name="reasoner",
        weigh=partial(
            weigh_reasoner,
            ratio=settings[ratio] if ratio in settings else ratio_named(ratio),
            min_weight=min_weight,
            min_token=min_token,
            min_joint=min_joint,
            both=wake == "same",
        ),
        trains=("reasoner", "posterior") if wake == "same" and adapter == "posterior" else ("reasoner",),
        posterior=adapter,
        proposal=Proposal(parts),
        evidence=shared,
        targets=targets,
        needs=_needs(ratio, min_weight, min_token, min_joint),
        off_policy=ratio != "zero",
        null_group=null_group,
    )
    posterior = Phase(
        name="posterior",
        weigh=weigh_posterior,
        trains=(adapter,),
        posterior=adapter,
        proposal=PRIOR,
        evidence=shared,
        targets="none",
        null_group=null_group,
    )
    return Recipe(
        "vr",
        (posterior, reasoner) if wake == "prior" else (reasoner,),
        traces=4,
        source="arXiv 2509.22637",
        optimises="L_K (exactly with ratio=none); forward KL in phi",
    )
