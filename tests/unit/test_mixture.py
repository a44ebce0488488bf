"""Mixtures: the density of torch.distributions, draws by weight, moments, a folder for each component."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.chain_parts import examples, same_trees, state_of, tiny_job
from vlm_reason.errors import UserError
from vlm_reason.weights import METHODS, DiagonalGaussian, Origin, Posterior
from vlm_reason.weights.artefact import Tree
from vlm_reason.weights.families.low_rank_plus_diagonal import LowRankPlusDiagonal
from vlm_reason.weights.families.mixture import Mixture
from vlm_reason.weights.families.particles import Particles

CONFIG = {"peft_type": "LORA", "r": 2}
SHAPES = {"l.lora_A.weight": (2, 3), "l.lora_B.weight": (3, 2)}
SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def gaussian(seed: int, width: float = 1.0) -> DiagonalGaussian:
    torch.manual_seed(seed)
    mean = {k: torch.randn(s) for k, s in SHAPES.items()}
    sigma = {k: width * (0.2 + torch.rand(s)) for k, s in SHAPES.items()}
    return DiagonalGaussian(CONFIG, mean, sigma, Origin(data_size=5))


def three(width: float = 1.0) -> Mixture:
    return Mixture([gaussian(k, width) for k in range(3)], [2, 3, 5])


def flat(tree: Tree) -> Tensor:
    return torch.cat([tree[k].flatten() for k in SHAPES]).double()


def of_torch(mixture: Mixture) -> MixtureSameFamily:
    own = [c for c in mixture.components if isinstance(c, DiagonalGaussian)]
    means, sigmas = torch.stack([flat(c.mean()) for c in own]), torch.stack([flat(c.sigma()) for c in own])
    return MixtureSameFamily(Categorical(SHARES), Independent(Normal(means, sigmas), 1))


def test_the_density_is_that_of_torch() -> None:
    mixture = three()
    for tree in mixture.sample(10, seed=1):
        assert mixture.log_prob(tree) == pytest.approx(
            float(of_torch(mixture).log_prob(flat(tree))), rel=1e-9
        )
    far = {k: 100 + v for k, v in mixture.mean().items()}  # the exponentials of all components are 0 in fp64
    exact = float(of_torch(mixture).log_prob(flat(far)))
    assert exact < -1000 and mixture.log_prob(far) == pytest.approx(exact, rel=1e-9)
    one = Mixture([gaussian(0), gaussian(1)], [1, 0])
    assert one.log_prob(far) == pytest.approx(gaussian(0).log_prob(far))
    trees = [gaussian(k).mean() for k in range(2)]
    with pytest.raises(UserError, match="'particles' has no density"):
        Mixture([gaussian(0), Particles(CONFIG, trees, Origin())]).log_prob(far)


def test_draws_come_from_components_by_weight_and_do_not_share_noise() -> None:
    mixture = three(width=1e-3)  # so narrow that a draw tells where it is from
    centres = torch.stack([flat(c.mean()) for c in mixture.components])

    def source(tree: Tree) -> int:
        return int((centres - flat(tree)).square().sum(1).argmin())

    draws = list(mixture.sample(200, seed=4))
    counts = [sum(source(d) == k for d in draws) for k in range(3)]
    assert all(abs(c - 200 * float(w)) <= 3 for c, w in zip(counts, SHARES, strict=True))
    assert same_trees(list(mixture.sample(7, seed=4)), draws[:7])
    own = [DiagonalGaussian(CONFIG, gaussian(0).mean(), gaussian(0).sigma(), Origin()) for _ in range(2)]
    a, b = Mixture(own).sample(2, seed=0)
    assert not same_trees([a], [b])
    for first, second in zip(*[iter(mixture.sample(20, seed=2, antithetic=True))] * 2, strict=True):
        centre = centres[source(first)]
        torch.testing.assert_close(flat(first) - centre, centre - flat(second), atol=1e-6, rtol=0)


def test_moments_are_the_mixture_s() -> None:
    mixture = three()
    law = of_torch(mixture)
    torch.testing.assert_close(flat(mixture.mean()), law.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(1 / flat(mixture.precision_diag()), law.variance, atol=1e-6, rtol=1e-5)


def test_temper_acts_inside_components_and_the_mean_may_be_one_of_them() -> None:
    mixture = three().temper(4.0)
    assert mixture.origin.temper == 4.0
    for k, c in enumerate(mixture.components):
        assert isinstance(c, DiagonalGaussian)
        torch.testing.assert_close(flat(c.sigma()), flat(gaussian(k).sigma()) / 2)
    named = Mixture([gaussian(0), gaussian(1)], mean=1)
    assert same_trees([named.mean()], [gaussian(1).mean()])
    assert same_trees([named.temper(2.0).mean()], [gaussian(1).mean()])


def test_a_round_trip_of_mixed_families_nested(tmp_path: Path) -> None:
    torch.manual_seed(9)
    first = gaussian(0)
    factor = {k: torch.randn(3, *s) for k, s in SHAPES.items()}
    swag = LowRankPlusDiagonal(CONFIG, first.mean(), first.sigma(), factor, Origin())
    members = Particles(CONFIG, [gaussian(k).mean() for k in range(4)], Origin(), [1, 2, 3, 4], mean=2)
    mixture = Mixture([swag, members, Mixture([gaussian(1), gaussian(2)], [1, 3])], [0.25, 0.5, 0.25], mean=1)
    folder = mixture.save(tmp_path / "a")
    loaded = Posterior.load(folder)
    assert isinstance(loaded, Mixture) and [c.family for c in loaded.components] == [
        "low_rank_plus_diagonal", "particles", "mixture",
    ]  # fmt: skip
    assert torch.equal(loaded.weights, mixture.weights)
    assert same_trees([loaded.mean()], [gaussian(2).mean()])
    assert same_trees(list(loaded.sample(9, 5)), list(mixture.sample(9, 5)))
    alone = Posterior.load(folder / "component001")
    assert isinstance(alone, Particles) and same_trees(alone.trees(), members.trees())
    (folder / "component001" / "posterior.safetensors").unlink()
    with pytest.raises(UserError, match="component001.*posterior.safetensors is missing"):
        Posterior.load(folder)


def test_components_that_do_not_belong_together_are_refused() -> None:
    mean = {k: torch.zeros(s) for k, s in SHAPES.items()}
    for other, said in (
        (
            DiagonalGaussian(CONFIG, {"x": torch.zeros(1)}, {}, Origin()),
            "components 0 and 1 are not of one adapter",
        ),
        (DiagonalGaussian(CONFIG, mean, {}, Origin(base="abc")), "different base models"),
        (DiagonalGaussian(CONFIG, mean, {}, Origin(output_temperature=2.0)), "one output temperature"),
    ):
        with pytest.raises(UserError, match=said):
            Mixture([gaussian(0), other])
    with pytest.raises(UserError, match="3 weights for 1 components"):
        Mixture([gaussian(0)], [1, 1, 1])
    with pytest.raises(UserError, match="no components"):
        Mixture([])
    with pytest.raises(UserError, match="no component 1, they are 0 to 0"):
        Mixture([gaussian(0)], mean=1)
    for call, said in ((three().kl, "KL"), (lambda: three().output_covariance({}), "covariance")):
        with pytest.raises(UserError, match=f"'mixture' has no {said}"):
            call()


# --------------------------------------------------------------------------------------------------- the method


def test_several_runs_are_one_mixture(tiny_llama: Any, tmp_path: Path) -> None:
    method = METHODS["mixture"](method="swag", options={"rank": 2}, members=2)
    job = tiny_job(copy.deepcopy(tiny_llama), 1, held_out=examples(5), output_dir=tmp_path)
    mixture, report = method.fit(job)
    assert (
        isinstance(mixture, Mixture)
        and [c.family for c in mixture.components] == ["low_rank_plus_diagonal"] * 2
    )
    alone, one = METHODS["swag"](rank=2).fit(tiny_job(copy.deepcopy(tiny_llama), 1, held_out=examples(5)))
    assert same_trees([mixture.components[0].mean()], [alone.mean()])
    a = [key for key in alone.mean() if "lora_A" in key]
    assert all(not torch.equal(mixture.components[1].mean()[key], alone.mean()[key]) for key in a)
    scores = report.details["held_out_nll"]
    assert scores[0] == one.held_out_nll and report.steps == 12
    best = min(range(2), key=lambda m: scores[m])
    assert same_trees([mixture.mean(), state_of(job)], [mixture.components[best].mean()] * 2)
    with pytest.raises(UserError, match=r"unknown method 'swagg'.*'swag'"):
        METHODS["mixture"](method="swagg")
    for name in ("vbll", "temperature"):  # before any run
        with pytest.raises(UserError, match=f"mixture: not of '{name}'"):
            METHODS["mixture"](method=name)
    with pytest.raises(UserError, match="members must be at least 2, got 1"):
        METHODS["mixture"](members=1)
    with pytest.raises(UserError, match="leave the start of the job out"):
        METHODS["mixture"]().fit(tiny_job(copy.deepcopy(tiny_llama), 1, start=alone))
