"""TFB: the law of its draws, what the search returns and what it costs, adapters of others, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.weights import (
    METHODS,
    Choice,
    DiagonalGaussian,
    Example,
    Job,
    Origin,
    Posterior,
    Tokens,
    make_batch,
)  # fmt: skip
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.column_basis import column_basis
from vlm_reason.weights.methods.tfb import TFB
from vlm_reason.weights.noise_scale import NoiseScale, Point, completed, predict
from vlm_reason.weights.noisy_adapter import NoisyAdapter

LIKELIHOOD = Choice((3, 5, 7))
IDS = torch.arange(10, 46).view(2, 18)
A, B = ".lora_A.weight", ".lora_B.weight"


def adapted(base: Any, **keys: Any) -> PeftModel:
    """With a B that is not 0, as if trained."""
    torch.manual_seed(1)
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **keys,
    }
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for key, p in adapter_tensors(model).items():
            if ".lora_B" in key or "embedding" in key:
                p.copy_(0.1 * torch.randn(p.shape))
    return model


def examples(count: int = 80) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 64, (5 + n % 4,), generator=generator).tolist() for n in range(count)]
    return [Example(f"e{n}", tuple(row), row[0] % 3) for n, row in enumerate(rows)]


def job_of(model: PeftModel, count: int = 80, **keys: Any) -> Job:
    return Job(model, examples(count), LIKELIHOOD, **keys)


@torch.no_grad()
def logits(model: PeftModel) -> Tensor:
    return model(input_ids=IDS).logits


# ------------------------------------------------------------------------------------------------- factors and noise


@pytest.mark.parametrize(("m", "n", "r", "rank"), [(6, 5, 3, 3), (6, 5, 3, 2), (2, 5, 4, 2), (3, 3, 1, 1)])
def test_rotated_factors_give_the_same_update(m: int, n: int, r: int, rank: int) -> None:
    b = torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, r, dtype=torch.float64)
    tree = {"x" + A: torch.randn(r, n), "x" + B: b.float(), "other": torch.ones(2)}
    found = column_basis(tree)
    down, up, rows = found.tree["x" + A], found.tree["x" + B], found.rows["x" + A]
    torch.testing.assert_close(up @ down, tree["x" + B] @ tree["x" + A], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up.T @ up, torch.diag(rows[:, 0]), rtol=0, atol=1e-6)
    assert int(rows.sum()) == rank and torch.equal(found.tree["other"], tree["other"])
    assert not down[rows[:, 0] == 0].any()


def test_a_layer_with_no_b_is_left_alone() -> None:
    tree = {"x" + A: torch.randn(2, 3), "x" + B: torch.zeros(4, 2)}
    found = column_basis(tree)
    assert not found.rows and all(torch.equal(found.tree[k], v) for k, v in tree.items())


def test_noise_is_isotropic_in_the_columns_of_b(tiny_llama: Any) -> None:
    """Delta W of a draw is s B A + s sigma U E exactly; over draws, a column has covariance (s sigma)^2 U U^T."""
    model = adapted(tiny_llama)
    given = {k: v.detach().double() for k, v in adapter_tensors(model).items()}
    noisy = NoisyAdapter(job_of(model), examples(8), draws=4)
    q, sigma, s = noisy.posterior(0.05), 0.05, 2.0
    key = next(k for k in q.uncertain() if "v_proj" in k)
    a, b = given[key], given[key.replace(A, B)]
    u = torch.linalg.svd(b, full_matrices=False).U
    columns = []
    for tree in q.sample(400, seed=3):
        apart = s * (tree[key.replace(A, B)].double() @ tree[key].double() - b @ a)
        normals = u.T @ apart / (s * sigma)
        torch.testing.assert_close(
            s * sigma * u @ normals, apart, rtol=0, atol=1e-6
        )  # nothing outside B's columns
        columns.append(apart)
    samples = torch.cat(columns, 1)  # [m, 400 n]
    covariance = samples @ samples.T / samples.shape[1]
    exact = (s * sigma) ** 2 * u @ u.T
    assert float((covariance - exact).norm() / exact.norm()) < 0.03


def test_the_scale_of_b_against_a_does_not_matter(tiny_llama: Any) -> None:
    """B / 5 and 5 A are the same update, and get noise of the same law."""
    model = adapted(tiny_llama)
    noisy = NoisyAdapter(job_of(model), examples(8), draws=2)
    with torch.no_grad():
        for key, p in adapter_tensors(model).items():
            p.mul_(5.0 if A in key else 0.2)
    again = NoisyAdapter(job_of(model), examples(8), draws=2)
    for key in noisy.rows:
        one, two = noisy.tree[key.replace(A, B)], again.tree[key.replace(A, B)]
        torch.testing.assert_close(one @ one.T, two @ two.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(noisy.posterior(0.1).sigma()[key], again.posterior(0.1).sigma()[key])


# ----------------------------------------------------------------------------------------------------------- search


def search(
    outputs: Callable[[float], Tensor], excess: Callable[[Tensor], float], **keys: Any
) -> tuple[Any, list]:
    """A search on given functions of sigma [S, N, C], and what it evaluated."""
    calls = []

    def evaluate(sigma: float, first: int, stop: int) -> Tensor:
        calls.append((sigma, first, stop))
        return outputs(sigma)[:, first:stop]

    zero = outputs(0.0)[0]
    settings = {"bound": 0.01, "start": 0.004, "largest": 1.0, "pilot": 16, "tolerance": 0.05, **keys}
    spread = lambda f: float((f - zero[: f.shape[1]]).square().mean())  # noqa: E731
    found = NoiseScale(evaluate, excess, zero, spread=spread, typical=0.04, **settings).run()
    return found, calls


def bent(sigma: float) -> Tensor:
    """Odd and even in sigma, with higher orders: [6, 100, 2]."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 100, 2, generator=generator, dtype=torch.float64)
    odd, even = torch.tanh(3 * sigma * a), 8 * sigma**2 * b / (1 + sigma**2)
    return torch.stack((odd + even, even - odd), 1).flatten(0, 1)


def mean_square(f: Tensor) -> float:
    return float(f.square().mean())


@pytest.mark.parametrize("start", [1e-4, 4e-3, 0.5])
def test_the_root_is_found_from_anywhere_in_few_evaluations(start: float) -> None:
    """The excess is 9 sigma^2 times the mean of a^2, but for higher orders; the bracket grows and shrinks by itself."""
    found, calls = search(bent, mean_square, start=start)
    low, high = 1e-4, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_square(bent(middle)) <= 0.01 else (low, middle)
    assert 0.95 * low <= found.sigma <= low
    assert found.excess == pytest.approx(mean_square(bent(found.sigma)), rel=1e-9) and found.excess <= 0.01
    assert sum(stop - first for _, first, stop in calls) <= 2 * 100 + 100


def test_a_search_that_never_fails_ends_at_its_limit() -> None:
    found, _ = search(bent, lambda f: -mean_square(f), largest=0.3)
    assert found.sigma == 0.3 and found.at_limit and found.infeasible == math.inf


def test_a_step_in_the_criterion_is_bracketed() -> None:
    """Feasible up to 0.0123 exactly, which no smooth curve shows."""
    found, _ = search(bent, lambda f: 0.0 if mean_square(f) <= mean_square(bent(0.0123)) else 1.0)
    assert 0.95 * 0.0123 <= found.sigma <= 0.0123


def test_outputs_that_are_not_finite_are_no_feasible_ones() -> None:
    with pytest.raises(UserError, match="not finite with noise of sigma 0.5: give a smaller `largest`"):
        search(lambda s: bent(s) if s <= 0.05 else bent(s) * math.nan, mean_square, start=0.5)


def test_no_noise_at_all() -> None:
    with pytest.raises(UserError, match="no noise is tolerated"):
        search(bent, lambda f: 1.0)


def test_predictions_between_points_are_of_high_order() -> None:
    zero = torch.zeros(100, 2, dtype=torch.float64)
    points = [Point(s, bent(s)) for s in (0.02, 0.03, 0.04)]
    exact = bent(0.034)
    error = [float((predict(zero, points[:k], 0.034) - exact).abs().max()) for k in (1, 2, 3)]
    assert error[1] < 0.1 * error[0] and error[2] < 0.1 * error[1]
    part = completed(Point(0.03, bent(0.03)[:, :16]), zero, points[:1])
    assert torch.equal(part.outputs[:, :16], bent(0.03)[:, :16])
    plain = predict(zero, points[:1], 0.03)
    assert float((part.outputs - bent(0.03)).norm()) < 0.8 * float((plain - bent(0.03)).norm())


# -------------------------------------------------------------------------------------------------------------- fit


def nll(posterior: Posterior, model: PeftModel, rows: list[Example], **keys: Any) -> float:
    """By hand, one adapter after the other."""
    result = posterior.predictive(model, rows, LIKELIHOOD, keep_logits=True, **keys)
    assert result.logits is not None
    logp = LIKELIHOOD.log_prob(result.logits.double(), make_batch(rows))
    return float(-(logp.logsumexp(0) - math.log(len(logp))).mean())


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_what_is_returned_is_feasible_and_little_more_is(tiny_llama: Any, labels: Any) -> None:
    """labels given: what the adapter says, but for every tenth; predicted: the given ones are all wrong."""
    model = adapted(tiny_llama)
    before = logits(model)
    point = DiagonalGaussian({}, {k: v.detach() for k, v in adapter_tensors(model).items()}, {}, Origin())
    said = point.predictive(model, examples(), LIKELIHOOD, 1, "mean").probs.argmax(-1).tolist()
    right = [replace(e, target=c) for e, c in zip(examples(), said, strict=True)]
    wrong = [replace(e, target=(e.target + 1) % 3) for e in right]
    mixed = [*wrong[:8], *right[8:]]
    given, rows = (wrong, right) if labels == "predicted" else (mixed, mixed)
    q, report = METHODS["tfb"](labels=labels, draws=6).fit(Job(model, given, LIKELIHOOD, seed=3))  # type: ignore[call-arg]
    assert isinstance(q, DiagonalGaussian) and report.steps == 0 and report.method == "tfb"
    at_zero = nll(q, model, rows, n=1, mode="mean")
    draws = {"n": 6, "mode": "sequential", "seed": 3, "antithetic": True}
    excess = nll(q, model, rows, **draws) / at_zero - 1
    assert report.details["nll_at_mean"] == pytest.approx(at_zero, rel=1e-5)
    assert excess == pytest.approx(report.details["excess"], abs=2e-5) and excess <= 0.003
    more = q.temper(0.9**2)  # sigma / 0.9
    assert nll(more, model, rows, **draws) / at_zero - 1 > 0.003
    q.write(model, q.mean())
    torch.testing.assert_close(
        logits(model), before, rtol=1e-4, atol=1e-4
    )  # the mean says what the adapter said


def test_excess_rises_with_sigma_under_the_same_noise(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    noisy = NoisyAdapter(job_of(model), examples(), draws=6)
    zero = noisy.at_mean()
    batch = make_batch([replace(e, target=int(c)) for e, c in zip(examples(), zero.argmax(-1), strict=True)])
    seen = []
    for sigma in (0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.02):
        logp = LIKELIHOOD.log_prob(noisy.outputs(sigma, 0, 80), batch)
        seen.append(float(-logp.logsumexp(0).mean()))
    assert seen == sorted(seen) and len(set(seen)) == len(seen)


def test_flips(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    q, report = TFB(criterion="flips", bound=0.05, draws=6).fit(job_of(model, seed=1))
    plain = q.predictive(model, examples(), LIKELIHOOD, 1, "mean").probs.argmax(-1)
    drawn = q.predictive(
        model, examples(), LIKELIHOOD, 6, "sequential", seed=1, antithetic=True
    ).probs.argmax(-1)
    assert float((plain != drawn).double().mean()) == pytest.approx(report.details["excess"])
    assert report.details["excess"] <= 0.05 and report.details["sigma"] > 0.01


def test_forwards_are_counted_and_few(tiny_llama: Any) -> None:
    """Against rows that really went through the last layer."""
    model, rows = adapted(tiny_llama), 0

    def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
        nonlocal rows
        rows += len(output[0] if isinstance(output, tuple) else output)

    model.base_model.model.model.layers[-1].register_forward_hook(count)
    _, report = TFB(labels="predicted", anchors=200, pilot=32).fit(job_of(model, 220, seed=1))
    details = report.details
    assert rows == details["example_forwards"] and details["anchors"] == 200
    assert details["bisection_forwards"] == 5 * 10 * 200
    assert details["example_forwards"] <= 0.5 * details["bisection_forwards"]
    assert details["layer_share"] == 1 and details["one_by_one"] is None


def test_layers_below_the_first_with_noise_run_once(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, layers_to_transform=[1])
    _, report = TFB(labels="predicted", draws=4).fit(job_of(model))
    assert report.details["layer_share"] == pytest.approx((1 / 4 + 1) / 2)


def test_given_labels_do_not_matter_where_predicted_ones_are_asked_for(tiny_llama: Any) -> None:
    sigmas = []
    for target in (0, 2):
        model = adapted(tiny_llama)
        rows = [replace(e, target=target) for e in examples(40)]
        job = Job(model, [Example("t", (11, 12), 0)], LIKELIHOOD, held_out=rows)
        _, report = TFB(labels="predicted", source="held_out", draws=4).fit(job)
        tiny_llama = model.unload()  # type: ignore[operator]
        sigmas.append(report.details["sigma"])
    assert sigmas[0] == sigmas[1]


def test_an_adapter_of_stock_peft(tiny_llama: Any, tmp_path: Path) -> None:
    """Also one with noise on the head, an embedding, a bias of B, DoRA's magnitudes: then a forward a draw."""
    base = tiny_llama
    for n, keys in enumerate([
        {"use_rslora": True}, {"target_modules": ["v_proj", "lm_head"]}, {"target_modules": ["v_proj", "embed_tokens"]},
        {"use_dora": True}, {"lora_bias": True},
    ]):  # fmt: skip
        model = adapted(base, **keys)
        model.save_pretrained(str(tmp_path / f"{n}"))
        before, base = logits(model), model.unload()  # type: ignore[operator]
        loaded = PeftModel.from_pretrained(base, str(tmp_path / f"{n}")).eval()
        q, report = TFB(labels="predicted", draws=2, anchors=24, pilot=8).fit(job_of(loaded))
        assert report.details["excess"] <= 0.003 and report.details["sigma"] > 1e-4
        assert (report.details["one_by_one"] is None) == (
            "use_dora" not in keys and "lora_bias" not in keys
        ), keys
        base = loaded.unload()  # type: ignore[operator]
        q.save(tmp_path / f"q{n}")
        again = PeftModel.from_pretrained(base, str(tmp_path / f"q{n}")).eval()
        torch.testing.assert_close(logits(again), before, rtol=1e-3, atol=2e-3)
        base = again.unload()  # type: ignore[operator]


def test_draws_in_one_forward_say_what_they_say_one_by_one(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, target_modules=["v_proj", "lm_head"])
    noisy = NoisyAdapter(job_of(model), examples(10), draws=4)
    together = noisy.outputs(0.05, 2, 9)
    noisy.one_by_one = "asked for"
    torch.testing.assert_close(together, noisy.outputs(0.05, 2, 9), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noisy.at_mean()[2:9], noisy.outputs(1e-9, 2, 9)[0], rtol=1e-4, atol=1e-5)


def test_layers_without_b_stay_certain(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    with torch.no_grad():
        for key, p in adapter_tensors(model).items():
            if ".lora_B" in key and "layers.0" in key:
                p.zero_()
    q, report = TFB(labels="predicted", draws=2).fit(job_of(model))
    assert isinstance(q, DiagonalGaussian)
    assert all("layers.1" in key for key in q.uncertain()) and len(q.uncertain()) == 2
    assert report.details["layer_share"] == pytest.approx((1 / 2 + 1) / 2)


def test_relative_noise_follows_the_size_of_a_layer(tiny_llama: Any) -> None:
    q, report = TFB(labels="predicted", draws=2, relative=True).fit(job_of(adapted(tiny_llama)))
    assert isinstance(q, DiagonalGaussian)
    ratios = [float(s.max() / q.mean()[k].square().mean().sqrt()) for k, s in q.sigma().items()]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-5)
    assert sum(float(s.max()) for s in q.sigma().values()) / len(ratios) == pytest.approx(
        report.details["sigma"], rel=1e-5
    )


def test_it_goes_around_the_mean_of_a_start(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    tree = {k: 0.5 * v.detach() for k, v in adapter_tensors(model).items()}
    start = DiagonalGaussian({}, tree, {}, Origin(output_temperature=2.0))
    start.write(model, tree)
    wanted = logits(model)
    start.write(model, {k: 2 * v for k, v in tree.items()})
    q, _ = TFB(labels="predicted", draws=2).fit(job_of(model, start=start))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert q.origin.output_temperature == 2.0


def test_errors_leave_the_adapter_as_it_was(tiny_llama: Any) -> None:
    for wrong, message in [
        ({"draws": 5}, "an even number of at least 2, got 5"), ({"criterion": "flip"}, "did you mean 'flips'"),
        ({"bound": 0.0}, "bound must be > 0"), ({"start": 2.0}, "start <= largest"), ({"tolerance": 1.0}, "tolerance"),
        ({"anchors": 0}, "anchors must be at least 1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            TFB(**wrong)  # type: ignore[arg-type]
    model = adapted(tiny_llama)
    before = {k: v.detach().clone() for k, v in adapter_tensors(model).items()}
    with pytest.raises(UserError, match="no held-out examples"):
        TFB(source="held_out").fit(job_of(model))
    for settings in ({"criterion": "flips"}, {"labels": "predicted"}):
        with pytest.raises(UserError, match="a likelihood with classes"):
            TFB(**settings).fit(Job(model, [replace(e, target=2) for e in examples(8)], Tokens()))  # type: ignore[arg-type]
    assert all(torch.equal(before[k], v) for k, v in adapter_tensors(model).items())
    with torch.no_grad():
        for key, p in adapter_tensors(model).items():
            p.mul_(0 if ".lora_B" in key else 1)
    with pytest.raises(UserError, match="no LoRA layer whose B is not 0.*train it first"):
        TFB().fit(job_of(model))
    with torch.no_grad():
        p.fill_(math.nan)
    with pytest.raises(UserError, match="of adapter 'default' are NaN or infinite"):
        TFB().fit(job_of(model))
