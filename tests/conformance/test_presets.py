"""Every preset's exact expected update equals the gradient of what it says it optimises.

The update is `weigh` summed over all groups that could be drawn (exact/update.py). The reference is autograd
of a closed functional of the same world, or a plain loop over tuples, written here without
`vlm_reason.objectives`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlm_reason.exact.world import EnumerableWorld
from vlm_reason.traces import PRESETS, build
from vlm_reason.traces import evidence as evidence_functions
from vlm_reason.types import Coefficients, Scores

GOLD = 0
RIGHT = (0, 2)  # the strings a verifier accepts
TIGHT = 1e-6  # weigh works in fp64 here; log-sum-exps agree to rounding


@pytest.fixture
def world() -> EnumerableWorld:
    return EnumerableWorld.random(vocab=2, max_tokens=2, answers=3, seed=5)


def phase_of(name: str, index: int = 0, **options):
    return build(name, options).phases[index]


def log_p(world: EnumerableWorld) -> Tensor:
    return world.log_marginal(RIGHT)


def policy_update(world: EnumerableWorld, name: str, traces: int, **options):
    return world.expected_update(
        phase_of(name, **options).weigh,
        world.logp_prior(),
        RIGHT,
        traces,
        evidence="accuracy",
        targets="sampled",
    )


# ---- right-or-wrong rewards: c(P) grad log P ---------------------------------------------------------------


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_reinforce_climbs_the_probability_of_a_right_answer(world, traces):
    assert policy_update(world, "reinforce", traces).distance(world.gradient(log_p(world).exp())) < TIGHT


@pytest.mark.parametrize("traces", [2, 3])
def test_rloo_climbs_the_probability_of_a_right_answer(world, traces):
    assert policy_update(world, "rloo", traces).distance(world.gradient(log_p(world).exp())) < TIGHT


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_maxrl_climbs_log_p_by_the_chance_of_a_right_trace(world, traces):
    p = float(log_p(world).detach().exp())
    expected = world.gradient((1 - (1 - p) ** traces) * log_p(world))
    assert policy_update(world, "maxrl", traces).distance(expected) < TIGHT


@pytest.mark.parametrize("traces", [2, 3])
def test_grpo_climbs_log_p_by_its_binomial_factor(world, traces):
    p = float(log_p(world).detach().exp())

    def factor(k: int) -> float:
        total = 0.0
        for s in range(1, k):
            std = math.sqrt(s / k * (1 - s / k) * k / (k - 1)) + 1e-4
            up, down = (1 - s / k) / std, -(s / k) / std
            push = (s * up - (k - s) * down * p / (1 - p)) / k
            total += math.comb(k, s) * p**s * (1 - p) ** (k - s) * push
        return total

    update = policy_update(world, "grpo", traces)
    assert update.distance(world.gradient(factor(traces) * log_p(world))) < TIGHT
    assert factor(4000 // 4) == pytest.approx(math.sqrt(p / (1 - p)), rel=5e-3)  # what it tends to


@pytest.mark.parametrize("traces", [1, 3])
def test_rft_climbs_the_references_likelihood_of_right_samples(world, traces):
    """-P_ref grad KL(pi_ref(z, y | x, Y) || pi)."""
    reference = world.logq(1).detach()
    answers = world.logp_answers()
    joint = reference.exp().unsqueeze(1) * answers.detach().exp()
    functional = (joint[:, RIGHT] * (world.logp_prior().unsqueeze(1) + answers[:, RIGHT])).sum()
    update = world.expected_update(
        phase_of("rft").weigh, reference, RIGHT, traces, evidence="accuracy", targets="sampled"
    )
    assert update.distance(world.gradient(functional)) < TIGHT


def test_star_filters_whatever_law_drew_the_trace(world):
    drawn = world.logq(0).detach()
    answers = world.logp_answers()
    joint = drawn.exp().unsqueeze(1) * answers.detach().exp()
    functional = (joint[:, RIGHT] * (world.logp_prior().unsqueeze(1) + answers[:, RIGHT])).sum()
    update = world.expected_update(
        phase_of("star").weigh, drawn, RIGHT, 1, evidence="accuracy", targets="sampled"
    )
    assert update.distance(world.gradient(functional)) < TIGHT


def test_trice_at_its_stationary_law_climbs_log_p():
    """Answers are decided by the trace here, so the chain's law over (z, y) is the posterior over z. The
    control variate's beta leaves its own question out: in the enumerated batch that is a bias of order
    1/groups, removed by repetition."""
    base = EnumerableWorld.random(vocab=2, max_tokens=2, answers=2, seed=3)
    decided = torch.full((base.strings.count, 2), -60.0, dtype=torch.float64)
    decided[torch.arange(base.strings.count), torch.arange(base.strings.count) % 2] = 0.0
    world = EnumerableWorld.from_tables(
        base.strings, base.laws.prior_logits, base.laws.posterior_logits, decided.requires_grad_()
    )
    weigh = phase_of("trice").weigh

    def repeated(scores: Scores, state):
        copies = 400
        many = {
            f: getattr(scores, f).repeat(copies, *[1] * (getattr(scores, f).ndim - 1))
            for f in (
                "logp_prior",
                "logq",
                "log_evidence",
                "logp_answer",
                "answer_weight",
                "length",
                "mask",
                "chain",
            )
        }
        c, state = weigh(replace(scores, **many), state)
        n = len(scores.mask)
        return Coefficients(c_z=c.c_z[:n], c_y=c.c_y[:n], null=c.null[:n]), state

    update = world.expected_update(
        repeated,
        world.logp_prior(),
        0,
        2,
        evidence="accuracy",
        targets="sampled",
        chain=world.posterior(0).log(),
    )
    assert update.distance(world.gradient(world.log_marginal(0))) < 1e-3
    without = world.expected_update(
        weigh,
        world.logp_prior(),
        0,
        2,
        evidence="accuracy",
        targets="sampled",
        chain=world.posterior(0).log(),
    )
    assert without.distance(world.gradient(world.log_marginal(0))) < 0.1


def test_trice_keeps_the_last_right_draw_else_the_chain_and_subtracts_the_others_rate():
    inf = float("inf")
    scores = Scores(
        logp_prior=torch.zeros(3, 2),
        logq=torch.zeros(3, 2),
        log_evidence=torch.tensor([[0.0, 0.0], [0.0, -inf], [-inf, -inf]]),
        logp_answer=torch.zeros(3, 2, 1),
        answer_weight=torch.ones(3, 2, 1),
        length=torch.ones(3, 2),
        mask=torch.tensor([[True, True], [True, True], [True, False]]),
        chain=torch.tensor([[True, False], [True, False], [False, False]]),
    )
    c, _ = phase_of("trice").weigh(scores, {})
    assert c.keep.tolist() == [1, 0, -1]
    # accepted: first group only. beta = others' rate: 0 for the first, 1/2 for the second
    assert c.c_z.tolist() == [[0.0, 1.0], [1.0, -0.5], [0.0, 0.0]]


# ---- one reference answer: likelihood bounds ---------------------------------------------------------------


def test_sft_climbs_the_likelihood_of_given_traces_and_answer(world):
    teacher = world.logq(1).detach()
    functional = (teacher.exp() * (world.logp_prior() + world.logp_answers()[:, GOLD])).sum()
    update = world.expected_update(phase_of("sft").weigh, teacher, GOLD, 1, evidence="one")
    assert update.distance(world.gradient(functional)) < TIGHT
    answer_only = world.expected_update(phase_of("sft", trace=False).weigh, teacher, GOLD, 1, evidence="one")
    assert answer_only.distance(world.gradient((teacher.exp() * world.logp_answers()[:, GOLD]).sum())) < TIGHT


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_iwae_climbs_the_bound_in_both_models(world, traces):
    update = world.expected_update(phase_of("iwae").weigh, world.logq(GOLD), GOLD, traces)
    assert update.distance(world.gradient(world.iwae_bound(GOLD, traces))) < TIGHT


def tuple_weights(world: EnumerableWorld, traces: int, proposal: Tensor):
    """(probability, indices, w) of every K-tuple, by a plain loop."""
    logw = (world.log_joint(GOLD) - proposal).detach()
    for indices in itertools.product(range(world.strings.count), repeat=traces):
        index = torch.tensor(indices)
        yield proposal.detach()[index].sum().exp(), index, logw[index].exp()


def snis_gradient(world: EnumerableWorld, traces: int, power: float) -> Tensor:
    """E sum_k (w_k^n / sum w^n) log q(z_k), to be differentiated in q alone."""
    logq, proposal = world.logq(GOLD), world.logq(GOLD).detach()
    total = torch.zeros((), dtype=torch.float64)
    for p, index, w in tuple_weights(world, traces, proposal):
        total = total + p * (w**power / (w**power).sum() * logq[index]).sum()
    return total


@pytest.mark.parametrize(("name", "power"), [("rws", 1.0), ("chi2", 2.0)])
@pytest.mark.parametrize("traces", [1, 2])
def test_wake_updates_of_both_models(world, name, power, traces):
    """theta follows the K-trace bound with q held; phi the (squared) importance weights."""
    update = world.expected_update(phase_of(name).weigh, world.logq(GOLD), GOLD, traces)
    theta = world.iwae_bound(GOLD, traces, proposal=world.logq(GOLD).detach())
    expected = world.gradient(theta + snis_gradient(world, traces, power))
    assert update.distance(expected) < TIGHT


def test_rws_phi_tends_to_the_forward_kl(world):
    """As K grows the phi-update is the gradient of -KL(posterior || q); its error must fall with K."""
    forward_kl = world.gradient((world.posterior(GOLD).detach() * world.logq(GOLD)).sum())
    theta = {k: v for k, v in forward_kl.items() if "posterior" in k}
    errors = []
    for traces in (1, 2, 3):
        gradient = world.gradient(snis_gradient(world, traces, 1.0))
        errors.append(max(float((gradient[k] - v).abs().max()) for k, v in theta.items()))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("traces", [2, 3])
def test_latro_climbs_its_reverse_kl_bound(world, traces):
    beta = 0.3
    reference = world.logq(1).detach()
    prior, answer = world.logp_prior(), world.logp_answers()[:, GOLD]
    functional = (prior.exp() * (answer - beta * (prior - reference))).sum()
    update = world.expected_update(
        phase_of("latro", beta=beta).weigh, prior, GOLD, traces, logp_ref=reference
    )
    assert update.distance(world.gradient(functional)) < TIGHT


@pytest.mark.parametrize("traces", [2, 3])
def test_jepo_climbs_jensens_bound_of_k_traces(world, traces):
    prior = world.logp_prior()
    multi = world.expected_update(phase_of("jepo").weigh, prior, GOLD, traces)
    assert multi.distance(world.gradient(world.iwae_bound(GOLD, traces, proposal=prior))) < TIGHT
    single = world.expected_update(phase_of("jepo", bound="single").weigh, prior, GOLD, traces)
    assert single.distance(world.gradient((prior.exp() * world.logp_answers()[:, GOLD]).sum())) < TIGHT


@pytest.mark.parametrize("traces", [2, 3])
def test_verifree_climbs_the_probability_of_the_reference_answer(world, traces):
    update = world.expected_update(phase_of("verifree").weigh, world.logp_prior(), GOLD, traces)
    assert update.distance(world.gradient(world.log_marginal(GOLD).exp())) < TIGHT


# ---- shaped rewards ----------------------------------------------------------------------------------------


def test_rlpr_is_reinforce_on_its_standardised_reward(world):
    traces, prior = 2, world.logp_prior()
    empty = 0.2
    reward = (world.logp_answers()[:, GOLD].detach().exp() - empty).clamp(min=0)
    functional = torch.zeros((), dtype=torch.float64)
    for indices in itertools.product(range(world.strings.count), repeat=traces):
        index = torch.tensor(indices)
        r = reward[index]
        advantage = (r - r.mean()) / (r.std(unbiased=False) + 1e-6)
        functional = (
            functional + prior.detach()[index].sum().exp() * (advantage * prior[index]).sum() / traces
        )
    update = world.expected_update(
        phase_of("rlpr", spread=0.0).weigh, prior, GOLD, traces, evidence=reward.log(), targets="sampled"
    )
    assert update.distance(world.gradient(functional)) < TIGHT


def test_rlpr_leaves_out_questions_of_small_spread_and_remembers_the_average():
    scores = Scores(
        logp_prior=torch.zeros(2, 2),
        logq=torch.zeros(2, 2),
        log_evidence=torch.tensor([[0.9, 0.1], [0.5, 0.49]]).log(),
        logp_answer=torch.zeros(2, 2, 1),
        answer_weight=torch.ones(2, 2, 1),
        length=torch.ones(2, 2),
        mask=torch.ones(2, 2, dtype=torch.bool),
    )
    c, state = phase_of("rlpr", spread=0.5, decay=0.9).weigh(scores, {})
    assert c.null.tolist() == [False, True]
    assert c.c_z[0].tolist() == pytest.approx([0.5, -0.5], abs=1e-4)
    assert state["mean_std"] == pytest.approx((0.4 + 0.005) / 2, abs=1e-6)
    _, later = phase_of("rlpr", decay=0.9).weigh(scores, {"mean_std": 1.0})
    assert later["mean_std"] == pytest.approx(0.9 + 0.1 * 0.2025, abs=1e-6)


@pytest.mark.parametrize("traces", [2, 3])
def test_nover_climbs_the_expected_rank(world, traces):
    """E R(z) against K-1 independent rivals: (K-1)/K [ Pr(rival costs more) + Pr(ties)/2 ]."""
    prior, mean_logp = world.logp_prior(), world.logp_answers()[:, GOLD].detach()
    length = world.strings.length.double()
    cost = -mean_logp / (1 + length.clamp(min=1).log10()).clamp(min=1)
    beats = (cost.unsqueeze(1) < cost.unsqueeze(0)).double() + 0.5 * (
        cost.unsqueeze(1) == cost.unsqueeze(0)
    ).double()
    score = (traces - 1) / traces * (beats @ prior.detach().exp())
    weigh = phase_of("nover").weigh

    def ranked(scores: Scores, state):
        rank = evidence_functions.perplexity_rank(scores.log_evidence, scores.length.double())
        return weigh(replace(scores, log_evidence=rank), state)

    update = world.expected_update(ranked, prior, GOLD, traces, evidence=mean_logp, targets="sampled")
    assert update.distance(world.gradient((prior.exp() * score).sum())) < TIGHT


# ---- variational reasoning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("traces", [1, 3])
def test_vr_posterior_phase_is_forward_kl_scaled_by_the_chance_of_a_right_trace(world, traces):
    p = float(log_p(world).detach().exp())
    functional = (1 - (1 - p) ** traces) * (world.posterior(RIGHT).detach() * world.logq(RIGHT[0])).sum()
    update = world.expected_update(
        phase_of("vr").weigh, world.logp_prior(), RIGHT, traces, evidence="accuracy", targets="none"
    )
    assert update.distance(world.gradient(functional)) < TIGHT


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_vr_with_the_full_ratio_climbs_the_bound(world, traces):
    q = world.logq(GOLD).detach()
    update = world.expected_update(phase_of("vr", 1, ratio="none", evidence="logp").weigh, q, GOLD, traces)
    assert update.distance(world.gradient(world.iwae_bound(GOLD, traces, proposal=q))) < TIGHT


def loop_update(
    world: EnumerableWorld, slots: list[Tensor], weights: Callable[[Tensor, Tensor], Tensor], samples: int
) -> Tensor:
    """E sum_k c_k [log pi(z_k) + mean over right answers of log pi(y|z_k)] by a loop over (z, y_1..y_M) tuples.

    weights(trace indices [K], right share [K]) -> c [K]."""
    prior, answers = world.logp_prior(), world.logp_answers()
    atoms = list(
        itertools.product(
            range(world.strings.count), itertools.product(range(world.n_answers), repeat=samples)
        )
    )
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(atoms, repeat=len(slots)):
        z = torch.tensor([a[0] for a in group])
        logp = sum(slot[zi] for slot, zi in zip(slots, z, strict=True))
        logp = logp + sum(answers.detach()[a[0], y] for a in group for y in a[1])
        share = torch.tensor([sum(y in RIGHT for y in a[1]) / samples for a in group], dtype=torch.float64)
        c = weights(z, share)
        value = (c * prior[z]).sum()
        for k, (zi, ys) in enumerate(group):
            good = [answers[zi, y] for y in ys if y in RIGHT]
            if good:
                value = value + c[k] * torch.stack(good).mean()
        total = total + logp.exp() * value
    return total


def normalised(w: Tensor) -> Tensor:
    return w / w.sum() if float(w.sum()) > 0 else torch.zeros_like(w)


def small_world() -> EnumerableWorld:
    return EnumerableWorld.random(vocab=1, max_tokens=2, answers=3, seed=9)


@pytest.mark.parametrize(
    ("ratio", "power"), [("per_token", 1.0), ("sqrt", 0.5), ("none", 0.0), ("zero", None)]
)
def test_vr_weights_sampled_answers_under_every_ratio(ratio, power):
    world = small_world()
    q = world.logq(0).detach()
    gap, length = (world.logp_prior() - q).detach(), world.strings.length.double()
    stable = torch.zeros_like(gap) if power is None else gap / length**power

    def weights(z: Tensor, share: Tensor) -> Tensor:
        return normalised(share * stable[z].exp())

    update = world.expected_update(
        phase_of("vr", 1, ratio=ratio).weigh, q, RIGHT, 2, evidence="accuracy", samples=2, targets="sampled"
    )
    assert update.distance(world.gradient(loop_update(world, [q, q], weights, samples=2))) < TIGHT


def test_vr_mixture_uses_the_mixture_density_whoever_drew_the_trace():
    world = small_world()
    q, prior = world.logq(0).detach(), world.logp_prior().detach()
    mixture = torch.logsumexp(torch.stack([prior, q]), 0) - math.log(2)

    def weights(z: Tensor, share: Tensor) -> Tensor:
        return normalised(share * (prior - mixture)[z].exp())

    phase = phase_of("vr", 1, proposal="mixture", ratio="none")
    assert [c.name for c in phase.proposal.components] == ["reasoner/prior", "posterior/hinted"]
    update = world.expected_update(
        phase.weigh,
        torch.stack([prior, q]),
        RIGHT,
        2,
        evidence="accuracy",
        targets="sampled",
        density=mixture,
    )
    assert update.distance(world.gradient(loop_update(world, [prior, q], weights, samples=1))) < TIGHT


def test_vr_min_weight_drops_groups_whose_answer_the_model_cannot_explain():
    world = small_world()
    q = world.logq(0).detach()
    gap = (world.logp_prior() - q).detach()
    floor = 0.3

    def weights(z: Tensor, share: Tensor) -> Tensor:
        w = share * gap[z].exp()
        return normalised(w) if float(w.mean()) >= floor else torch.zeros_like(w)

    phase = phase_of("vr", 1, ratio="none", min_weight=floor)
    update = world.expected_update(phase.weigh, q, RIGHT, 2, evidence="accuracy", targets="sampled")
    expected = world.gradient(loop_update(world, [q, q], weights, samples=1))
    assert update.distance(expected) < TIGHT
    assert 0.05 < update.null_rate < 0.95  # the floor bites here, and not everywhere


def test_vr_least_likely_token_gate_takes_the_evidence_of_a_trace_the_model_would_not_write():
    world = small_world()
    q = world.logq(0).detach()
    tokens = world.token_logps_prior().detach()
    worst = torch.minimum(tokens.amin(1), world.logp_answers().detach()[:, GOLD])
    gate = float(worst.median())
    gap = (world.logp_prior() - q).detach()

    def weights(z: Tensor, share: Tensor) -> Tensor:
        return normalised(share * gap[z].exp() * (worst[z] >= gate))

    phase = phase_of("vr", 1, ratio="none", min_token=gate)

    def gated(scores: Scores, state):
        by_logp = {
            round(float(p), 12): float(w) for p, w in zip(world.logp_prior().detach(), worst, strict=True)
        }
        found = scores.logp_prior.clone().apply_(lambda p: by_logp[round(p, 12)])
        return phase.weigh(replace(scores, worst_token=found), state)

    update = world.expected_update(gated, q, RIGHT, 2, evidence="accuracy", targets="sampled")
    assert update.distance(world.gradient(loop_update(world, [q, q], weights, samples=1))) < TIGHT
    assert 0.05 < update.null_rate < 0.95


def test_vr_joint_gate_takes_the_evidence_of_a_trace_the_model_would_not_write():
    world = small_world()
    q = world.logq(0).detach()
    prior = world.logp_prior().detach()
    gate = float((prior + world.logp_answers().detach()[:, GOLD]).median())
    gap = prior - q

    def weights(z: Tensor) -> Tensor:
        evidence = world.logp_answers().detach()[:, GOLD][z]
        return normalised((evidence + gap[z]).exp() * (prior[z] + evidence >= gate))

    phase = phase_of("vr", 0, ratio="none", evidence="logp", wake="none", min_joint=gate)
    update = world.expected_update(phase.weigh, q, GOLD, 2)
    expected = 0.0
    for i in range(len(q)):
        for j in range(len(q)):
            z = torch.tensor([i, j])
            c = weights(z)
            expected = (
                expected
                + (q[i] + q[j]).exp() * (c * (world.logp_prior() + world.logp_answers()[:, GOLD])[z]).sum()
            )
    assert update.distance(world.gradient(expected)) < TIGHT
    assert 0.05 < update.null_rate < 0.95


def test_vr_same_wake_trains_the_posterior_on_the_reasoners_weights(world):
    q = world.logq(GOLD).detach()
    phase = phase_of("vr", 0, ratio="none", evidence="logp", wake="same")
    update = world.expected_update(phase.weigh, q, GOLD, 2)
    expected = world.iwae_bound(GOLD, 2, proposal=q) + snis_gradient(world, 2, 1.0)
    assert update.distance(world.gradient(expected)) < TIGHT


def test_vr_released_learns_the_teacher_then_the_best_of_k():
    world = small_world()
    teacher = world.logq(1).detach()
    update = world.expected_update(
        phase_of("vr_released", 0).weigh, teacher, GOLD, 1, evidence="one", targets="none"
    )
    assert update.distance(world.gradient((teacher.exp() * world.logq(GOLD)).sum())) < TIGHT

    q = world.logq(0).detach()
    stable = (world.logp_prior() - q).detach() / world.strings.length.double()

    def weights(z: Tensor, share: Tensor) -> Tensor:
        w = share * stable[z].exp()
        c = torch.zeros_like(w)
        if float(w.max()) > 0:
            c[int(w.argmax())] = 1.0
        return c

    selected = world.expected_update(
        phase_of("vr_released", 2).weigh, q, RIGHT, 2, evidence="accuracy", samples=1, targets="sampled"
    )
    assert selected.distance(world.gradient(loop_update(world, [q, q], weights, samples=1))) < TIGHT


def test_every_preset_is_here():
    names = "sft star rft reinforce rloo grpo maxrl rws iwae trice latro jepo verifree rlpr nover chi2 vr vr_released"
    assert set(PRESETS) == set(names.split())
    assert all(recipe.name == name for name, recipe in PRESETS.items())
