"""Leave-one-out against leaving out: ridge regression in closed form, logistic regression refitted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from tests.linear_parts import DOWN, UP, Linear, linear_model, rows, up_of
from vlm_reason.errors import UserError
from vlm_reason.weights import Choice, DiagonalGaussian, Example, Origin, Regression, Tokens, in_batches
from vlm_reason.weights.adapter import adapter_tensors, base_fingerprint, peft_config_dict
from vlm_reason.weights.loo import best_checkpoint, left_out, loo


class Full(DiagonalGaussian):
    """A dense covariance over B [C, F], for the formulas alone: its draws are the diagonal's."""

    covariance: Tensor  # [C F, C F]

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        j = jacobian[UP].flatten(2).double()
        return j @ self.covariance @ j.mT


def gaussian(model: Any, weight: Tensor, covariance: Tensor, size: int, **origin: Any) -> Full:
    sigma = covariance.diagonal().sqrt().view(weight.shape)
    mean = {DOWN: torch.eye(weight.shape[1]), UP: weight}
    made = Full(
        peft_config_dict(model, "default"), mean, {UP: sigma},
        Origin(base_fingerprint(model), data_size=size, **origin),
    )  # fmt: skip
    made.covariance = covariance
    return made


# ------------------------------------------------------------------------------------------------------------- ridge


class Ridge:
    def __init__(self, size: int = 120, features: int = 6, noise: float = 0.7, prior: float = 2.0) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(size, features)
        self.y = self.x @ torch.randn(features) + noise * torch.randn(size)
        self.noise, self.prior, self.size = noise, prior, size
        self.model = linear_model(self.x, 1)
        self.likelihood = Linear(Regression(torch.zeros(1), noise))
        self.data = rows(self.y)

    def fit(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.x.double()[keep], self.y.double()[keep]
        precision = x.T @ x / self.noise**2 + self.prior * torch.eye(x.shape[1])
        return torch.linalg.solve(precision, x.T @ y / self.noise**2), precision.inverse()

    def posterior(self, cold: float = 1.0, **origin: Any) -> Full:
        mean, covariance = self.fit(torch.arange(self.size))
        return gaussian(self.model, mean[None].float(), covariance / cold, self.size, **origin)

    def exact(self) -> tuple[Tensor, Tensor]:
        """(prediction, -log p) of each example by the fit to the others."""
        left = [torch.arange(self.size)[torch.arange(self.size) != n] for n in range(self.size)]
        f = torch.stack([self.x[n].double() @ self.fit(keep)[0] for n, keep in enumerate(left)])
        return f, -torch.distributions.Normal(f, self.noise).log_prob(self.y.double())


def test_ridge_regression() -> None:
    ridge = Ridge()
    exact_f, exact_nll = ridge.exact()
    first = ridge.posterior().loo(ridge.model, ridge.data, ridge.likelihood, newton=False)
    assert first.mode == "linearised" and first.ids == tuple(e.id for e in ridge.data)
    moved = (first.logits + first.shift)[:, 0]
    whole = first.logits[:, 0]
    assert np.corrcoef(moved, exact_f)[0, 1] > 0.999 and np.corrcoef(first.nll, exact_nll)[0, 1] > 0.999
    assert (
        np.corrcoef(first.shift[:, 0], exact_f - whole)[0, 1] > 0.99
    )  # the shift itself, not what it is added to
    assert float(((moved - exact_f) / exact_f).abs().median()) < 0.0018
    newton = loo(ridge.posterior(), ridge.model, ridge.data, ridge.likelihood)
    hat = torch.einsum("ni,ij,nj->n", ridge.x.double(), ridge.posterior().covariance, ridge.x.double())
    torch.testing.assert_close(newton.leverage, hat / ridge.noise**2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((newton.logits + newton.shift)[:, 0], exact_f, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(newton.nll, exact_nll, atol=2e-5, rtol=2e-5)
    assert newton.mean_nll > float(newton.train_nll.mean())


def test_a_cold_posterior_is_warmed_up() -> None:
    ridge = Ridge(40)
    warm = ridge.posterior().loo(ridge.model, ridge.data, ridge.likelihood)
    for cold in (
        ridge.posterior(10.0, ess=400.0),
        ridge.posterior(10.0, ess=40.0, temper=10.0),
        ridge.posterior(5.0, ess=20.0, temper=10.0),
    ):
        found = cold.loo(ridge.model, ridge.data, ridge.likelihood)
        torch.testing.assert_close(found.shift, warm.shift, atol=1e-6, rtol=1e-5)


def test_a_sigma_too_wide_for_the_data_is_said_once() -> None:
    """Leverage is V / noise^2: of the exact posterior below 1, of one a hundred times as wide above it for some."""
    ridge = Ridge(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = ridge.posterior().loo(ridge.model, ridge.data, ridge.likelihood)
    count = int((100 * right.leverage >= 1).sum())
    assert 0 < count and float(right.leverage.max()) < 1
    with pytest.warns(UserWarning, match=f"{count} of 40 examples have leverage >= 1.*do not trust") as said:
        ridge.posterior(0.01).loo(ridge.model, ridge.data, ridge.likelihood)
    assert len(said) == 1


def test_the_adapter_is_left_as_it_was() -> None:
    ridge = Ridge(10)
    with torch.no_grad():
        up_of(ridge.model).fill_(3.0)
    ridge.model.train()
    ridge.posterior().loo(ridge.model, ridge.data, ridge.likelihood)
    assert bool((up_of(ridge.model) == 3.0).all()) and ridge.model.training


# ---------------------------------------------------------------------------------------------------------- classes


class Logistic:
    """Three classes, f = W x; MAP by Newton's method and the Laplace covariance, dense, in fp64."""

    def __init__(self, size: int, features: int, wrong: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        truth = 1.5 * torch.randn(3, features)
        self.x, self.new = torch.randn(size, features), torch.randn(4000, features)
        self.y, self.y_new = (
            torch.multinomial((x @ truth.T).softmax(-1), 1)[:, 0] for x in (self.x, self.new)
        )
        self.wrong = set(range(wrong))
        if wrong:  # labels without noise but for these
            self.y = (self.x @ truth.T).argmax(-1)
            self.y[:wrong] = (self.x[:wrong] @ truth.T).argmin(-1)
        self.model = linear_model(self.x, 3)
        self.likelihood = Linear(Choice((0, 1, 2)))
        self.data = rows(self.y)

    def fit(self, prior: float) -> Full:
        x = self.x.double()
        theta = torch.zeros(3 * x.shape[1], dtype=torch.float64)

        def curvature(p: Tensor) -> Tensor:
            h = torch.einsum("ncd,ni,nj->cidj", torch.diag_embed(p) - p[:, :, None] * p[:, None], x, x)
            return h.reshape(len(theta), -1) + prior * torch.eye(len(theta))

        for _ in range(30):
            p = (x @ theta.view(3, -1).T).softmax(-1)
            gradient = ((p - F.one_hot(self.y, 3)).T @ x).flatten() + prior * theta
            theta = theta - torch.linalg.solve(curvature(p), gradient)
        p = (x @ theta.view(3, -1).T).softmax(-1)
        return gaussian(self.model, theta.view(3, -1).float(), curvature(p).inverse(), len(x))

    def loss_on_new(self, posterior: Full) -> float:
        f = self.new @ posterior.mean()[UP].T
        return float(F.cross_entropy(f, self.y_new))


def test_mislabelled_examples_come_first() -> None:
    problem = Logistic(150, 4, wrong=8, seed=2)
    posterior = problem.fit(1.0)
    found = posterior.loo(problem.model, problem.data, problem.likelihood)
    suspects = found.ranking("nll")
    assert {int(name[1:]) for name in suspects[:8]} == problem.wrong
    ranking = list(posterior.sensitivity(problem.model, problem.data, problem.likelihood))
    assert ranking == found.ranking() and len(ranking) == 150
    # the formula, written out for one example
    (one,) = [e for e in problem.data if e.id == ranking[0]]
    x = problem.x[one.ids[0]].double()
    p = (posterior.mean()[UP].double() @ x).softmax(-1)
    j = torch.block_diag(x[None], x[None], x[None])
    v = (j @ posterior.covariance @ j.T).diagonal()
    r = p - F.one_hot(torch.tensor(int(one.target)), 3)
    by_hand = float((r * p * (1 - p) * v).abs().sum())
    got = posterior.sensitivity(problem.model, problem.data, problem.likelihood)[one.id]
    assert got == pytest.approx(by_hand, rel=1e-4)


def test_the_estimate_chooses_the_prior_that_new_data_would() -> None:
    problem = Logistic(60, 12)
    posteriors = {f"{prior:g}": problem.fit(prior) for prior in (1e-2, 1e-1, 1.0, 10.0, 100.0)}
    best, losses = best_checkpoint(posteriors, problem.model, problem.data, problem.likelihood)
    new = {name: problem.loss_on_new(p) for name, p in posteriors.items()}
    assert best == min(new, key=lambda name: new[name]) == min(losses, key=lambda name: losses[name])
    train = posteriors["0.1"].loo(problem.model, problem.data, problem.likelihood).train_nll.mean()
    assert float(train) < 0.5 * new["0.1"]  # what training shows
    assert losses[best] == pytest.approx(new[best], rel=0.15)
    assert losses["0.01"] > 1.5 * losses[best]
    first = best_checkpoint(posteriors, problem.model, problem.data, problem.likelihood, newton=False)
    assert (
        first[0] == "0.01" and first[1]["0.01"] < 0.05 < 1.4 < new["0.01"]
    )  # blind to what one example can do


def test_newton_is_near_refitting() -> None:
    problem = Logistic(50, 3)
    found = problem.fit(1.0).loo(problem.model, problem.data, problem.likelihood)
    exact = []
    for n in range(50):
        rest = Logistic(50, 3)
        keep = torch.arange(50) != n
        rest.x, rest.y = problem.x[keep], problem.y[keep]
        w = rest.fit(1.0).mean()[UP]
        exact.append(float(F.cross_entropy((problem.x[n] @ w.T)[None], problem.y[n][None])))
    assert np.corrcoef(found.nll, exact)[0, 1] > 0.999
    assert found.mean_nll == pytest.approx(sum(exact) / 50, rel=0.01)


# ------------------------------------------------------------------------------------------------ ways, and refusals


def llama_posterior(tiny_llama: Any, sigma: float = 0.01) -> tuple[Any, DiagonalGaussian, list[Example]]:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama, config).eval()
    mean = {k: 0.3 * torch.randn_like(v) for k, v in adapter_tensors(model).items()}
    q = DiagonalGaussian(
        peft_config_dict(model, "default"), mean, {k: torch.full_like(v, sigma) for k, v in mean.items()},
        Origin(base_fingerprint(model)),
    )  # fmt: skip
    ids = [tuple(torch.randint(3, 64, (4 + n % 3,)).tolist()) for n in range(9)]
    return model, q, [Example(f"e{n}", row, n % 3) for n, row in enumerate(ids)]


def test_sampled_is_linearised_where_draws_are_near(tiny_llama: Any) -> None:
    model, q, data = llama_posterior(tiny_llama)
    likelihood = Choice((5, 9, 11))
    exact = q.loo(model, data, likelihood)
    sampled = q.loo(model, data, likelihood, 600, "sampled", seed=4)
    assert exact.mode == "linearised" and sampled.mode == "sampled"
    torch.testing.assert_close(sampled.logits, exact.logits, atol=1e-5, rtol=1e-5)
    error = (sampled.shift - exact.shift).norm() / exact.shift.norm()
    assert float(error) < 3 * (2 / 600) ** 0.5
    torch.testing.assert_close(sampled.sensitivity, exact.sensitivity, rtol=0.25, atol=1e-6)


def test_a_softened_posterior_scores_at_its_temperature(tiny_llama: Any) -> None:
    model, q, data = llama_posterior(tiny_llama)
    likelihood = Choice((5, 9, 11))
    plain = q.loo(model, data, likelihood)
    q.origin = replace(q.origin, output_temperature=2.0)
    for mode in ("linearised", "sampled"):
        soft = q.loo(model, data, likelihood, 400, mode)
        y = torch.tensor([int(e.target) for e in data])
        by_hand = F.cross_entropy((soft.logits + soft.shift) / 2, y, reduction="none")
        torch.testing.assert_close(soft.nll, by_hand)
        assert float((soft.shift - plain.shift).norm() / plain.shift.norm()) < (
            1e-6 if mode == "linearised" else 0.2
        )


def test_tokens_lose_their_own_variance(tiny_llama: Any) -> None:
    """f is log p itself, r = -1: log p without i is f - V."""
    model, q, data = llama_posterior(tiny_llama)
    data = [replace(e, target=2) for e in data]
    found = q.loo(model, data, Tokens())
    assert bool((found.shift < 0).all())
    torch.testing.assert_close(found.nll, found.train_nll - found.shift[:, 0])
    torch.testing.assert_close(found.sensitivity, -found.shift[:, 0])


def test_refusals() -> None:
    ridge = Ridge(8)
    q = ridge.posterior()
    point = DiagonalGaussian(q.adapter_config, q.mean(), {}, q.origin)
    for call, words in (
        (lambda: q.loo(ridge.model, [], ridge.likelihood), "no examples"),
        (
            lambda: q.loo(ridge.model, ridge.data, ridge.likelihood, mode="linear"),
            "did you mean 'linearised'",
        ),
        (lambda: q.loo(ridge.model, ridge.data, ridge.likelihood, 1, "sampled"), "at least 2 draws"),
        (lambda: point.loo(ridge.model, ridge.data, ridge.likelihood), "certain of all weights"),
        (lambda: q.loo(ridge.model, ridge.data + ridge.data[:1], ridge.likelihood), "different ids"),
        (lambda: best_checkpoint({}, ridge.model, ridge.data, ridge.likelihood), "no checkpoints"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    batch = next(in_batches(ridge.data))
    with pytest.raises(UserError, match="not finite"):
        left_out(torch.full((8, 1), torch.nan), torch.ones(8, 1, 1), batch, ridge.likelihood)
