"""Last layers against what is known in closed form: evidences, dense matrices, quadrature on a grid, draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence
from torch.nn import functional as F

from vlm_reason.errors import UserError
from vlm_reason.weights.heads import (
    ClassificationTask,
    Data,
    Diagonal,
    Full,
    Head,
    HeadSettings,
    LowRank,
    RegressionTask,
    RewardTask,
    elbo,
    fit_density,
    fit_head,
    make_map,
    rms_normed,
)
from vlm_reason.weights.heads.classification import (
    expected_log_softmax,
    jensen_bound,
    probit,
    two_class_quadrature,
)
from vlm_reason.weights.heads.covariance import Covariance, from_precision, from_tensors
from vlm_reason.weights.heads.regression import log_evidence
from vlm_reason.weights.heads.reward import expected_log_sigmoid, pessimistic, win_probability


def regression(outputs: int = 1, n: int = 40, size: int = 6) -> Data:
    torch.manual_seed(3)
    phi = torch.randn(n, size).double()
    target = phi @ torch.randn(size, outputs).double() + 0.3 * torch.randn(n, outputs).double()
    return Data(phi, torch.zeros(n, outputs).double(), target)


def covariance(structure: str, rows: int, size: int = 5) -> Covariance:
    torch.manual_seed(4)
    if structure == "diagonal":
        return Diagonal(torch.rand(rows, size).double() + 0.1)
    if structure == "low_rank":
        return LowRank(torch.rand(rows, size).double() + 0.1, torch.randn(rows, size, 2).double())
    root = torch.randn(rows, size, size).double().tril(-1) + 2 * torch.eye(size).double()
    return Full(root)


# ------------------------------------------------------------------------------------------------------ covariances


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "full"])
def test_each_structure_equals_its_dense_matrix(structure: str, rows: int) -> None:
    s = covariance(structure, rows)
    dense = s.dense()
    phi = torch.randn(7, 5).double()
    assert torch.allclose(s.variance(phi), torch.einsum("bf,rfg,bg->br", phi, dense, phi), atol=1e-12)
    assert torch.allclose(s.log_det(), torch.linalg.slogdet(dense)[1], atol=1e-12)
    assert torch.allclose(s.diagonal(), dense.diagonal(dim1=-2, dim2=-1), atol=1e-12)
    assert torch.allclose(s.scaled(2.5).dense(), 2.5 * dense, atol=1e-12)
    again = from_tensors({k: v.clone() for k, v in s.float().tensors().items()})
    assert torch.equal(again.variance(phi.float()), s.variance(phi.float()))


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "full"])
def test_draws_have_the_covariance(structure: str) -> None:
    s = covariance(structure, 1)
    n = s.noise_size
    columns = torch.cat([s.deviation(torch.eye(n, dtype=torch.float64)[k : k + 1]) for k in range(n)])
    assert torch.allclose(columns.mT @ columns, s.dense()[0], atol=1e-12)  # deviation is linear in the noise


@pytest.mark.parametrize("structure", ["diagonal", "low_rank", "full"])
def test_kl_and_density_are_those_of_torch(structure: str) -> None:
    s = covariance(structure, 3)
    head = Head(torch.randn(3, 5).double(), s, 1.7)
    rows = MultivariateNormal(head.mean.detach(), s.dense().detach())
    prior = MultivariateNormal(torch.zeros(5).double(), 1.7 * torch.eye(5).double())
    assert head.kl().item() == pytest.approx(float(kl_divergence(rows, prior).sum()), rel=1e-10)
    w = torch.randn(3, 5).double()
    assert float(head.log_prob(w)) == pytest.approx(float(rows.log_prob(w).sum()), rel=1e-10)
    other = Head(torch.randn(3, 5).double(), covariance("full", 1), 1.0)
    theirs = MultivariateNormal(other.mean.detach(), other.covariance.dense().detach())
    assert float(head.kl_to(other)) == pytest.approx(float(kl_divergence(rows, theirs).sum()), rel=1e-10)


def test_a_shared_covariance_counts_once_a_row() -> None:
    torch.manual_seed(0)
    mean = torch.randn(4, 5).double()
    one = covariance("low_rank", 1)
    four = LowRank(one.log_variance.exp().expand(4, -1), one.factor.expand(4, -1, -1))
    shared, separate = Head(mean, one, 0.8), Head(mean, four, 0.8)
    phi, w = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    assert shared.kl().item() == pytest.approx(separate.kl().item(), rel=1e-12)
    assert float(shared.log_prob(w)) == pytest.approx(float(separate.log_prob(w)), rel=1e-12)
    for a, b in zip(shared.moments(phi), separate.moments(phi), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    rows = LowRankMultivariateNormal(mean, four.factor.detach(), four.log_variance.exp().detach())
    assert float(shared.log_prob(w)) == pytest.approx(float(rows.log_prob(w).sum()), rel=1e-10)


def test_the_learnt_prior_is_the_closest() -> None:
    head = Head(torch.randn(3, 5).double(), covariance("full", 3), 1.0)
    best = head.closest_prior()
    at = {s2: Head(head.mean, head.covariance, s2).kl().item() for s2 in (best, best * 1.01, best / 1.01)}
    assert at[best] == min(at.values())
    assert at[best] == pytest.approx(head.kl(learn_prior=True).item(), rel=1e-6)


def test_structures_from_a_precision() -> None:
    torch.manual_seed(1)
    a = torch.randn(2, 6, 9).double()
    precision = a @ a.mT + torch.eye(6).double()
    inverse = torch.linalg.inv(precision)
    assert torch.allclose(from_precision("full", precision, 1).dense(), inverse, atol=1e-10)
    target = MultivariateNormal(torch.zeros(6).double(), inverse)

    def distance(s: Tensor) -> float:
        return float(kl_divergence(MultivariateNormal(torch.zeros(6).double(), s), target).sum())

    diagonal = from_precision("diagonal", precision, 1).diagonal().detach()
    for factor in (0.97, 1.03):  # 1 / diag(P) is the closest diagonal
        assert distance(torch.diag_embed(diagonal)) < distance(torch.diag_embed(diagonal * factor))


# ------------------------------------------------------------------------------------------------------- regression


def test_elbo_with_a_full_covariance_is_the_evidence() -> None:
    data = regression()
    given = HeadSettings(covariance="full", noise_variance=0.09, prior_scale=1.0, learn_prior=False)
    _, fitted = fit_head(RegressionTask(), data, given)
    exact = float(log_evidence(data.phi, data.target, torch.tensor([0.09]).double(), 1.0))
    assert fitted.steps == 0
    assert len(data) * fitted.elbo == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("structure", ["diagonal", "low_rank"])
def test_elbo_is_below_the_evidence(structure: str) -> None:
    data = regression()
    exact = float(log_evidence(data.phi, data.target, torch.tensor([0.09]).double(), 1.0))
    s = HeadSettings(
        covariance=structure, rank=2, noise_variance=0.09, prior_scale=1.0, learn_prior=False, steps=200
    )
    _, fitted = fit_head(RegressionTask(), data, s)
    assert fitted.elbo_start <= fitted.elbo + 1e-9
    assert exact - 2 < len(data) * fitted.elbo < exact


def test_regression_posterior_is_the_conjugate_one() -> None:
    data = regression()
    head, _ = fit_head(
        RegressionTask(), data, HeadSettings(noise_variance=0.09, prior_scale=1.0, learn_prior=False)
    )
    precision = data.phi.mT @ data.phi / 0.09 + torch.eye(6).double()
    mean = torch.linalg.solve(precision, data.phi.mT @ data.target[:, 0] / 0.09)
    assert torch.allclose(head.mean[0], mean, atol=1e-9)
    assert torch.allclose(head.covariance.dense()[0], torch.linalg.inv(precision), atol=1e-9)


def test_learnt_noise_and_prior_maximise_the_evidence() -> None:
    data = regression()
    head, fitted = fit_head(RegressionTask(), data, HeadSettings())
    assert head.log_noise is not None
    noise, prior = head.log_noise.detach().exp(), float(head.prior_variance)
    best = float(log_evidence(data.phi, data.target, noise, prior))
    assert len(data) * fitted.elbo == pytest.approx(best, abs=1e-6)
    for factor in (0.95, 1.05):
        assert float(log_evidence(data.phi, data.target, noise * factor, prior)) < best
        assert float(log_evidence(data.phi, data.target, noise, prior * factor)) < best
    assert float(noise) ** 0.5 == pytest.approx(0.3, rel=0.25)


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_several_outputs_are_so_many_regressions(structure: str) -> None:
    data = regression(outputs=3)
    s = HeadSettings(covariance=structure, noise_variance=0.2, prior_scale=1.0, learn_prior=False)
    _, whole = fit_head(RegressionTask(3), data, s)
    ones = []
    for c in range(3):
        one = Data(data.phi, data.offset[:, c : c + 1], data.target[:, c : c + 1])
        ones.append(fit_head(RegressionTask(), one, s)[1].elbo)
    assert whole.elbo == pytest.approx(sum(ones), rel=1e-12)


def test_each_output_has_its_own_noise() -> None:
    data = regression(outputs=2, n=200)
    louder = Data(
        data.phi, data.offset, data.target + torch.randn(200, 2).double() * torch.tensor([0.0, 2.0])
    )
    head, _ = fit_head(RegressionTask(2), louder, HeadSettings())
    assert head.log_noise is not None
    quiet, loud = (head.log_noise / 2).exp().tolist()
    assert quiet == pytest.approx(0.3, rel=0.2)
    assert loud == pytest.approx(2.02, rel=0.2)


# --------------------------------------------------------------------------------------------------- classification


def grid_expectation(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """E log softmax_y of two independent normal logits, on a grid of 200 x 200."""
    z = torch.linspace(-8, 8, 201).double()
    w = torch.exp(-z.square() / 2)
    w = w / w.sum()
    f0 = mean[:, 0, None, None] + variance[:, 0, None, None].sqrt() * z[:, None]
    f1 = mean[:, 1, None, None] + variance[:, 1, None, None].sqrt() * z
    f0, f1 = torch.broadcast_tensors(f0, f1)
    logp = torch.stack([f0, f1], -1).log_softmax(-1)
    chosen = torch.stack([logp[n, ..., int(t)] for n, t in enumerate(target)])
    return torch.einsum("nij,i,j->n", chosen, w, w)


def test_bounds_are_in_order_for_two_classes() -> None:
    torch.manual_seed(0)
    mean, variance = torch.randn(12, 2).double(), 3 * torch.rand(12, 2).double()
    target = torch.randint(0, 2, (12,))
    exact = grid_expectation(mean, variance, target)
    assert torch.allclose(two_class_quadrature(mean, variance, target), exact, atol=1e-4)
    assert bool((jensen_bound(mean, variance, target) < exact).all())
    assert float(jensen_bound(mean, variance, target).mean()) < float(exact.mean()) - 0.1


def test_monte_carlo_converges_to_quadrature_over_two_dimensions() -> None:
    """Three classes of which one is certain: two uncertain dimensions, on a grid."""
    mean = torch.tensor([[0.3, -0.8, 0.5]]).double()
    variance = torch.tensor([[2.0, 1.0, 0.0]]).double()
    z = torch.linspace(-8, 8, 301).double()
    w = torch.exp(-z.square() / 2)
    w = w / w.sum()
    a, b = torch.meshgrid(mean[0, 0] + 2**0.5 * z, mean[0, 1] + z, indexing="ij")
    logp = torch.stack([a, b, torch.full_like(a, 0.5)], -1).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)

    def normals(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for y in range(3):
        target = torch.tensor([y])
        exact = float(torch.einsum("ij,i,j->", logp[..., y], w, w))
        drawn = float(expected_log_softmax(mean, variance, target, 40_000, normals))
        assert drawn == pytest.approx(exact, abs=0.01)
        assert float(jensen_bound(mean, variance, target)) < drawn


def test_certain_logits_have_no_bounds_between_them() -> None:
    mean, target = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    exact = mean.log_softmax(-1).gather(-1, target[:, None])[:, 0]
    zero = torch.zeros(5, 4).double()
    assert torch.allclose(jensen_bound(mean, zero, target), exact)
    assert torch.allclose(expected_log_softmax(mean, zero, target), exact)
    assert torch.allclose(probit(mean, zero), mean.softmax(-1))


def classes(n: int = 120, count: int = 3, size: int = 4) -> Data:
    torch.manual_seed(5)
    phi = torch.randn(n, size).double()
    f = phi @ torch.randn(size, count).double()
    target = torch.distributions.Categorical(logits=f).sample()
    return Data(phi, torch.zeros(n, count).double(), target)


def test_binary_elbo_is_below_the_evidence_by_quadrature() -> None:
    """One feature, two rows: the evidence is an integral over w_0 - w_1 ~ N(0, 2 s^2)."""
    torch.manual_seed(2)
    phi = torch.randn(30, 1).double()
    target = (torch.rand(30) < (1.5 * phi[:, 0]).sigmoid()).long()
    data = Data(phi, torch.zeros(30, 2).double(), target)
    u = torch.linspace(-12, 12, 4001).double()
    prior = torch.exp(-u.square() / 4) / math.sqrt(4 * math.pi)
    sign = 1 - 2 * target.double()
    loglik = F.logsigmoid(sign * phi[:, 0] * u[:, None]).sum(-1)
    evidence = float((prior * loglik.exp()).sum() * (u[1] - u[0]))
    values = {}
    for bound in ("jensen", "monte_carlo"):
        task = ClassificationTask(2, bound)
        _, fitted = fit_head(task, data, HeadSettings(prior_scale=1.0, learn_prior=False, steps=250))
        values[bound] = 30 * fitted.elbo
    # Rows are independent under q, so it cannot be tight: only w_0 - w_1 is informed, and w_0 + w_1 is as in the prior.
    assert values["jensen"] < values["monte_carlo"] < math.log(evidence)
    assert values["monte_carlo"] > math.log(evidence) - 1.0


def test_steps_raise_the_bound_to_its_maximum() -> None:
    """Two classes, where the bound has no noise: L-BFGS from elsewhere ends at the same value."""
    data = classes(count=2)
    task = ClassificationTask(2)
    head, fitted = fit_head(task, data, HeadSettings(prior_scale=1.0, learn_prior=False, steps=300))
    assert fitted.elbo > fitted.elbo_start + 0.01
    best = Head(torch.zeros(2, 4).double(), Full(torch.eye(4).double().expand(2, 4, 4)), 1.0)
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -elbo(task, best, data, len(data))
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = elbo(task, best, data, len(data)).item()
    assert fitted.elbo == pytest.approx(exact, abs=2e-4)
    assert torch.allclose(head.mean, best.mean, atol=0.05)


def test_offsets_are_part_of_the_outputs() -> None:
    data = classes()
    torch.manual_seed(0)
    w = torch.randn(3, 4).double()
    with_offset = Data(data.phi, data.phi @ w.mT, data.target)
    head, _ = fit_head(ClassificationTask(3), with_offset, HeadSettings(steps=0, prior_scale=1.0))
    assert bool((head.mean == 0).all())  # predictions start as what the offset says
    curvature = (data.phi @ w.mT).softmax(-1)
    weight = (curvature * (1 - curvature))[:, 0]
    precision = torch.einsum("n,nf,ng->fg", weight, data.phi, data.phi) + torch.eye(4).double()
    assert torch.allclose(head.covariance.dense()[0], torch.linalg.inv(precision), atol=1e-9)


def test_a_head_that_replaces_starts_near_the_models_outputs() -> None:
    data = classes()
    torch.manual_seed(0)
    guess = data.phi @ torch.randn(4, 3).double()
    near = Data(data.phi, data.offset, data.target, guess)
    head, _ = fit_head(ClassificationTask(3), near, HeadSettings(steps=0, prior_scale=100.0))
    assert torch.allclose(head.moments(data.phi)[0].softmax(-1), guess.softmax(-1), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- reward


def test_reward_quadrature_is_the_mean_of_many_draws() -> None:
    torch.manual_seed(0)
    mean, variance = torch.tensor([0.0, 1.5, -2.0]).double(), torch.tensor([0.5, 4.0, 9.0]).double()
    draws = mean + variance.sqrt() * torch.randn(400_000, 3).double()
    assert torch.allclose(
        expected_log_sigmoid(mean, variance), F.logsigmoid(draws).mean(0), atol=4 * 3 / 400_000**0.5
    )
    assert torch.allclose(win_probability(mean, variance), draws.sigmoid().mean(0), atol=0.02)


def test_reward_elbo_is_nearly_the_evidence_of_one_feature() -> None:
    torch.manual_seed(2)
    d = torch.randn(25, 1).double()
    data = Data(d, torch.zeros(25, 1).double(), torch.zeros(25))
    u = torch.linspace(-10, 10, 4001).double()
    prior = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    evidence = float((prior * F.logsigmoid(d[:, 0] * u[:, None]).sum(-1).exp()).sum() * (u[1] - u[0]))
    _, fitted = fit_head(RewardTask(), data, HeadSettings(prior_scale=1.0, learn_prior=False))
    assert math.log(evidence) - 0.05 < 25 * fitted.elbo < math.log(evidence)


def test_pessimism_puts_the_unknown_last() -> None:
    mean, variance = torch.tensor([1.0, 1.2, 0.9]), torch.tensor([0.01, 1.0, 0.0])
    assert pessimistic(mean, variance, 0.0).tolist() == mean.tolist()
    assert pessimistic(mean, variance, 1.0).tolist() == pytest.approx([0.9, 0.2, 0.9])
    assert pessimistic(mean, variance, 2.0).argsort(descending=True).tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="pessimism must be >= 0"):
        pessimistic(mean, variance, -1.0)


# --------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(("kind", "size"), [("none", 12), ("pca", 5), ("random", 5)])
def test_features_are_normed_centred_and_as_long_as_1(kind: str, size: int) -> None:
    torch.manual_seed(0)
    hidden = 7 * torch.randn(50, 12) + 3
    made = make_map(hidden, kind, 5, True, seed=1)
    phi = made(hidden)
    assert phi.shape == (50, size + 1) and bool((phi[:, -1] == 1).all())
    assert torch.allclose(made(5 * hidden), phi, atol=1e-4)  # only the direction of a state counts
    assert torch.allclose(phi[:, :-1].mean(0), torch.zeros(size), atol=1e-5)
    x = rms_normed(hidden) - rms_normed(hidden).mean(0)
    if kind == "none":
        assert float(phi[:, :-1].square().sum(-1).mean()) == pytest.approx(1.0, rel=1e-5)
    if kind == "pca":
        share = torch.linalg.svdvals(x)[:5].square().sum() / x.square().sum()
        assert float(phi[:, :-1].square().sum(-1).mean()) == pytest.approx(float(share), rel=1e-4)
    if kind == "random":
        assert torch.equal(make_map(hidden, kind, 5, True, seed=1)(hidden), phi)


def test_pca_of_fewer_examples_than_features() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 40)
    made = make_map(hidden, "pca", 20, False)
    phi = made(hidden)
    assert phi.shape == (6, 5)
    x = rms_normed(hidden)
    x = x - x.mean(0)
    assert torch.allclose(phi @ phi.mT, x @ x.mT / x.square().sum(-1).mean(), atol=1e-4)  # nothing is lost


def test_density_of_features_is_the_gaussian_of_their_covariance() -> None:
    torch.manual_seed(0)
    phi = torch.randn(300, 5) @ torch.randn(5, 5)
    density = fit_density(phi)
    exact = MultivariateNormal(phi.double().mean(0), torch.cov(phi.double().mT, correction=0))
    assert torch.allclose(density.log_density(phi), exact.log_prob(phi.double()), atol=1e-2)
    assert bool((density.log_density(phi + 20) < density.log_density(phi).min()).all())


# ----------------------------------------------------------------------------------------------------------- errors


def test_errors_say_what_was_wrong() -> None:
    data = classes()
    with pytest.raises(UserError, match="covariance must be one of diagonal, low_rank, full, got 'dense'"):
        HeadSettings(covariance="dense")
    with pytest.raises(UserError, match="none of the 2 classes"):
        fit_head(ClassificationTask(2), Data(data.phi, data.offset[:, :2], data.target), HeadSettings())
    with pytest.raises(UserError, match="features of a last layer hold NaN"):
        fit_head(ClassificationTask(3), Data(data.phi * math.nan, data.offset, data.target), HeadSettings())
    with pytest.raises(UserError, match="bound must be one of jensen, monte_carlo"):
        ClassificationTask(3, "exact")
    with pytest.raises(UserError, match="all features are the same"):
        make_map(torch.ones(4, 8), "pca", 2, True)
    wide = Data(torch.randn(4, 1100), torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(UserError, match="project to fewer"):
        fit_head(ClassificationTask(2), wide, HeadSettings(covariance="full"))
    for structure in ("diagonal", "low_rank"):
        _, fitted = fit_head(ClassificationTask(2), wide, HeadSettings(covariance=structure, steps=20))
        assert fitted.elbo > fitted.elbo_start
