"""TRICE: a Markov chain over right traces for every question, with a control variate.

Each visit draws z' from the model. If its answer is right it becomes the question's chain (independence
Metropolis-Hastings for a 0/1 likelihood), else the chain z stays where it is:

    g = grad log pi(z_new, y_new | x)  -  beta grad log pi(z', y' | x)

The second term has mean 0 (z' is a fresh draw), so beta is free: it is the acceptance rate among the *other*
questions of the window, which keeps the estimate unbiased and removes most of the variance once many draws
are right. Questions never yet answered carry no signal. Stationary expectation: grad log P(Y_x|x). Phan et
al. 2023 (arXiv 2312.02179).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Coefficients, Scores
from ..recipe import Component, Evidence, Phase, Proposal, Recipe, State
from ..weighing import every_answer, no_signal, rewards


def weigh(scores: Scores, state: State) -> tuple[Coefficients, State]:
    assert scores.chain is not None
    right = (rewards(scores) > 0) & scores.mask
    fresh = scores.mask & ~scores.chain
    keep = _accepted(right & fresh, right & scores.chain)  # [G], -1 = no chain yet
    accepted = (right & fresh).any(1)
    beta = _others_mean(accepted.to(scores.log_evidence.dtype))
    c = torch.zeros_like(scores.log_evidence)
    has = keep >= 0
    c[has, keep[has]] = 1.0
    control = beta.unsqueeze(1) * fresh / fresh.sum(1, keepdim=True).clamp(min=1)
    c = torch.where(has.unsqueeze(1), c - control, torch.zeros_like(c))
    return Coefficients(c_z=c, c_y=every_answer(c, scores), keep=keep, null=no_signal(c)), state


def _accepted(right_fresh: Tensor, right_chain: Tensor) -> Tensor:
    """The chain's next index: the last right fresh draw (they are proposed in order), else the chain, else -1."""
    index = torch.arange(right_fresh.shape[1])
    last = torch.where(right_fresh, index, torch.full_like(index, -1)).amax(1)
    chain = torch.where(right_chain, index, torch.full_like(index, -1)).amax(1)
    return torch.where(last >= 0, last, chain)


def _others_mean(accepted: Tensor) -> Tensor:
    """Mean over the other groups of the window, [G]; 0 when there is no other."""
    n = len(accepted)
    return (accepted.sum() - accepted) / (n - 1) if n > 1 else torch.zeros_like(accepted)


def recipe() -> Recipe:
    phase = Phase(
        name="trice",
        weigh=weigh,
        proposal=Proposal((Component("reasoner", "prior"),), chain=True),
        evidence=Evidence("accuracy", samples=1),
        targets="sampled",
    )
    return Recipe("trice", (phase,), traces=1, source="arXiv 2312.02179", optimises="log P(Y|x)")
