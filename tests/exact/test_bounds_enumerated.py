"""Bounds in order and their gradients, as exact sums over every group that could be drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vlm_reason.exact import EnumerableWorld
from vlm_reason.objectives import (
    cubo,
    elbo,
    eubo,
    forward_chi2_weights,
    iwae,
    iwae_score_weights,
    log_weights,
    renyi,
    self_normalised,
)
from vlm_reason.types import Coefficients, Scores

WORLDS = [EnumerableWorld.random(2, 2, 2, seed=s) for s in range(3)] + [
    EnumerableWorld.random(3, 1, 3, seed=9)
]


def logw_of(scores: Scores) -> Tensor:
    return log_weights(scores.logp_prior, scores.log_evidence, scores.logq, scores.mask)


@pytest.mark.parametrize("world", WORLDS)
def test_bounds_in_order(world: EnumerableWorld) -> None:
    log_p = world.log_marginal(0).item()
    lower = [world.expected_bound(iwae, 0, k).item() for k in range(1, 5)]
    ordered = [
        world.expected_bound(lambda w: renyi(w, 2.0), 0, 3).item(),
        world.expected_bound(elbo, 0, 3).item(),
        *lower[1:],
        log_p,
    ]
    assert all(a < b for a, b in itertools.pairwise(ordered))
    assert world.expected_bound(elbo, 0, 3).item() == pytest.approx(lower[0])
    q = world.logq(0)
    kl = (q.exp() * (q - world.posterior(0).log())).sum()
    assert lower[0] == pytest.approx(log_p - kl.item())
    assert log_p < world.cubo(0).item() < world.cubo(0, order=3).item()


@pytest.mark.parametrize("world", WORLDS)
def test_cubo_is_an_upper_bound_only_as_a_sum(world: EnumerableWorld) -> None:
    # One draw: E (1/2) log w^2 is the ELBO, far below log p.
    one = world.expected_bound(cubo, 0, 1).item()
    assert one == pytest.approx(world.expected_bound(elbo, 0, 1).item())
    assert one < world.log_marginal(0).item()
    several = world.expected_bound(cubo, 0, 4).item()
    assert several < world.cubo(0).item()
    q = world.logq(0)
    second_moment = (q.exp() * (world.log_joint(0) - q).exp() ** 2).sum().item()
    assert world.cubo(0).item() == pytest.approx(0.5 * math.log(second_moment))


@pytest.mark.parametrize("world", WORLDS)
def test_eubo_from_posterior_draws_is_above(world: EnumerableWorld) -> None:
    posterior, logw = world.posterior(0), world.log_joint(0) - world.logq(0)
    z = torch.cartesian_prod(*[torch.arange(world.strings.count)] * 2)
    expected = (posterior[z].prod(1) * eubo(logw[z])).sum().item()
    gap = (posterior * (posterior.log() - world.logq(0))).sum().item()
    assert expected == pytest.approx(world.log_marginal(0).item() + gap)
    assert expected == pytest.approx(world.eubo(0).item())
    assert gap > 0


@pytest.mark.parametrize("world", WORLDS)
def test_every_bound_is_tight_at_the_posterior(world: EnumerableWorld) -> None:
    posterior, log_p = world.posterior(0).log(), world.log_marginal(0).item()
    for bound in (elbo, iwae, cubo, eubo):
        assert world.expected_bound(bound, 0, 2, posterior).item() == pytest.approx(log_p)
    assert world.cubo(0, proposal=posterior).item() == pytest.approx(log_p)


@pytest.mark.parametrize("traces", [1, 2, 4])
@pytest.mark.parametrize("vimco", [True, False])
def test_iwae_gradients(traces: int, vimco: bool) -> None:
    # theta: rho_k on log pi(z_k) and log pi(y|z_k); phi: log mean w - baseline - rho_k on log q(z_k).
    world = EnumerableWorld.random(2, 2, 2, seed=7)

    def weigh(scores: Scores, state):
        logw = logw_of(scores)
        rho = self_normalised(logw)
        c_q = iwae_score_weights(logw, vimco=vimco)
        return Coefficients(c_z=rho, c_y=rho.unsqueeze(2), c_q=c_q), state

    update = world.expected_update(weigh, world.logq(0), 0, traces)
    closed = world.gradient(world.iwae_bound(0, traces))
    assert update.distance(closed) < 1e-12
    assert closed["posterior"].abs().max() > 1e-3


def test_chi2_weights_follow_cubo() -> None:
    # One group holding every string once, weighted by q, is the exact sum E_q[w^2 grad log q] / E_q[w^2].
    world = EnumerableWorld.random(2, 2, 2, seed=8)
    q, joint = world.logq(0), world.log_joint(0).detach()
    for order in (2.0, 3.0):
        logw = (joint - q.detach() + q.detach() / order).unsqueeze(0)  # w q^(1/n): its n-th power is q w^n
        c = forward_chi2_weights(logw, order=order)[0]
        update = world.gradient(-(order - 1) / order * (c * q).sum())
        closed = world.gradient(world.cubo(0, order=order))
        assert torch.allclose(update["posterior"], closed["posterior"], atol=1e-13)


def test_gradient_of_sampled_evidence_bound_uses_right_answers_only() -> None:
    # log P(Y) through K traces drawn from pi with exact evidence: rho on z, its share by answer on y.
    world = EnumerableWorld.random(2, 1, 3, seed=10)
    right = (0, 2)

    def weigh(scores: Scores, state):
        rho = self_normalised(scores.log_evidence)
        return Coefficients(c_z=rho), state

    update = world.expected_update(
        weigh, world.posterior(right).log(), right, 2, evidence=torch.zeros(world.strings.count).double()
    )
    # Posterior draws, equal weights: exactly grad log P on the trace part.
    closed = world.gradient((world.posterior(right).detach() * world.logp_prior()).sum())
    assert update.distance(closed) < 1e-12
