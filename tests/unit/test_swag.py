"""SWAG: what is noted, the covariance, and a low-rank Gaussian against dense ones."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from tests.chain_parts import Stopped, same_trees, state_of, stop_after, tiny_job
from vlm_reason.errors import UserError
from vlm_reason.weights import DiagonalGaussian, Origin, Posterior
from vlm_reason.weights.artefact import Tree
from vlm_reason.weights.families.low_rank_plus_diagonal import LowRankPlusDiagonal
from vlm_reason.weights.methods.swag import SWAG, PathMoments

SHAPES = {"a": (2, 3), "b": (5,)}


def small(rank: int = 3, seed: int = 0) -> LowRankPlusDiagonal:
    torch.manual_seed(seed)
    mean = {**{k: torch.randn(s) for k, s in SHAPES.items()}, "fixed": torch.ones(2)}
    sigma = {k: 0.2 + torch.rand(s) for k, s in SHAPES.items()}
    factor = {k: torch.randn(rank, *s) for k, s in SHAPES.items()}
    return LowRankPlusDiagonal({}, mean, sigma, factor, Origin(prior={"a": 4.0, "b": 0.25}))


def flat(tree: Tree) -> Tensor:
    return torch.cat([tree[k].flatten() for k in SHAPES]).double()


def dense(q: LowRankPlusDiagonal) -> MultivariateNormal:
    u = torch.cat([q.factor()[k].flatten(1) for k in SHAPES], 1).double()
    return MultivariateNormal(flat(q.mean()), torch.diag(flat(q.sigma()).square()) + u.T @ u)


# --------------------------------------------------------------------------------------------------- the family


@pytest.mark.parametrize("rank", [0, 3, 20])
def test_the_density_is_the_dense_one(rank: int) -> None:
    q = small(rank)
    for tree in q.sample(5, seed=2):
        assert q.log_prob(tree) == pytest.approx(float(dense(q).log_prob(flat(tree))), rel=1e-9)
    (tree,) = q.sample(1, seed=2)
    assert q.log_prob({**tree, "fixed": torch.zeros(2)}) == -math.inf
    with pytest.raises(UserError, match="'b'"):
        q.log_prob({"a": tree["a"], "fixed": tree["fixed"]})


def test_certain_weights_have_density_one_and_half_certain_ones_none() -> None:
    q = small()
    sigma, factor = q.sigma(), q.factor()
    sigma["b"][1] = 0.0
    factor["b"][:, 1] = 0.0
    p = LowRankPlusDiagonal({}, q.mean(), sigma, factor, Origin())
    (tree,) = p.sample(1, seed=0)
    keep = torch.tensor([n != 7 for n in range(11)])
    law = dense(q)
    rest = MultivariateNormal(law.mean[keep], law.covariance_matrix[keep][:, keep])
    assert p.log_prob(tree) == pytest.approx(float(rest.log_prob(flat(tree)[keep])), rel=1e-9)
    moved = {**tree, "b": tree["b"] + torch.eye(5)[1]}
    assert p.log_prob(moved) == -math.inf
    factor["b"][0, 1] = 1.0
    with pytest.raises(UserError, match="no density: weights of 'b'"):
        LowRankPlusDiagonal({}, q.mean(), sigma, factor, Origin()).log_prob(tree)


def test_divergences_are_the_dense_ones() -> None:
    q = small()
    scale = torch.cat([torch.full((6,), 0.5), torch.full((5,), 2.0)]).double()  # precisions 4 and 1/4
    prior = MultivariateNormal(torch.zeros(11).double(), torch.diag(scale.square()))
    assert q.kl() == pytest.approx(float(kl_divergence(dense(q), prior)), rel=1e-6)
    torch.manual_seed(3)
    other = DiagonalGaussian(
        {}, {**{k: torch.randn(s) for k, s in SHAPES.items()}, "fixed": torch.ones(2)},
        {k: 0.3 + torch.rand(s) for k, s in SHAPES.items()}, Origin(),
    )  # fmt: skip
    law = MultivariateNormal(flat(other.mean()), torch.diag(flat(other.sigma()).square()))
    assert q.kl(other) == pytest.approx(float(kl_divergence(dense(q), law)), rel=1e-9)
    without = LowRankPlusDiagonal({}, q.mean(), q.sigma(), small(0).factor(), Origin())
    alone = DiagonalGaussian({}, q.mean(), q.sigma(), Origin())
    assert without.kl(other) == pytest.approx(alone.kl(other), rel=1e-9)
    assert q.kl(DiagonalGaussian({}, q.mean(), {}, Origin())) == math.inf
    with pytest.raises(UserError, match="no KL divergence in closed form from 'low_rank_plus_diagonal'"):
        q.kl(small(seed=1))


def test_variances_temper_and_output_covariance_are_the_dense_ones() -> None:
    q = small()
    law = dense(q)
    torch.testing.assert_close(1 / flat(q.precision_diag()), law.variance, rtol=1e-5, atol=0)
    assert bool(q.precision_diag()["fixed"].isinf().all())
    jacobian = {k: torch.randn(4, 2, *s) for k, s in SHAPES.items()}
    j = torch.cat([jacobian[k].flatten(2) for k in SHAPES], 2).double()
    expected = j @ law.covariance_matrix @ j.mT
    torch.testing.assert_close(q.output_covariance(jacobian), expected, rtol=1e-6, atol=1e-6)
    colder = q.temper(4.0)
    assert colder.origin.temper == 4.0
    torch.testing.assert_close(
        dense(colder).covariance_matrix, law.covariance_matrix / 4, rtol=1e-5, atol=1e-7
    )
    for call, said in ((lambda: q.prune(0.5), "pruning"), (lambda: q.temper(0.0), "tau must be > 0")):
        with pytest.raises(UserError, match=said):
            call()


def test_draws_have_the_covariance_and_are_the_same_for_a_seed() -> None:
    q = small()
    draws = list(q.sample(3000, seed=1))
    values = torch.stack([flat(d) for d in draws])
    law = dense(q)
    sd = law.variance.sqrt()
    assert float(((values.mean(0) - law.mean) / sd).abs().max()) < 0.07
    apart = (values.T.cov() - law.covariance_matrix) / (sd[:, None] * sd)
    assert float(apart.abs().max()) < 0.09
    assert same_trees(list(q.sample(3, seed=1)), draws[:3])
    a, b, c = q.sample(3, seed=1, antithetic=True)
    assert same_trees([a], draws[:1]) and not same_trees([a], [c])
    torch.testing.assert_close(flat(a) - law.mean, law.mean - flat(b), rtol=0, atol=1e-5)


def test_a_round_trip_and_wrong_shapes(tmp_path: Path) -> None:
    q = small()
    loaded = Posterior.load(q.save(tmp_path / "a"))
    assert isinstance(loaded, LowRankPlusDiagonal)
    assert (
        same_trees(list(loaded.sample(3, 1)), list(q.sample(3, 1)))
        and loaded.tensors().keys() == q.tensors().keys()
    )
    with pytest.raises(UserError, match="low-rank factor of 'b' has shape"):
        LowRankPlusDiagonal({}, q.mean(), q.sigma(), {**q.factor(), "b": torch.ones(2, 5)}, Origin())
    with pytest.raises(
        UserError, match="not of the same tensors: 1 tensors are in one alone, the first is 'b'"
    ):
        LowRankPlusDiagonal({}, q.mean(), q.sigma(), {"a": q.factor()["a"]}, Origin())
    with pytest.raises(UserError, match="found 'x.mask'"):
        LowRankPlusDiagonal.from_tensors({}, q.mean(), {"x.mask": torch.ones(1)}, Origin())


# --------------------------------------------------------------------------------------------------- the method


def path(job: Any, count: int, rank: int) -> tuple[PathMoments, list[Tree]]:
    moments = PathMoments(job, [], SWAG(rank=rank))
    start = state_of(job)
    torch.manual_seed(2)
    trees = [{k: v + 1e-3 * torch.randn_like(v) for k, v in start.items()} for _ in range(count)]
    for tree in trees:
        moments.note({k: v.clone() for k, v in tree.items()})
    return moments, trees


def whole(tree: Tree) -> Tensor:
    return torch.cat([v.flatten() for v in tree.values()]).double()


def test_with_all_deviations_kept_the_low_rank_part_is_half_the_sample_covariance(tiny_llama: Any) -> None:
    job = tiny_job(tiny_llama)
    moments, trees = path(job, 7, 7)
    values = torch.stack([whole(t) for t in trees])
    for scale in (1.0, 0.3):
        q = SWAG(rank=7, scale=scale).posterior(job, moments)
        keys = list(q.mean())
        torch.testing.assert_close(whole(q.mean()), values.mean(0), rtol=0, atol=1e-7)
        u = torch.cat([q.factor()[k].flatten(1) for k in keys], 1).double()[:, :400]
        sample = values[:, :400].T.cov()
        torch.testing.assert_close(u.T @ u, scale * sample / 2, rtol=1e-3, atol=1e-10)
        sigma = torch.cat([q.sigma()[k].flatten() for k in keys]).double()
        torch.testing.assert_close(
            sigma.square(), scale * values.var(0, correction=0) / 2, rtol=1e-3, atol=1e-12
        )


def test_the_last_deviations_are_kept_and_the_variance_is_of_all(tiny_llama: Any) -> None:
    job = tiny_job(tiny_llama)
    moments, trees = path(job, 9, 4)
    values = torch.stack([whole(t) for t in trees])
    q = SWAG(rank=4).posterior(job, moments)
    u = torch.cat([q.factor()[k].flatten(1) for k in q.mean()], 1).double()
    torch.testing.assert_close(u * math.sqrt(2 * 3), values[5:] - values.mean(0), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(
        whole(q.sigma()).square(), values.var(0, correction=0) / 2, rtol=1e-3, atol=1e-12
    )
    assert SWAG(rank=0).posterior(job, path(job, 9, 0)[0]).rank == 0


def test_the_plan_of_steps_and_rates(tiny_llama: Any) -> None:
    job = tiny_job(tiny_llama, epochs=10)  # 60 steps, 6 an epoch, learning rate 0.01, 6 steps of warm-up
    assert SWAG(rank=2).notes(job) == [36, 42, 48, 54, 60]  # an epoch
    assert SWAG(rank=10).notes(job) == list(range(31, 61))
    assert SWAG(collect_steps=7, start=0.7).notes(job) == [46, 53, 60]
    flat_rate = SWAG(rank=2, learning_rate=0.004)
    rates = [flat_rate.rate(job, flat_rate.notes(job), step) for step in range(60)]
    assert rates[0] == pytest.approx(0.01 / 7) and rates[10] == pytest.approx(0.01 - 0.006 * 10 / 30)
    assert rates[30:] == [0.004] * 30
    saw = SWAG(rank=2, schedule="cyclic", learning_rate=0.004)
    rates = [saw.rate(job, saw.notes(job), step) for step in range(60)]
    for start in range(30, 60, 6):
        assert rates[start : start + 6] == pytest.approx([0.01 - 0.006 * k / 5 for k in range(6)])
    with pytest.raises(UserError, match="give 1 notes of the weights, at least 2 are needed"):
        SWAG(collect_steps=30).notes(job)


def test_a_run_stopped_and_started_again_is_the_same_posterior(tiny_llama: Any, tmp_path: Path) -> None:
    method = SWAG(rank=3)
    first = tiny_job(copy.deepcopy(tiny_llama), 2)
    straight, report = method.fit(first)
    assert isinstance(straight, LowRankPlusDiagonal) and report.details["notes"] == 6 == report.steps // 2
    assert same_trees([state_of(first)], [straight.mean()])
    stopped = tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path / "run")
    stop_after(8)
    with pytest.raises(Stopped):
        method.fit(stopped)
    again, _ = method.fit(tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path / "run"))
    assert same_trees([again.tensors(), again.mean()], [straight.tensors(), straight.mean()])
    wider, _ = SWAG(rank=3, scale=2.0).fit(
        tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path / "run")
    )
    assert same_trees([wider.mean()], [straight.mean()])  # scale has no part in the run
    with pytest.raises(UserError, match=r"of SWAG\(.*rank=3.*, this run is SWAG\(.*rank=2"):
        SWAG(rank=2).fit(tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path / "run"))
    saved = straight.save(tmp_path / "posterior")
    stock = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), saved)
    attached = straight.attach(copy.deepcopy(tiny_llama))
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, attached(input_ids=ids).logits)


def test_wrong_settings_are_refused() -> None:
    for settings, said in (
        ({"start": 1.0}, "start is a share"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"schedule": "cyclical"}, "constant, cyclic, got 'cyclical'"),
        ({"collect_steps": 0}, "collect_steps must be >= 1"),
        ({"rank": 1}, "rank must be 0 or at least 2"),
        ({"scale": -1.0}, "scale must be > 0"),
    ):
        with pytest.raises(UserError, match=said):
            SWAG(**settings)  # type: ignore[arg-type]
