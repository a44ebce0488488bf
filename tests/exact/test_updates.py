"""Five lines a method: its expected update against autograd of the functional it claims to optimise.

The `weigh` functions are built from the library; the references are sums over strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.exact import EnumerableWorld
from vlm_reason.objectives import NORMALISERS, log_weights, metropolis, null_groups
from vlm_reason.objectives.normalisers import DivideByMean, LooMean, MeanStd, Normaliser
from vlm_reason.types import Coefficients, Scores

WORLD = EnumerableWorld.random(vocab=2, max_tokens=1, answers=2, seed=3)


def reward_weigh(normaliser: Normaliser) -> Callable:
    """Coefficients from the evidence of draws from pi, the same on the trace and on its one sampled answer."""

    def weigh(scores: Scores, state):
        c = normaliser.coefficients(scores.log_evidence, scores.mask)
        return Coefficients(c_z=c, c_y=c.unsqueeze(2), null=null_groups(scores.log_evidence)), state

    return weigh


def sampled_update(normaliser: Normaliser, traces: int, world: EnumerableWorld = WORLD, **settings):
    return world.expected_update(
        reward_weigh(normaliser),
        world.logp_prior(),
        0,
        traces,
        evidence="accuracy",
        targets="sampled",
        **settings,
    )


@pytest.mark.parametrize("traces", [1, 2, 4])
def test_self_normalised_binary_reward_is_maxrl(traces: int) -> None:
    P = WORLD.log_marginal(0).exp()
    c = 1 - (1 - P.detach()) ** traces
    for normaliser in (NORMALISERS["self"], DivideByMean()):
        update = sampled_update(normaliser, traces)
        assert update.distance(WORLD.gradient(c * P.log())) < 1e-12
        assert update.null_rate == pytest.approx((1 - P.item()) ** traces)


@pytest.mark.parametrize("traces", [2, 4])
def test_renormalising_null_groups_makes_it_maximum_likelihood(traces: int) -> None:
    update = sampled_update(NORMALISERS["self"], traces, null_group="renormalise")
    assert update.distance(WORLD.gradient(WORLD.log_marginal(0))) < 1e-12


def test_centring_by_the_mean_costs_one_draw() -> None:
    P = WORLD.log_marginal(0).exp()
    update = sampled_update(DivideByMean(centre=True), 3)
    assert update.distance(WORLD.gradient((1 - (1 - P.detach()) ** 2) * P.log())) < 1e-12


@pytest.mark.parametrize("traces", [1, 3])
def test_rloo_and_reinforce_optimise_p(traces: int) -> None:
    closed = WORLD.gradient(WORLD.log_marginal(0).exp())
    assert sampled_update(NORMALISERS["none"], traces).distance(closed) < 1e-12

    def rloo(scores: Scores, state):  # null groups push down wrong traces: they are not skipped
        c = LooMean().coefficients(scores.log_evidence)
        return Coefficients(c_z=c, c_y=c.unsqueeze(2)), state

    update = WORLD.expected_update(
        rloo, WORLD.logp_prior(), 0, traces, evidence="accuracy", targets="sampled"
    )
    assert update.distance(closed) < 1e-12


def test_grpo_tends_to_its_limit() -> None:
    # E[score | right] = grad log P and E[score | wrong] = -p / (1 - p) grad log P, so a group with mean m moves
    # c = m (1 - m) (1 + p / (1 - p)) / std: the exact finite-K coefficient is a binomial sum.
    P = WORLD.log_marginal(0).exp()
    p = P.item()

    def coefficient(traces: int) -> float:
        mean = np.arange(1, traces) / traces
        chance = scipy.stats.binom.pmf(np.arange(1, traces), traces, p)
        return float((chance * mean * (1 - mean) / (1 - p) / np.sqrt(mean * (1 - mean))).sum())

    for traces in (2, 4):
        update = sampled_update(MeanStd(ddof=0, eps=0.0), traces)
        assert update.distance(WORLD.gradient(coefficient(traces) * P.log())) < 1e-12
    assert coefficient(3000) == pytest.approx(math.sqrt(p / (1 - p)), rel=2e-3)


def test_several_sampled_answers_behind_a_trace() -> None:
    # Accuracy over M answers, ratio 1: E sum_k w_k / K grad log pi(z) = grad P through the trace.
    def weigh(scores: Scores, state):
        c = NORMALISERS["none"].coefficients(scores.log_evidence)
        c_y = scores.answer_weight / scores.answer_weight.shape[1] / scores.answer_weight.shape[2]
        return Coefficients(c_z=c, c_y=c_y), state

    update = WORLD.expected_update(
        weigh, WORLD.logp_prior(), 0, 2, evidence="accuracy", samples=2, targets="sampled"
    )
    assert update.distance(WORLD.gradient(WORLD.log_marginal(0).exp())) < 1e-12
    assert update.groups == (3 * 2**2) ** 2


@pytest.mark.parametrize("density", ["own", "mixture"])
def test_importance_weights_correct_any_proposal(density: str) -> None:
    # Unnormalised weights: E (1/K) sum_k w_k grad log pi = grad P whatever proposes, each slot under its own law
    # included, if the reported density is the mixture of the slots (balance heuristic).
    def weigh(scores: Scores, state):
        logw = log_weights(scores.logp_prior, scores.log_evidence, scores.logq)
        c = NORMALISERS["none"].coefficients(logw)
        return Coefficients(c_z=c, c_y=c.unsqueeze(2)), state

    q, pi = WORLD.logq(0), WORLD.logp_prior()
    proposal = q if density == "own" else torch.stack([pi, q, q])
    update = WORLD.expected_update(weigh, proposal, 0, 3)
    assert update.distance(WORLD.gradient(WORLD.log_marginal(0).exp())) < 1e-12


def test_trice_at_stationarity_is_maximum_likelihood() -> None:
    # The chain's trace comes from the posterior; 0/1 evidence makes every acceptance certain or impossible.
    world = EnumerableWorld.random(vocab=2, max_tokens=2, answers=2, seed=6)
    right = torch.rand(world.strings.count, generator=torch.Generator().manual_seed(0)) < 0.5
    evidence = torch.where(right, 0.0, -math.inf).double()
    posterior = (world.logp_prior() + evidence).softmax(0)

    def weigh(scores: Scores, state):
        chain = metropolis(scores.log_evidence, torch.full_like(scores.log_evidence, 0.5), scores.mask)
        c = torch.nn.functional.one_hot(chain.last, scores.mask.shape[1]).to(scores.log_evidence.dtype)
        return Coefficients(c_z=c, keep=chain.last), state

    update = world.expected_update(
        weigh, world.logp_prior(), 0, 3, evidence=evidence, chain=posterior.log(), targets="none"
    )
    closed = world.gradient(torch.logsumexp((world.logp_prior() + evidence)[right], 0))
    assert update.distance(closed) < 1e-12


def test_per_token_coefficients() -> None:
    world = EnumerableWorld.random(vocab=2, max_tokens=2, answers=2, seed=1)

    def per_trace(scores: Scores, state):
        c = NORMALISERS["self"](scores.log_evidence)
        return Coefficients(c_z=c, c_q=c), state

    def per_token(scores: Scores, state):
        c = NORMALISERS["self"](scores.log_evidence).unsqueeze(2).expand(-1, -1, 3)
        return Coefficients(c_z=c, c_q=c), state

    one = world.expected_update(per_trace, world.logp_prior(), 0, 2)
    other = world.expected_update(per_token, world.logp_prior(), 0, 2)
    assert other.distance(one.gradient) < 1e-14
    assert other.on_prior is not None and other.on_prior.shape == (7, 3)


def test_update_over_a_transformer() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    world = EnumerableWorld.from_model(
        LlamaForCausalLM(config).double().eval(), vocab=2, max_tokens=1, answers=2
    )
    P = world.log_marginal(0).exp()
    update = sampled_update(NORMALISERS["self"], 2, world)
    assert update.distance(world.gradient((1 - (1 - P.detach()) ** 2) * P.log())) < 1e-10


def test_following_the_update_raises_p() -> None:
    world = EnumerableWorld.random(vocab=2, max_tokens=1, answers=2, seed=4)
    before = world.log_marginal(0).exp().item()
    values = [before]
    for _ in range(20):
        update = sampled_update(NORMALISERS["self"], 2, world)
        with torch.no_grad():
            for name, parameter in world.parameters().items():
                parameter += update.gradient[name]
        values.append(world.log_marginal(0).exp().item())
    assert all(b > a for a, b in zip(values, values[1:], strict=False))
    assert values[-1] > 0.9


def test_a_wrong_method_is_caught() -> None:
    def forgot_the_ratio(scores: Scores, state):
        rho = NORMALISERS["self"](scores.log_evidence)
        return Coefficients(c_z=rho, c_y=rho.unsqueeze(2)), state

    update = WORLD.expected_update(forgot_the_ratio, WORLD.logq(0), 0, 2)
    closed = WORLD.gradient(WORLD.iwae_bound(0, 2, WORLD.logq(0).detach()))
    assert update.distance(closed) > 0.05


def nothing(scores: Scores, state) -> tuple[Coefficients, dict]:
    return Coefficients(), state


def wrong_shape(scores: Scores, state) -> tuple[Coefficients, dict]:
    return Coefficients(c_z=torch.zeros(1, 1)), state


def answers_anyway(scores: Scores, state) -> tuple[Coefficients, dict]:
    return Coefficients(c_y=scores.logp_answer), state


@pytest.mark.parametrize(
    ("weigh", "settings", "message"),
    [
        (nothing, {"evidence": "acuracy"}, "'acuracy'; did you mean 'accuracy'"),
        (nothing, {"targets": "silver"}, "'silver'"),
        (nothing, {"null_group": "dataset"}, "'dataset'"),
        (nothing, {"samples": 0}, "samples .* got 0"),
        (nothing, {"evidence": torch.zeros(2)}, r"\[3\], got \[2\]"),
        (nothing, {"chain": torch.zeros(2)}, r"chain .* \[3\]"),
        (nothing, {"proposal": torch.zeros(2)}, r"proposal .* got \[2\]"),
        (wrong_shape, {}, r"c_z must be \[G, K\]"),
        (answers_anyway, {"targets": "none"}, "targets is 'none'"),
    ],
)
def test_bad_input(weigh, settings: dict, message: str) -> None:
    arguments: dict[str, Tensor | str | int] = {"proposal": WORLD.logp_prior(), "answer": 0, "traces": 2}
    with pytest.raises(UserError, match=message):
        WORLD.expected_update(weigh, **{**arguments, **settings})


def test_a_weigh_without_coefficients_moves_nothing() -> None:
    update = WORLD.expected_update(nothing, WORLD.logp_prior(), 0, 2)
    assert all(float(g.abs().max()) == 0 for g in update.gradient.values())
    assert update.distance(update.gradient) == 0
