"""Last layers on a model: one run an example, predictions in closed form, files, and their use as reward models,
regressions and classifiers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from vlm_reason.config import from_dict
from vlm_reason.errors import UserError
from vlm_reason.scoring.enter import unwrap
from vlm_reason.weights import (
    FAMILIES,
    METHODS,
    BradleyTerry,
    Choice,
    Example,
    FitReport,
    Job,
    Likelihood,
    Posterior,
    Regression,
    Tokens,
    Training,
    make_batch,
)
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.families.last_layer import HEAD, LastLayer
from vlm_reason.weights.heads.backbone import Backbone, states
from vlm_reason.weights.methods.map import point
from vlm_reason.weights.methods.vbll import VBLL

LABELS = Choice((5, 9, 11))


@pytest.fixture
def model(tiny_llama: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(tiny_llama, config)


def sequences(n: int, seed: int = 0, low: int = 4, high: int = 16) -> list[tuple[int, ...]]:
    """One token, then another three times."""
    generator = torch.Generator().manual_seed(seed)
    return [(a, b, b, b) for a, b in torch.randint(low, high, (n, 2), generator=generator).tolist()]


def of_last_token(rows: list[tuple[int, ...]]) -> list[Example]:
    """Three classes, by the last token, one of twelve: easy for a head on the last hidden state."""
    return [Example(f"e{k}", ids, float((ids[-1] - 4) // 4 % 3)) for k, ids in enumerate(rows)]


CLASSES = of_last_token(sequences(150))
OTHERS = of_last_token(sequences(80, seed=1))


def fit(
    model: PeftModel,
    examples: list[Example],
    likelihood: Likelihood = LABELS,
    job: dict | None = None,
    **keys: Any,
) -> tuple[LastLayer, FitReport]:
    training = Training(epochs=2, batch_size=16, learning_rate=1e-3)
    posterior, report = VBLL(**keys).fit(Job(model, examples, likelihood, training, **(job or {})))
    assert isinstance(posterior, LastLayer)
    return posterior, report


def perturbed(model: PeftModel, size: float = 0.3) -> None:
    """An adapter that does something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p += size * torch.randn_like(p)


def runs_of(model: PeftModel) -> list[int]:
    """Rows of every run of the decoder from now on."""
    rows: list[int] = []
    unwrap(model).base_model.register_forward_hook(lambda m, a, out: rows.append(len(out.last_hidden_state)))
    return rows


# ------------------------------------------------------------------------------------------------------------- fits


def test_it_is_a_method_and_a_family() -> None:
    assert METHODS["vbll"] is VBLL and FAMILIES["last_layer"] is LastLayer


def test_post_hoc_runs_the_model_once_an_example(model: PeftModel) -> None:
    before = {k: p.detach().clone() for k, p in adapter_tensors(model).items()}
    rows = runs_of(model)
    twice = [*CLASSES[:40], *CLASSES[:40]]
    _, report = fit(model, twice, steps=100)
    assert sum(rows) == 40 and report.steps == 100 and report.examples == 80
    assert all(torch.equal(p, before[k]) for k, p in adapter_tensors(model).items())
    backbone = Backbone(model, LABELS)
    first = backbone.states_of(CLASSES[:10])
    rows.clear()
    again = backbone.states_of(CLASSES[:10][::-1])
    assert rows == [] and torch.equal(again.hidden, first.hidden.flip(0))


def test_hidden_states_and_outputs_are_the_models_own(model: PeftModel) -> None:
    perturbed(model)
    batch = make_batch(CLASSES[:6])
    with torch.no_grad():
        found = states(model, batch, LABELS)
        whole = model(input_ids=batch.input_ids, output_hidden_states=True)
    last = whole.hidden_states[-1][torch.arange(6), batch.last]
    assert torch.allclose(found.hidden, last, atol=1e-6)
    logits = whole.logits[torch.arange(6), batch.last][:, list(LABELS.label_ids)]
    assert torch.allclose(found.outputs, logits, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 200])
def test_a_fit_starts_from_the_models_own_predictions(model: PeftModel, steps: int) -> None:
    posterior, report = fit(model, CLASSES, steps=steps)
    batch = make_batch(OTHERS)
    with torch.no_grad():
        own = LABELS.outputs(model, batch)
    mean, _ = posterior.closed_form(model, batch, LABELS)
    nll_own = float(-LABELS.log_prob(own, batch).mean())
    nll = float(-LABELS.log_prob(mean, batch).mean())
    if steps == 0:
        assert torch.allclose(mean, own, atol=1e-5)
    else:
        assert nll < nll_own - 0.5 and nll < math.log(3) - 0.2
        assert report.details["elbo"] > report.details["elbo_start"] + 0.5
        assert report.train_nll is not None and report.train_nll < -report.details["elbo"]


@pytest.mark.parametrize(
    "keys",
    [
        {"covariance": "diagonal"},
        {"covariance": "low_rank", "rank": 3},
        {"shared": True},
        {"offset": "zero"},
        {"bound": "jensen"},
        {"projection": "random", "features": 16},
        {"projection": "none", "learn_prior": False},
    ],
)
def test_every_setting_learns_the_task(model: PeftModel, keys: dict[str, Any]) -> None:
    posterior, report = fit(model, CLASSES, steps=150, **keys)
    batch = make_batch(OTHERS)
    mean, variance = posterior.closed_form(model, batch, LABELS)
    assert float((mean.argmax(-1) == batch.target).float().mean()) > 0.55
    assert report.details["elbo"] > report.details["elbo_start"]
    assert bool((variance.diagonal(dim1=1, dim2=2) > 0).all())


def test_it_starts_where_the_job_says(model: PeftModel) -> None:
    job = Job(model, CLASSES, LABELS)
    perturbed(model)
    start = point(job)
    perturbed(model, 1.0)
    posterior, _ = fit(model, CLASSES, job={"start": start}, steps=0)
    assert all(torch.equal(v, start.mean()[k]) for k, v in posterior.mean().items())
    assert all(torch.equal(p.detach(), start.mean()[k]) for k, p in adapter_tensors(model).items())


def test_joint_mode_trains_adapter_and_head(model: PeftModel) -> None:
    before = {k: p.detach().clone() for k, p in adapter_tensors(model).items()}
    posterior, report = fit(model, CLASSES, mode="joint", learning_rate=0.1)
    moved = [float((p.detach() - before[k]).abs().max()) for k, p in adapter_tensors(model).items()]
    assert max(moved) > 1e-3 and report.steps == 20
    assert report.details["elbo"] > report.details["elbo_start"] + 0.2
    assert all(torch.equal(p.detach(), posterior.mean()[k]) for k, p in adapter_tensors(model).items())
    assert not model.training


def test_joint_mode_does_not_depend_on_micro_batches(model: PeftModel) -> None:
    start = {k: p.detach().clone() for k, p in adapter_tensors(model).items()}
    found = []
    for tokens in (8192, 9):
        with torch.no_grad():
            for k, p in adapter_tensors(model).items():
                p.copy_(start[k])
        training = Training(epochs=1, batch_size=8, learning_rate=1e-3, tokens_per_microbatch=tokens)
        settings = VBLL(mode="joint", covariance="diagonal", learning_rate=0.01)
        posterior, _ = settings.fit(Job(model, CLASSES[:24], LABELS, training))
        assert isinstance(posterior, LastLayer)
        found.append(posterior.head.mean)
    assert torch.allclose(*found, atol=1e-4)


def test_joint_mode_reads_a_finished_run_back(model: PeftModel, tmp_path: Path) -> None:
    start = {k: p.detach().clone() for k, p in adapter_tensors(model).items()}
    first, _ = fit(model, CLASSES[:32], job={"output_dir": tmp_path / "run"}, mode="joint")
    with torch.no_grad():
        for k, p in adapter_tensors(model).items():
            p.copy_(start[k])
    again, _ = fit(model, CLASSES[:32], job={"output_dir": tmp_path / "run"}, mode="joint")
    assert all(torch.equal(v, again.tensors()[k]) for k, v in first.tensors().items())


# ------------------------------------------------------------------------------------------------------ predictions


def test_closed_form_is_the_law_of_outputs_under_draws_of_heads(model: PeftModel) -> None:
    perturbed(model)
    posterior, _ = fit(model, CLASSES, covariance="low_rank", steps=30)
    batch = make_batch(OTHERS[:5])
    mean, variance = posterior.closed_form(model, batch, LABELS)
    with torch.no_grad():
        found = states(model, batch, LABELS)
    phi = posterior.features(found)
    f = torch.stack([found.outputs + phi @ w[HEAD].mT for w in posterior.sample_heads(2000, 0, True)])
    sigma = variance.diagonal(dim1=1, dim2=2).sqrt()
    assert torch.allclose(f.mean(0), mean, atol=1e-4)  # opposite pairs
    assert torch.allclose(f.std(0), sigma, rtol=0.1)
    assert torch.allclose(variance, torch.diag_embed(sigma.square()))  # rows are independent


def test_the_predictive_of_an_ordinary_posterior_is_the_heads(model: PeftModel) -> None:
    posterior, _ = fit(model, CLASSES, steps=100)
    found = posterior.predictive(model, OTHERS, LABELS, 10)
    mean, variance = posterior.closed_form(model, make_batch(OTHERS), LABELS)
    torch.manual_seed(0)
    noise = torch.randn(5_000, *mean.shape)
    exact = (mean + variance.diagonal(dim1=1, dim2=2).sqrt() * noise).softmax(-1).mean(0)
    assert found.ids == tuple(e.id for e in OTHERS)
    assert torch.allclose(found.probs.float(), exact, atol=0.02)
    assert bool((found.mutual_information > 0).all())
    probit = posterior.predictive(model, OTHERS, LABELS, 10, "closed_form", link="probit")
    shrunk = mean / (1 + math.pi / 8 * variance.diagonal(dim1=1, dim2=2)).sqrt()
    assert torch.allclose(probit.probs.float(), shrunk.softmax(-1), atol=1e-4)
    at_mean = posterior.predictive(model, OTHERS, LABELS, 1, "mean")
    assert torch.allclose(at_mean.probs.float(), mean.softmax(-1), atol=1e-4)


def test_predictions_do_not_depend_on_what_the_adapter_holds(model: PeftModel) -> None:
    posterior, _ = fit(model, CLASSES, steps=20)
    mean, _ = posterior.closed_form(model, make_batch(OTHERS), LABELS)
    perturbed(model)
    held = {k: p.detach().clone() for k, p in adapter_tensors(model).items()}
    again, _ = posterior.closed_form(model, make_batch(OTHERS), LABELS)
    assert torch.equal(mean, again)
    assert all(torch.equal(p, held[k]) for k, p in adapter_tensors(model).items())


def test_unusual_inputs_score_higher(model: PeftModel) -> None:
    narrow = of_last_token(sequences(150, low=4, high=12))
    posterior, _ = fit(model, [replace(e, target=float(e.ids[-1] % 3)) for e in narrow], steps=60)
    usual = posterior.ood_scores(model, of_last_token(sequences(60, 5, 4, 12)), LABELS)
    strange = posterior.ood_scores(model, of_last_token(sequences(60, 6, 40, 60)), LABELS)
    for a, b in ((usual.variance, strange.variance), (usual.surprise, strange.surprise)):
        assert float((b[:, None] > a).float().mean()) > 0.9  # AUROC
    assert usual.negative_max is not None and usual.ids[:2] == ("e0", "e1")
    assert bool((usual.negative_max <= -1 / 3 + 1e-6).all())


# ----------------------------------------------------------------------------------------------------- distribution


def test_draws_are_heads_not_adapters(model: PeftModel, tmp_path: Path) -> None:
    posterior, _ = fit(model, CLASSES[:40], steps=0)
    with pytest.raises(UserError, match="its draws are heads, not adapters"):
        posterior.sample(2, 0)
    with pytest.raises(UserError, match="its draws are heads, not adapters"):
        posterior.export_samples(2, tmp_path / "draws", 0)
    assert list(tmp_path.iterdir()) == []
    few, many = list(posterior.sample_heads(2, 3)), list(posterior.sample_heads(5, 3))
    assert all(torch.equal(a[HEAD], b[HEAD]) for a, b in zip(few, many, strict=False))
    assert not torch.equal(few[0][HEAD], few[1][HEAD])
    one, opposite = posterior.sample_heads(2, 3, antithetic=True)
    assert torch.allclose(one[HEAD] + opposite[HEAD], 2 * posterior.head.mean, atol=1e-5)
    assert torch.equal(one[HEAD], few[0][HEAD])


def test_densities_divergences_and_temperature(model: PeftModel) -> None:
    posterior, _ = fit(model, CLASSES[:40], steps=30)
    draws = list(posterior.sample_heads(50, 0))
    prior_sigma = float(posterior.head.prior_variance) ** 0.5
    ratio = [
        posterior.log_prob(w) - float(torch.distributions.Normal(0, prior_sigma).log_prob(w[HEAD]).sum())
        for w in draws
    ]
    spread = torch.tensor(ratio).std().item() / 50**0.5
    assert posterior.kl() == pytest.approx(sum(ratio) / 50, abs=4 * spread)  # KL = E_q log q / p
    colder = posterior.temper(4.0)
    batch = make_batch(OTHERS[:3])
    (m1, v1), (m4, v4) = (p.closed_form(model, batch, LABELS) for p in (posterior, colder))
    assert torch.equal(m1, m4) and torch.allclose(v4, v1 / 4, rtol=1e-4) and colder.origin.temper == 4.0
    size = posterior.head.mean.numel()
    assert colder.kl(posterior) == pytest.approx(size / 2 * (1 / 4 - 1 + math.log(4)), rel=1e-3)
    assert posterior.kl(posterior) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="the density of a last layer is over"):
        posterior.log_prob(posterior.mean())


@pytest.mark.parametrize(
    "keys",
    [{}, {"covariance": "low_rank"}, {"covariance": "diagonal", "projection": "none"}, {"shared": True}],
)
def test_files_give_the_same_predictions(model: PeftModel, tmp_path: Path, keys: dict[str, Any]) -> None:
    perturbed(model)
    posterior, _ = fit(model, CLASSES[:60], steps=20, **keys)
    posterior.save(tmp_path / "p")
    loaded = Posterior.load(tmp_path / "p", model)
    batch = make_batch(OTHERS[:10])
    for a, b in zip(
        posterior.closed_form(model, batch, LABELS), loaded.closed_form(model, batch, LABELS), strict=True
    ):
        assert torch.equal(a, b)
    assert loaded.kl() == posterior.kl()
    scores = [
        p.ood_scores(model, OTHERS[:10], LABELS) for p in (posterior, loaded) if isinstance(p, LastLayer)
    ]
    assert torch.equal(scores[0].surprise, scores[1].surprise)


def test_stock_peft_loads_the_mean(model: PeftModel, tmp_path: Path, tiny_llama: Any) -> None:
    perturbed(model)
    posterior, _ = fit(model, CLASSES[:40], steps=0)
    posterior.save(tmp_path / "p")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        base = model.unload()
        found = PeftModel.from_pretrained(base, tmp_path / "p")(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_broken_files_are_refused(model: PeftModel) -> None:
    posterior, _ = fit(model, CLASSES[:40], steps=0)
    tensors = posterior.tensors()
    missing = {k: v for k, v in tensors.items() if k != "head.mean"}
    with pytest.raises(UserError, match="do not belong together: 'mean'"):
        LastLayer.from_tensors({}, posterior.mean(), missing, posterior.origin)
    other = {k: v for k, v in tensors.items() if not k.startswith("covariance.")}
    with pytest.raises(UserError, match="no covariance has the tensors none"):
        LastLayer.from_tensors({}, posterior.mean(), other, posterior.origin)


# ------------------------------------------------------------------------------------------------------------- uses


def test_as_a_reward_model_on_preferences(model: PeftModel) -> None:
    """Preferred: the sequence with the larger last token."""
    rows = sequences(400, seed=2)
    pairs = [
        Example(f"p{k}", max(a, b, key=lambda r: r[-1]), 1.0, min(a, b, key=lambda r: r[-1]))
        for k, (a, b) in enumerate(zip(rows[::2], rows[1::2], strict=True))
        if a[-1] != b[-1]
    ]
    train, test = pairs[:140], pairs[140:]
    likelihood = BradleyTerry(torch.zeros(32))
    posterior, report = fit(model, train, likelihood, steps=150)
    assert report.train_nll is not None and report.train_nll < 0.6
    better = posterior.rewards(model, test, likelihood, 1.0)
    worse = posterior.rewards(model, [replace(e, ids=e.rejected, rejected=()) for e in test], likelihood, 1.0)
    assert float((better.mean > worse.mean).float().mean()) > 0.75
    assert torch.allclose(better.pessimistic, better.mean - better.deviation)
    mean, variance = posterior.closed_form(model, make_batch(test), likelihood)
    assert torch.allclose(mean[:, 0], better.mean - worse.mean, atol=1e-4)
    assert bool((variance[:, 0, 0] <= (better.deviation + worse.deviation).square() + 1e-6).all())
    found = posterior.predictive(model, test, likelihood)
    exact = (mean[:, 0] / (1 + math.pi / 8 * variance[:, 0, 0]).sqrt()).sigmoid()
    assert torch.allclose(found.probs[:, 0].float(), exact, atol=0.03)
    bold = posterior.rewards(model, test, likelihood, 0.0)
    assert torch.equal(bold.pessimistic, bold.mean)


def test_as_a_regression_with_learnt_noise(model: PeftModel) -> None:
    torch.manual_seed(3)
    rows = sequences(260, seed=3)
    values = torch.tensor([row[-1] / 4 for row in rows]) + 0.2 * torch.randn(260) + 5
    examples = [Example(f"r{k}", ids, float(v)) for k, (ids, v) in enumerate(zip(rows, values, strict=True))]
    train, test = examples[:200], examples[200:]
    likelihood = Regression(torch.zeros(32))
    posterior, report = fit(model, train, likelihood, job={"held_out": test})
    target = torch.tensor([e.target for e in test])
    mean, variance = posterior.closed_form(model, make_batch(test), likelihood)
    assert report.steps == 0 and 0.15 < report.details["noise"][0] < 0.6
    residual = (mean[:, 0] - target).square().mean()
    assert residual < 0.4 * target.var()
    sigma = (variance[:, 0, 0] + report.details["noise"][0] ** 2).sqrt()
    z = (target - mean[:, 0]) / sigma
    assert 0.75 < float(z.std()) < 1.3  # honest about its errors
    exact = -torch.distributions.Normal(mean[:, 0], sigma).log_prob(target).mean()
    assert report.held_out_nll == pytest.approx(float(exact), abs=1e-3)
    noisy = posterior.with_noise(likelihood)
    assert isinstance(noisy, Regression) and noisy.noise == pytest.approx(
        report.details["noise"][0], rel=1e-5
    )
    given, _ = fit(model, train, Regression(torch.zeros(32), 0.7), learn_noise=False)
    assert given.head.log_noise is not None
    assert float((given.head.log_noise / 2).exp()) == pytest.approx(0.7, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- errors


def test_settings_come_from_a_config() -> None:
    given = {"covariance": "low_rank", "rank": 4, "learn_prior": None, "mode": "joint", "prior_scale": 2}
    assert from_dict(VBLL, given, "method") == VBLL("joint", "low_rank", 4, prior_scale=2.0)


def test_errors_say_what_was_wrong(model: PeftModel) -> None:
    with pytest.raises(UserError, match="Tokens has none"):
        fit(model, CLASSES[:8], Tokens())
    with pytest.raises(UserError, match="vbll: mode must be one of post_hoc, joint, got 'both'"):
        VBLL(mode="both")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="projection must be one of none, random, pca"):
        VBLL(projection="pcs")
    with pytest.raises(UserError, match="bound_draws must be even"):
        VBLL(bound_draws=3)
    posterior, _ = fit(model, CLASSES[:40], steps=0)
    with pytest.raises(UserError, match="cannot predict under Regression"):
        posterior.closed_form(model, make_batch(CLASSES[:2]), Regression(torch.zeros(32)))
    with pytest.raises(UserError, match=r"label tokens \[5, 9, 11\], the likelihood has \[5, 9\]"):
        posterior.closed_form(model, make_batch(CLASSES[:2]), Choice((5, 9)))
    with pytest.raises(UserError, match="rewards are for a head fitted on preferences"):
        posterior.rewards(model, CLASSES[:2], LABELS)
