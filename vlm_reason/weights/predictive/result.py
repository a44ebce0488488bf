"""Probabilities of classes from S draws of weights, and how uncertain they are.

    p = mean_s softmax(f_s)     total H[p]     expected mean_s H[softmax(f_s)]     mutual information = total - expected

Entropies in nats. Mutual information is what the weights do not know; the expected entropy is left when they are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictive:
    """Of B examples. A likelihood without classes (Regression, Tokens) has C = 0; what does not exist is NaN.

    ids: names of the examples, in order. probs [B, C]; total_entropy, expected_entropy, mutual_information [B], nats;
    variation_ratio [B]: share of draws whose first choice is not the most common one; logit_variance [B, C]: of the
    outputs f; n: draws S; mode: how it was computed; log_prob [B]: log mean_s p(target | f_s); mean_probs [B, C]: of
    the mean weights, None where not computed; logits [S, B, C]: f, on request (NaN where an example had stopped);
    draws_used [B] where the number of draws was adaptive; mean, variance [B]: of y, for Regression."""

    ids: tuple[str, ...]
    probs: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    logit_variance: Tensor
    n: int
    mode: str
    log_prob: Tensor | None = None
    mean_probs: Tensor | None = None
    logits: Tensor | None = None
    draws_used: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None


def from_logits(
    ids: tuple[str, ...], logits: Tensor, mode: str, mean_probs: Tensor | None = None, keep: bool = False
) -> Predictive:
    """logits [S, B, C], already divided by the output temperature."""
    logp = logits.double().log_softmax(-1)
    p = logp.exp().mean(0)
    total = entropy(p)
    expected = entropy(logp.exp()).mean(0)
    first = logits.argmax(-1)
    common = torch.nn.functional.one_hot(first, logits.shape[-1]).double().mean(0).amax(-1)
    return Predictive(
        ids=ids, probs=p, total_entropy=total, expected_entropy=expected,
        mutual_information=(total - expected).clamp_min(0), variation_ratio=1 - common,
        logit_variance=logits.double().var(0, correction=0), n=len(logits), mode=mode, mean_probs=mean_probs,
        logits=logits if keep else None,
    )  # fmt: skip


def entropy(p: Tensor) -> Tensor:
    """[..., C] -> [...], nats; 0 log 0 = 0."""
    return -torch.special.xlogy(p, p).sum(-1)
