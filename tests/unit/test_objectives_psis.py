"""Pareto-smoothed importance sampling: the fit on samples of a known law, the smoothing against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from vlm_reason.errors import UserError
from vlm_reason.objectives import fit_psis, pareto_k, psis_smooth
from vlm_reason.objectives.psis import fit_generalised_pareto

INF = math.inf


def pareto_log_weights(k: float, draws: int, seed: int = 0) -> torch.Tensor:
    uniform = np.random.default_rng(seed).uniform(size=draws)
    return torch.tensor(np.log(scipy.stats.genpareto.ppf(uniform, k)))


@pytest.mark.parametrize("k", [0.2, 0.7, 1.1])
def test_finds_the_shape_of_a_pareto_sample(k: float) -> None:
    # Tail of 3 sqrt(1e6) = 3000 draws: standard error of k about (1 + k) / sqrt(3000) = 0.03.
    assert pareto_k(pareto_log_weights(k, 1_000_000).unsqueeze(0)).item() == pytest.approx(k, abs=0.09)


def test_finds_the_shape_of_a_power_of_an_exponential() -> None:
    # w = exp(k E) with E standard exponential is exactly Pareto with shape k.
    e = torch.tensor(np.random.default_rng(1).exponential(size=(2, 250_000)))
    assert pareto_k(torch.tensor([[0.4], [0.9]]) * e).tolist() == pytest.approx([0.4, 0.9], abs=0.11)


def test_fit_agrees_with_maximum_likelihood() -> None:
    sample = scipy.stats.genpareto.rvs(0.3, scale=2.0, size=5000, random_state=3)
    k, sigma = fit_generalised_pareto(torch.tensor(sample))
    k_ml, _, sigma_ml = scipy.stats.genpareto.fit(sample, floc=0)
    assert k == pytest.approx(k_ml, abs=0.01)
    assert sigma == pytest.approx(sigma_ml, rel=0.01)


def test_smoothing_replaces_the_tail_by_its_order_statistics() -> None:
    logw = pareto_log_weights(0.6, 200, seed=5).unsqueeze(0)
    tail = 40  # 0.2 * 200 < 3 sqrt(200)
    order = logw[0].argsort()
    cutoff = logw[0, order[-tail - 1]].exp()
    k, sigma = fit_generalised_pareto(logw[0, order[-tail:]].exp() - cutoff)
    p = (np.arange(1, tail + 1) - 0.5) / tail
    expected = np.minimum(
        np.log(cutoff.item() + scipy.stats.genpareto.ppf(p, k, scale=sigma)), logw.max().item()
    )
    smoothed = psis_smooth(logw)[0]
    np.testing.assert_allclose(smoothed[order[-tail:]], expected, atol=1e-9)
    assert torch.equal(smoothed[order[:-tail]], logw[0, order[:-tail]])
    assert pareto_k(logw).item() == pytest.approx(k)


def test_shape_ignores_a_constant_an_order_and_masked_draws() -> None:
    logw = pareto_log_weights(0.5, 300).unsqueeze(0)
    k = pareto_k(logw)
    assert torch.allclose(pareto_k(logw - 700), k, atol=1e-9)
    assert torch.allclose(psis_smooth(logw - 700), psis_smooth(logw) - 700, atol=1e-9)
    order = torch.randperm(300)
    assert torch.allclose(pareto_k(logw[:, order]), k)
    assert torch.allclose(psis_smooth(logw[:, order]), psis_smooth(logw)[:, order])
    padded = torch.cat([torch.full((1, 10), math.nan), logw], 1)
    mask = torch.arange(310).unsqueeze(0) >= 10
    assert torch.allclose(pareto_k(padded, mask), k)
    smoothed = psis_smooth(padded, mask)
    assert torch.allclose(smoothed[:, 10:], psis_smooth(logw))
    assert smoothed[:, :10].isneginf().all()


def test_too_few_draws_are_flagged() -> None:
    logw = torch.randn(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 24:] = False
    result = fit_psis(logw, mask)
    assert result.too_few.tolist() == [False, True]
    assert result.k.isnan().tolist() == [False, True]
    assert torch.equal(result.logw[1, :24], logw[1, :24])
    assert pareto_k(torch.zeros(1, 24)).isnan().all()
    assert not pareto_k(torch.randn(1, 25)).isnan().any()


def test_groups_without_a_tail_to_fit() -> None:
    equal = torch.zeros(1, 100)
    lone = torch.full((1, 100), -INF)
    lone[0, :3] = torch.tensor([0.0, 1.0, 2.0])
    null = torch.full((1, 100), -INF)
    assert pareto_k(equal).item() == -INF
    assert pareto_k(lone).item() == INF
    assert pareto_k(null).item() == INF
    for logw in (equal, lone, null):
        assert torch.equal(psis_smooth(logw), logw)


def test_weights_of_zero_count_as_draws() -> None:
    positive = pareto_log_weights(0.5, 500)
    logw = torch.cat([positive, torch.full((500,), -INF)]).unsqueeze(0)
    k = pareto_k(logw).item()
    tail = math.ceil(3 * math.sqrt(1000))
    ordered = positive.sort().values
    expected, _ = fit_generalised_pareto(ordered[-tail:].exp() - ordered[-tail - 1].exp())
    assert k == pytest.approx(expected, abs=1e-9)


def test_fit_refuses_too_small_a_tail() -> None:
    with pytest.raises(UserError, match="at least 5"):
        fit_generalised_pareto(torch.ones(4))
