"""Merging adapters: gauges are told apart, updates are merged where they differ, and what cannot be merged is said."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.weights import METHODS, Choice, DiagonalGaussian, Example, Job, Origin, Training
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.families.masks import Masks
from vlm_reason.weights.families.particles import Particles
from vlm_reason.weights.merging import alignment, merge, truncated

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
CONFIG = {"r": 3, "lora_alpha": 6, "peft_type": "LORA"}
IN, OUT = 11, 7


def task(
    seed: int, a: Tensor | None = None, spread: float = 0.1, rank: int = 3, **origin: Any
) -> DiagonalGaussian:
    torch.manual_seed(seed)
    mean = {A: torch.randn(rank, IN) if a is None else a, B: torch.randn(OUT, rank)}
    sigma = {k: spread * (0.5 + torch.rand_like(v)) for k, v in mean.items()}
    return DiagonalGaussian({**CONFIG, "r": rank}, mean, sigma, Origin("base", **origin))


def update(p: DiagonalGaussian | dict[str, Tensor], config: dict[str, Any] | None = None) -> Tensor:
    tree = p if isinstance(p, dict) else p.mean()
    config = config or (p.adapter_config if not isinstance(p, dict) else CONFIG)
    return config["lora_alpha"] / config["r"] * tree[B].double() @ tree[A].double()


def rotated(p: DiagonalGaussian) -> DiagonalGaussian:
    """The same updates in another gauge."""
    torch.manual_seed(99)
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    mean = p.mean()
    return DiagonalGaussian(p.adapter_config, {A: turn @ mean[A], B: mean[B] @ turn.T}, p.sigma(), p.origin)


# ------------------------------------------------------------------------------------------------------------- gauge


def test_alignment_tells_inits_rotations_and_one_init_apart() -> None:
    torch.manual_seed(0)
    a = torch.randn(8, 256)
    near = a + 0.3 * torch.randn(8, 256)
    assert alignment(a, a) == pytest.approx((1.0, 1.0))
    as_is, best = alignment(a, near)
    assert as_is == pytest.approx(1 / math.sqrt(1.09), abs=0.02) and best == pytest.approx(as_is, abs=0.01)
    assert abs(alignment(a, torch.randn(8, 256))[0]) < 0.1
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    as_is, best = alignment(a, turn @ a)
    assert best == pytest.approx(1.0) and as_is < 0.7
    assert alignment(a, -a) == pytest.approx((-1.0, 1.0))


def test_other_gauges_are_refused_and_merged_as_updates() -> None:
    one = task(0)
    two = task(1, a=one.mean()[A] + 0.05 * torch.randn(3, IN))
    for other in (rotated(two), task(2)):
        with pytest.raises(UserError, match='different gauges.*space="delta"'):
            merge([one, other])
        assert merge([one, other], same_init=True)[1].alignment < 0.9
    merged, report = merge([one, two])
    assert (
        report.alignment == pytest.approx(alignment(one.mean()[A], two.mean()[A])[0])
        and report.alignment > 0.9
    )
    # in the space of updates the gauge makes no difference to means
    equal = {A: torch.full((3, IN), 0.1), B: torch.full((OUT, 3), 0.1)}
    same = [DiagonalGaussian(CONFIG, p.mean(), {}, p.origin) for p in (one, two, rotated(two))]
    plain, _ = merge(same[:2], space="delta")
    turned, _ = merge([same[0], same[2]], space="delta")
    torch.testing.assert_close(update(plain), update(turned), atol=1e-5, rtol=1e-5)
    assert equal.keys() == plain.mean().keys() and plain.uncertain() == []


# --------------------------------------------------------------------------------------------------------------- delta


def test_delta_is_the_best_low_rank_of_the_weighted_sum() -> None:
    one, two = task(0, spread=0.1), task(1, spread=0.2)
    merged, report = merge([one, two], space="delta", alphas=[1.0, 2.0])

    def variance(p: DiagonalGaussian) -> float:
        """Of the elements of s B A, by its definition, averaged."""
        v, m = (
            {k: s.double().square() for k, s in p.sigma().items()},
            {k: x.double() for k, x in p.mean().items()},
        )
        parts = m[B].square() @ v[A] + v[B] @ m[A].square() + v[B] @ v[A]
        return float((4 * parts).mean())

    w = torch.tensor([1 / variance(one), 2 / variance(two)], dtype=torch.float64)
    exact = (w[0] * update(one) + w[1] * update(two)) / w.sum()
    u, d, vh = torch.linalg.svd(exact)
    torch.testing.assert_close(update(merged), u[:, :3] * d[:3] @ vh[:3], atol=1e-5, rtol=1e-5)
    assert report.kept == pytest.approx({"layer": float(d[:3].square().sum() / d.square().sum())}, rel=1e-5)
    assert 0.5 < report.kept["layer"] < 1 and report.space == "delta"
    assert variance(merged) == pytest.approx(
        1 / float(w.sum()), rel=1e-5
    )  # the joint precision of the updates
    draws = torch.stack([update(t, dict(merged.adapter_config)) for t in merged.sample(2000, 0)])
    assert float(draws.var(0).mean()) == pytest.approx(variance(merged), rel=0.05)
    gram = merged.mean()[A] @ merged.mean()[A].T
    torch.testing.assert_close(gram, merged.mean()[B].T @ merged.mean()[B], atol=1e-4, rtol=1e-4)  # balanced


def test_rank_of_the_sum_loses_nothing() -> None:
    one, two = task(0), task(1, rank=2)
    whole, report = merge([one, two], space="delta", rank=5)
    assert report.kept["layer"] == pytest.approx(1.0) and whole.adapter_config["r"] == 5
    assert whole.mean()[A].shape == (5, IN) and whole.mean()[B].shape == (OUT, 5)
    first, second = update(one), update(two)
    found = update(whole)
    weights = torch.linalg.lstsq(
        torch.stack([first.flatten(), second.flatten()], 1), found.flatten()[:, None]
    ).solution
    torch.testing.assert_close(weights[0] * first + weights[1] * second, found, atol=1e-5, rtol=1e-5)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
    wide, _, kept = truncated(one.mean()[A], one.mean()[B], 6)  # a rank above that of the sum: zeros
    assert wide.shape == (6, IN) and kept == pytest.approx(1.0) and bool((wide[3:].abs() < 1e-4).all())


def test_whole_modules_are_merged_weight_by_weight() -> None:
    head = "lm_head.weight"

    def with_head(p: DiagonalGaussian, value: float, precision: float) -> DiagonalGaussian:
        mean, sigma = {**p.mean(), head: torch.full((2, 2), value)}, p.sigma()
        return DiagonalGaussian(
            p.adapter_config, mean, {**sigma, head: torch.full((2, 2), precision**-0.5)}, p.origin
        )

    tasks = [with_head(task(0), 1.0, 3.0), with_head(task(1), 5.0, 1.0)]
    merged, _ = merge(tasks, space="delta")
    torch.testing.assert_close(merged.mean()[head], torch.full((2, 2), 2.0))
    torch.testing.assert_close(merged.precision_diag()[head], torch.full((2, 2), 4.0))


# ---------------------------------------------------------------------------------------------- certain, and errors


def test_certain_weights_stay_and_clash() -> None:
    one = task(0)
    two = task(1, a=one.mean()[A])
    fixed = [DiagonalGaussian(CONFIG, p.mean(), {B: p.sigma()[B]}, p.origin) for p in (one, two)]
    merged, _ = merge(fixed)
    assert torch.equal(merged.mean()[A], one.mean()[A]) and merged.uncertain() == [B]
    pruned = one.prune(0.5)
    held = pruned.sigma()[B] == 0
    found, _ = merge([pruned, DiagonalGaussian(CONFIG, one.mean(), one.sigma(), one.origin)], same_init=True)
    assert bool((found.mean()[B][held] == 0).all()) and bool((found.sigma()[B][held] == 0).all())
    points = [DiagonalGaussian(CONFIG, p.mean(), {}, p.origin) for p in (one, two)]
    with pytest.raises(UserError, match="21 weights of .*lora_B.* are certain in several posteriors"):
        merge(points)
    average, _ = merge(points, space="delta")
    exact = (update(one) + update(two)) / 2
    torch.testing.assert_close(update(average), exact, atol=1e-5, rtol=1e-5)  # one A: the sum has rank 3
    with pytest.raises(UserError, match="certain in some posteriors and not in others"):
        merge([one, points[1]], space="delta")


def test_what_cannot_be_merged_is_refused() -> None:
    one = task(0)
    two = task(1, a=one.mean()[A])
    other_base = DiagonalGaussian(CONFIG, two.mean(), two.sigma(), replace(two.origin, base="other"))
    scaled = DiagonalGaussian({**CONFIG, "lora_alpha": 3}, two.mean(), two.sigma(), two.origin)
    soft = DiagonalGaussian(CONFIG, two.mean(), two.sigma(), replace(two.origin, output_temperature=2.0))
    patterned = DiagonalGaussian({**CONFIG, "rank_pattern": {"x": 2}}, two.mean(), two.sigma(), two.origin)
    less = DiagonalGaussian(CONFIG, {A: one.mean()[A]}, {}, one.origin)
    dora = DiagonalGaussian(
        CONFIG, {**one.mean(), "layer.lora_magnitude_vector": torch.ones(7)}, {}, one.origin
    )
    cloud = Particles(CONFIG, [one.mean(), two.mean()], one.origin)
    for arguments, words in (
        ({"posteriors": []}, "no posteriors"),
        ({"posteriors": [one, two], "space": "delat"}, "got 'delat'; did you mean 'delta'"),
        ({"posteriors": [one, two], "alphas": [1.0]}, "1 alphas for 2 posteriors"),
        ({"posteriors": [one, two], "alphas": [1.0, -1.0]}, "alphas must be >= 0"),
        ({"posteriors": [one, two], "alphas": [0.0, 0.0]}, "not all 0"),
        ({"posteriors": [one, two], "delta0": 0.0}, "delta0 must be > 0"),
        ({"posteriors": [one, two], "rank": 2}, 'rank is for space="delta"'),
        ({"posteriors": [one, two], "base": one, "space": "delta"}, "has no base"),
        ({"posteriors": [one, other_base]}, "different base models .hashes.: base, other"),
        ({"posteriors": [one, soft]}, "different output temperatures: 1.0, 2.0"),
        ({"posteriors": [one, scaled]}, "scale their updates differently"),
        ({"posteriors": [one, task(1, rank=2)]}, r"has shape \(2, 11\)|has shape \(3, 11\)"),
        ({"posteriors": [one, less]}, "not over the same adapter"),
        ({"posteriors": [one, patterned], "space": "delta"}, "one rank and alpha for all layers"),
        ({"posteriors": [dora, dora], "space": "delta"}, "plain LoRA linear layers"),
        ({"posteriors": [cloud, cloud]}, "'particles' has no diagonal precision"),
    ):
        with pytest.raises(UserError, match=words):
            merge(**arguments)  # type: ignore[arg-type]
    masks = Masks(CONFIG, one.mean(), {A: 0.2}, "columns", one.origin)
    assert merge([masks, masks])[0].family == "diagonal"  # any family with a diagonal precision


# ----------------------------------------------------------------------------------------------------- trained adapters


def adapted(base: Any, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(copy.deepcopy(base), config).eval()


def test_two_runs_merge_if_and_only_if_they_began_alike(tiny_llama: Any) -> None:
    """Two halves of a data set: the merged adapter is better on all of it than either half's, from one initial A."""
    torch.manual_seed(0)
    data = [Example(f"e{n}", tuple(torch.randint(3, 64, (5,)).tolist()), n % 3) for n in range(24)]
    likelihood = Choice((5, 9, 11))

    def fit(part: list[Example], init: int) -> Any:
        model = adapted(tiny_llama, init)
        training = Training(epochs=12, batch_size=12, learning_rate=0.02, schedule="constant")
        job = Job(model, part, likelihood, training)
        return METHODS["laplace"](structure="diagonal", prior="fixed", prior_precision=1.0).fit(job)[0]  # type: ignore[call-arg]

    def loss(p: Any) -> float:
        result = p.predictive(model, data, likelihood, mode="mean")
        y = torch.tensor([int(e.target) for e in data])
        return float(-result.probs[torch.arange(24), y].log().mean())

    model = adapted(tiny_llama, 1)
    one, two = fit(data[:12], 1), fit(data[12:], 1)
    merged, report = merge([one, two])
    assert report.alignment is not None and report.alignment > 0.5
    assert loss(merged) < min(loss(one), loss(two))
    assert merged.origin.data_size == 24
    stranger = fit(data[12:], 2)
    with pytest.raises(UserError, match="different gauges"):
        merge([one, stranger])
    across, kept = merge([one, stranger], space="delta")
    assert loss(across) < max(loss(one), loss(stranger)) and min(kept.kept.values()) > 0.5
    across.write(model, across.mean())
    assert adapter_tensors(model).keys() == across.mean().keys()
