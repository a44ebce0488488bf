"""Every mode of a posterior's predictive against the draws themselves, closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlm_reason.errors import UserError
from vlm_reason.weights import (
    BradleyTerry,
    Choice,
    DiagonalGaussian,
    Example,
    Origin,
    Posterior,
    Predictive,
    Regression,
    Tokens,
    make_batch,
)
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.families.particles import Particles
from vlm_reason.weights.jacobians import jacobians
from vlm_reason.weights.per_row import decoder_layers
from vlm_reason.weights.predictive import draws as draws_module
from vlm_reason.weights.predictive import generate
from vlm_reason.weights.predictive.draws import half_width
from vlm_reason.weights.predictive.summary import draws_of_outputs

LABELS = (3, 5, 7)
CHOICE = Choice(LABELS)
EXAMPLES = [
    Example(f"e{n}", tuple((7 * n + 3 * t) % 60 + 3 for t in range(3 + (5 * n) % 7)), n % 3) for n in range(9)
]


def adapted(base: nn.Module, targets: Sequence[str] = ("q_proj", "v_proj"), **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=list(targets), **options)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def posterior_of(model: PeftModel, sigma: float = 0.3, only: str = "", **origin: Any) -> DiagonalGaussian:
    mean = adapter_tensors(model)
    spread = {key: torch.full_like(value, sigma) for key, value in mean.items() if only in key}
    return DiagonalGaussian(peft_config_dict(model, "default"), mean, spread, Origin(**origin))


@torch.no_grad()
def logits_alone(
    model: PeftModel, posterior: Posterior, n: int, seed: int = 0, antithetic: bool = False
) -> Tensor:
    """[S, B, C] by PEFT and the model's own head: one draw, one example, all tokens."""
    before = {key: p.clone() for key, p in adapter_tensors(model).items()}
    found = []
    for tree in posterior.sample(n, seed, antithetic):
        posterior.write(model, tree)
        rows = [model(input_ids=torch.tensor([e.ids])).logits[0, -1, list(LABELS)] for e in EXAMPLES]
        found.append(torch.stack(rows))
    posterior.write(model, before)
    return torch.stack(found)


def same(a: Predictive, b: Predictive, atol: float = 1e-5) -> None:
    assert a.ids == b.ids
    for name in (
        "probs",
        "total_entropy",
        "expected_entropy",
        "mutual_information",
        "log_prob",
        "logit_variance",
    ):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=atol, equal_nan=True), name


# ----------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("mode", ["sequential", "batched", "auto"])
def test_draws_are_mixed_as_they_are(tiny_llama, mode: str) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    f = logits_alone(model, posterior, 6, seed=4).double()
    found = posterior.predictive(model, EXAMPLES, CHOICE, 6, mode, seed=4, keep_logits=True, with_mean=True)
    p = f.softmax(-1)
    mixed = p.mean(0)
    total = -(mixed * mixed.log()).sum(-1)
    expected = -(p * p.log()).sum(-1).mean(0)
    target = torch.tensor([int(e.target) for e in EXAMPLES])
    assert found.ids == tuple(e.id for e in EXAMPLES) and found.n == 6
    assert found.mode == ("sequential" if mode == "sequential" else "batched")
    assert (found.logits - f).abs().max() < 1e-5
    assert (found.probs - mixed).abs().max() < 1e-5
    assert (found.total_entropy - total).abs().max() < 1e-5
    assert (found.expected_entropy - expected).abs().max() < 1e-5
    assert (found.mutual_information - (total - expected)).abs().max() < 1e-5
    assert (found.log_prob - mixed[range(9), target].log()).abs().max() < 1e-5
    assert (found.logit_variance - f.var(0, correction=0)).abs().max() < 1e-4
    firsts = f.argmax(-1)
    assert found.variation_ratio.tolist() == pytest.approx(
        [1 - max((firsts[:, b] == c).double().mean().item() for c in range(3)) for b in range(9)]
    )
    mean = posterior.predictive(model, EXAMPLES, CHOICE, mode="mean")
    assert (found.mean_probs - mean.probs).abs().max() < 1e-6
    assert total.max() - expected[total.argmax()] > 0.05


@pytest.mark.parametrize(
    "budget", [{"tokens": 1}, {"tokens": 9}, {"tokens": 40}, {"memory": 2000}, {"memory": 1}]
)
def test_budgets_do_not_change_the_numbers(tiny_llama, budget: dict[str, int]) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    whole = posterior.predictive(model, EXAMPLES, CHOICE, 5, "batched")
    seen: list[int] = []
    handle = decoder_layers(model)[0].self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(
            kwargs["hidden_states"].shape[0] * kwargs["hidden_states"].shape[1]
        ),
        with_kwargs=True,
    )
    same(posterior.predictive(model, EXAMPLES, CHOICE, 5, "batched", **budget), whole)
    handle.remove()
    longest = max(len(e.ids) for e in EXAMPLES)
    if "tokens" in budget:
        assert max(seen) <= max(budget["tokens"], longest)
    else:
        assert len(seen) >= 5 if budget["memory"] == 1 else 2


def test_a_batch_gives_what_its_examples_give(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    twins = [*EXAMPLES[:3], EXAMPLES[0]]  # the same name twice
    a = posterior.predictive(model, twins, CHOICE, 3)
    b = posterior.predictive(model, make_batch(twins), CHOICE, 3)
    same(a, b)
    assert torch.equal(a.probs[0], a.probs[3]) or (a.probs[0] - a.probs[3]).abs().max() < 1e-6


def test_a_draw_is_the_same_whatever_n(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    few = posterior.predictive(model, EXAMPLES, CHOICE, 3, seed=2, keep_logits=True).logits
    many = posterior.predictive(model, EXAMPLES, CHOICE, 7, seed=2, keep_logits=True).logits
    assert (few - many[:3]).abs().max() < 1e-5
    other = posterior.predictive(model, EXAMPLES, CHOICE, 3, seed=3, keep_logits=True).logits
    assert (few - other).abs().max() > 0.1


def test_antithetic_pairs_cancel_to_first_order(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 1e-3)
    found = posterior.predictive(
        model, EXAMPLES, CHOICE, 2, antithetic=True, keep_logits=True, with_mean=True
    )
    f = found.logits.double()
    mean = logits_alone(model, posterior_of(model, 0.0), 1)[0]
    assert (f[0] - mean).abs().max() > 1e-3
    assert (f.mean(0) - mean).abs().max() < 0.02 * (f[0] - mean).abs().max()


class Failing:
    """A likelihood that fails at its third batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(CHOICE, name)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("third batch")
        return CHOICE.outputs(model, batch)


@pytest.mark.parametrize("mode", ["mean", "sequential", "batched", "linearised", "closed_form"])
def test_the_model_is_left_as_it_was(tiny_llama, mode: str) -> None:
    """Another value than the mean in the adapter, training mode, dropout: bit for bit, also after an error."""
    model = adapted(tiny_llama, lora_dropout=0.5).train()
    posterior = posterior_of(model)
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p.add_(1.0)
    decoder_layers(model)[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    first = posterior.predictive(model, EXAMPLES, CHOICE, 3, mode)
    same(posterior.predictive(model, EXAMPLES, CHOICE, 3, mode), first)  # dropout was off
    with pytest.raises(RuntimeError, match="third batch"):
        posterior.predictive(model, EXAMPLES, Failing(), 3, mode, tokens=9)  # type: ignore[arg-type]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_certain_posterior_is_its_mean(tiny_llama) -> None:
    model = adapted(tiny_llama)
    mean, certain = adapter_tensors(model), posterior_of(model, only="nothing has this name")
    alone = logits_alone(model, certain, 1)[0].softmax(-1)
    found = certain.predictive(model, EXAMPLES, CHOICE)
    assert found.mode == "mean" and found.n == 1
    assert (found.probs - alone).abs().max() < 1e-5 and found.mutual_information.abs().max() == 0
    assert (found.mean_probs - found.probs).abs().max() < 1e-15
    for mode in ("batched", "sequential", "linearised", "closed_form"):
        assert (certain.predictive(model, EXAMPLES, CHOICE, 3, mode).probs - alone).abs().max() < 1e-5
    assert len(mean) == 8


def test_output_temperature_divides_logits(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior, hot = posterior_of(model), posterior_of(model, output_temperature=2.5)
    f = logits_alone(model, posterior, 3) / 2.5
    for mode in ("sequential", "batched"):
        found = hot.predictive(model, EXAMPLES, CHOICE, 3, mode, keep_logits=True)
        assert (found.probs - f.softmax(-1).mean(0)).abs().max() < 1e-5
        assert (found.logits - f).abs().max() < 1e-5
    cold = posterior.predictive(model, EXAMPLES, CHOICE, 3, "linearised", keep_logits=True)
    warm = hot.predictive(model, EXAMPLES, CHOICE, 3, "linearised", keep_logits=True)
    assert torch.allclose(warm.logits, cold.logits / 2.5, atol=1e-5)
    assert torch.allclose(warm.logit_variance, cold.logit_variance / 2.5**2)
    with pytest.raises(UserError, match="output temperature 2.5"):
        hot.predictive(model, EXAMPLES, Regression(torch.ones(32)), 3)


# ----------------------------------------------------------------------------------------------- adaptive


def test_rows_leave_when_their_entropy_is_known(tiny_llama) -> None:
    """What a row says after k draws is what it says at n = k; a wide bar stops at once, a narrow one never."""
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.15)
    found = posterior.predictive(model, EXAMPLES, CHOICE, 24, until=0.1, at_least=4, keep_logits=True)
    used = found.draws_used.tolist()
    assert len(set(used)) > 1 and set(used) <= set(range(4, 25, 4)) and found.n == max(used)
    for k in set(used):
        rows = [b for b in range(9) if used[b] == k]
        fixed = posterior.predictive(
            model, [EXAMPLES[b] for b in rows], CHOICE, k, keep_logits=True, mode="batched"
        )
        assert (found.probs[rows] - fixed.probs).abs().max() < 1e-5
        assert (found.total_entropy[rows] - fixed.total_entropy).abs().max() < 1e-5
        assert len(found.logits) == found.n and found.logits[k:, rows].isnan().all()
        width = half_width(CHOICE, fixed.logits, False)
        assert bool((width <= 0.1).all()) or k == 24
        if k > 4:
            assert bool((half_width(CHOICE, fixed.logits[: k - 4], False) > 0.1).all())
    assert set(posterior.predictive(model, EXAMPLES, CHOICE, 9, until=50.0).draws_used.tolist()) == {4}
    assert set(posterior.predictive(model, EXAMPLES, CHOICE, 9, until=1e-9).draws_used.tolist()) == {9}
    paired = posterior.predictive(model, EXAMPLES, CHOICE, 9, until=50.0, at_least=5, antithetic=True)
    assert set(paired.draws_used.tolist()) == {6}


def test_rows_that_left_are_not_run(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.15)
    rows: list[int] = []
    decoder_layers(model)[1].mlp.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    found = posterior.predictive(model, EXAMPLES, CHOICE, 24, until=0.1)
    assert sum(rows) == int(found.draws_used.sum()) < 9 * 24


def test_half_widths_cover_the_true_entropy() -> None:
    """Of 400 examples with 12 draws each of f ~ N(m, 1), about 95 % of intervals cover what 3,000 draws give."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(400, 3, generator=generator)
    f = m + torch.randn(12, 400, 3, generator=generator)
    exact = (m + torch.randn(3_000, 400, 3, generator=generator)).double().softmax(-1)
    p = f.double().softmax(-1)
    width = half_width(CHOICE, f, False)

    def h(q: Tensor) -> Tensor:
        return -(q * q.log()).sum(-1)

    expected = ((h(p).mean(0) - h(exact).mean(0)).abs() <= width).double().mean()
    total = ((h(p.mean(0)) - h(exact.mean(0))).abs() <= width).double().mean()
    assert 0.93 < float(expected) and 0.9 < float(total)
    assert math.isinf(half_width(CHOICE, f[:1], False)[0]) and math.isinf(half_width(CHOICE, f[:3], True)[0])


def test_quantiles_of_student_t() -> None:
    for df, want in ((1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000)):
        assert draws_module._t_quantile(df) == pytest.approx(want, abs=0.003)


# ------------------------------------------------------------------------------------------------- Gaussian outputs


def test_linearised_is_the_jacobian_and_the_covariance(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.2)
    batch = make_batch(EXAMPLES)
    f, jacobian = jacobians(model, batch, CHOICE)
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2).double()
    v = 0.04 * flat @ flat.mT
    found = posterior.predictive(model, EXAMPLES, CHOICE, 8, "linearised", keep_logits=True)
    assert found.mode == "linearised" and found.logits.shape == (8, 9, 3)
    assert torch.allclose(found.logit_variance, v.diagonal(dim1=1, dim2=2), rtol=1e-4)
    assert (found.mean_probs - f.softmax(-1)).abs().max() < 1e-5
    draws = draws_of_outputs(f.double(), v, 4096, 0)
    assert torch.allclose(draws.mean(0), f.double(), atol=1e-6)  # in pairs
    apart = draws - f
    covariance = torch.einsum("sbc,sbd->bcd", apart, apart) / 4096
    assert ((covariance - v).abs().amax((1, 2)) < 0.06 * v.abs().amax((1, 2))).all()
    assert (found.probs - draws.softmax(-1).mean(0)).abs().max() < 1e-5
    assert (found.logits - draws[:8]).abs().max() < 1e-4
    for memory in (1, 40_000):
        same(posterior.predictive(model, EXAMPLES, CHOICE, 8, "linearised", memory=memory), found)


def test_linearised_agrees_with_draws_where_the_model_is_linear(tiny_llama) -> None:
    """A small sigma: f is linear in the weights there, and 300 draws have the variance that J Sigma J^T says."""
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.01)
    linear = posterior.predictive(model, EXAMPLES, CHOICE, 4, "linearised")
    drawn = posterior.predictive(model, EXAMPLES, CHOICE, 300, "batched", antithetic=True)
    ratio = drawn.logit_variance / linear.logit_variance
    assert ratio.log().abs().mean() < 0.15
    assert (drawn.probs - linear.probs).abs().max() < 0.01


@pytest.mark.parametrize("m, v", [(0.7, 0.5), (-1.5, 3.0), (2.0, 0.1)])
def test_two_classes_against_quadrature(tiny_llama, m: float, v: float) -> None:
    """E sigmoid(f), f ~ N(m, v): draws to 0.005, the probit to its own 0.02."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    exact = float((weights / weights.sum() / (1 + np.exp(-(m + math.sqrt(v) * nodes)))).sum())
    posterior = _Known(
        posterior_of(adapted(tiny_llama)), *(torch.tensor(x, dtype=torch.float64) for x in ([[m]], [[[v]]]))
    )
    pair = [Example("pair", (4, 5), 1.0, (6, 7))]
    likelihood = BradleyTerry(torch.ones(32))
    found = posterior.predictive(_model_of(posterior), pair, likelihood)
    assert found.mode == "closed_form"
    assert found.probs[0].tolist() == pytest.approx([exact, 1 - exact], abs=0.005)
    assert float(found.log_prob[0]) == pytest.approx(math.log(exact), abs=0.01)
    probit = posterior.predictive(_model_of(posterior), pair, likelihood, link="probit")
    flat = 1 / (1 + math.exp(-m / math.sqrt(1 + math.pi * v / 8)))
    assert float(probit.probs[0, 0]) == pytest.approx(flat, abs=1e-12) and abs(flat - exact) < 0.02
    assert float(probit.log_prob[0]) == pytest.approx(math.log(flat), abs=1e-12)
    assert float(found.mean_probs[0, 0]) == pytest.approx(1 / (1 + math.exp(-m)), abs=1e-6)


class _Known(DiagonalGaussian):
    """A family whose outputs are N(m, V) for whatever is asked."""

    def __init__(self, like: DiagonalGaussian, m: Tensor, v: Tensor) -> None:
        super().__init__(like.adapter_config, like.mean(), like.sigma(), like.origin)
        self.m, self.v = m, v

    def closed_form(
        self, model: Any, batch: Any, likelihood: Any, adapter: str = "default"
    ) -> tuple[Tensor, Tensor]:
        assert torch.equal(next(iter(adapter_tensors(model).values())), next(iter(self.mean().values())))
        return self.m.expand(len(batch), -1), self.v.expand(len(batch), -1, -1)


def _model_of(posterior: Posterior) -> PeftModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return posterior.attach(LlamaForCausalLM(config).eval())


def test_the_probit_of_several_classes(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.3)
    linear = posterior.predictive(model, EXAMPLES, CHOICE, 4, "linearised", link="probit")
    exact = logits_alone(model, posterior_of(model, 0.0), 1)[0].double()
    want = (exact / (1 + math.pi / 8 * linear.logit_variance).sqrt()).softmax(-1)
    assert (linear.probs - want).abs().max() < 1e-5
    same(posterior.predictive(model, EXAMPLES, CHOICE, 4, "closed_form"), linear)
    assert posterior.predictive(model, EXAMPLES, CHOICE, 4, "closed_form").mode == "closed_form"
    by_draws = posterior.predictive(model, EXAMPLES, CHOICE, 4, "linearised")
    assert (by_draws.probs - linear.probs).abs().max() < 0.15


def test_particles_are_linearised_draw_by_draw(tiny_llama) -> None:
    model = adapted(tiny_llama)
    gaussian = posterior_of(model, 0.05)
    particles = Particles(gaussian.adapter_config, list(gaussian.sample(3, 0)), gaussian.origin)
    mean = particles.mean()
    particles.write(model, mean)
    f, jacobian = jacobians(model, make_batch(EXAMPLES), CHOICE)
    found = particles.predictive(model, EXAMPLES, CHOICE, 3, "linearised", keep_logits=True, seed=1)
    for s, tree in enumerate(particles.sample(3, 1)):
        step = sum(
            torch.einsum("bcij,ij->bc", jacobian[k].double(), (tree[k] - mean[k]).double()) for k in jacobian
        )
        assert torch.allclose(found.logits[s].double(), f + step, atol=1e-4)
    with pytest.raises(UserError, match="no covariance in closed form"):
        particles.predictive(model, EXAMPLES, CHOICE, 3, "linearised", link="probit")
    with pytest.raises(UserError, match="no predictive in closed form"):
        particles.predictive(model, EXAMPLES, CHOICE, 3, "closed_form")


# ------------------------------------------------------------------------------------------------- likelihoods


PAIRS = [Example(e.id, e.ids, 1.0, EXAMPLES[-1 - n].ids) for n, e in enumerate(EXAMPLES)]
TEXTS = [Example(e.id, e.ids, 1 + n % 2) for n, e in enumerate(EXAMPLES)]


def test_preferences(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior, likelihood = posterior_of(model), BradleyTerry(torch.randn(32) / 4)
    for mode in ("batched", "sequential"):
        found = posterior.predictive(model, PAIRS, likelihood, 5, mode, keep_logits=True)
        p = found.logits[..., 0].double().sigmoid()
        assert found.logits.shape == (5, 9, 1)
        assert torch.allclose(found.probs, torch.stack([p.mean(0), 1 - p.mean(0)], -1))
        assert torch.allclose(found.log_prob, p.mean(0).log())
    batched = posterior.predictive(model, PAIRS, likelihood, 5)
    same(batched, posterior.predictive(model, PAIRS, likelihood, 5, "sequential"))
    same(batched, posterior.predictive(model, PAIRS, likelihood, 5, tokens=12))
    linear = posterior_of(model, 0.01).predictive(model, PAIRS, likelihood, 5, "linearised")
    assert (
        linear.probs - posterior_of(model, 0.01).predictive(model, PAIRS, likelihood, 40).probs
    ).abs().max() < 0.03


def test_regression(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior, likelihood = posterior_of(model), Regression(torch.randn(32) / 4, noise=0.5)
    found = posterior.predictive(model, EXAMPLES, likelihood, 5, keep_logits=True)
    f = found.logits[..., 0].double()
    assert torch.allclose(found.mean, f.mean(0)) and torch.allclose(
        found.variance, 0.25 + f.var(0, correction=0)
    )
    target = torch.tensor([float(e.target) for e in EXAMPLES]).double()
    want = torch.distributions.Normal(f, 0.5).log_prob(target).exp().mean(0).log()
    assert torch.allclose(found.log_prob, want, atol=1e-6)
    assert torch.allclose(found.total_entropy, 0.5 * (2 * math.pi * math.e * found.variance).log())
    assert torch.allclose(found.mutual_information, 0.5 * (found.variance / 0.25).log())
    assert found.probs.shape == (9, 0)
    same(found, posterior.predictive(model, EXAMPLES, likelihood, 5, "sequential"))
    linear = posterior.predictive(model, EXAMPLES, likelihood, 5, "linearised")
    exact = torch.distributions.Normal(linear.mean, linear.variance.sqrt()).log_prob(target)
    assert torch.allclose(linear.log_prob, exact)
    assert torch.allclose(linear.variance, 0.25 + linear.logit_variance[:, 0])


def test_sequences(tiny_llama) -> None:
    """log of the mean over draws of the probability of the whole sequence, not the mean of the logs."""
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    found = posterior.predictive(model, TEXTS, Tokens(), 4, keep_logits=True)
    want = []
    for tree in posterior.sample(4, 0):
        posterior.write(model, tree)
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([e.ids])).logits[0].log_softmax(-1) for e in TEXTS]
        want.append([
            sum(float(row[t - 1, e.ids[t]]) for t in range(int(e.target), len(e.ids)))
            for row, e in zip(rows, TEXTS, strict=True)
        ])  # fmt: skip
    f = torch.tensor(want).double()
    assert (found.logits[..., 0] - f).abs().max() < 1e-4
    assert (found.log_prob - (f.logsumexp(0) - math.log(4))).abs().max() < 1e-4
    assert found.total_entropy.isnan().all() and found.probs.shape == (9, 0)
    same(found, posterior.predictive(model, TEXTS, Tokens(), 4, "sequential", tokens=10), 1e-4)
    for mode in ("linearised", "closed_form"):
        with pytest.raises(UserError, match="log-probability of a sequence is no Gaussian"):
            posterior.predictive(model, TEXTS, Tokens(), 4, mode)
    with pytest.raises(UserError, match="until"):
        posterior.predictive(model, TEXTS, Tokens(), 4, until=0.1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mode": "batch"}, "mode must be one of .*did you mean 'batched'"),
        ({"link": "logit"}, "link must be one of"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"until": 0.0}, "until must be > 0"),
        ({"mode": "mean", "until": 0.1}, "until is for draws"),
        ({"adapter": "defualt"}, "defualt"),
    ],
)
def test_wrong_requests(tiny_llama, options: dict[str, Any], words: str) -> None:
    model = adapted(tiny_llama)
    with pytest.raises(UserError, match=words):
        posterior_of(model).predictive(model, EXAMPLES, CHOICE, **options)
    with pytest.raises(UserError, match="no examples"):
        posterior_of(model).predictive(model, [], CHOICE)


# ------------------------------------------------------------------------------------------- other kinds of adapter


@pytest.mark.parametrize(
    "options, mode",
    [
        ({"targets": ("q_proj", "embed_tokens")}, "batched"),
        ({"modules_to_save": ["lm_head"]}, "batched"),
        ({"modules_to_save": ["norm"]}, "sequential"),
        ({"use_dora": True}, "sequential"),
    ],
)
def test_draws_that_cannot_share_our_forward(tiny_llama, options: dict[str, Any], mode: str) -> None:
    model = adapted(tiny_llama, **options)
    posterior = posterior_of(model, 0.1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    draws_module._said.clear()
    with pytest.warns(UserWarning, match="predictive: ") as caught:
        found = posterior.predictive(model, EXAMPLES, CHOICE, 3, "batched", keep_logits=True)
        posterior.predictive(model, EXAMPLES, CHOICE, 3, "batched")
    assert len([w for w in caught if "predictive: " in str(w.message)]) == 1
    assert found.mode == mode
    assert (found.logits - logits_alone(model, posterior, 3)).abs().max() < 1e-5
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in after.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"


def test_draws_of_a_layer_in_front_of_the_decoders() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    model = adapted(OPTForCausalLM(config), ("project_in", "q_proj"))
    posterior = posterior_of(model)
    draws_module._said.clear()
    with pytest.warns(UserWarning, match="project_in.* is no plain LoRA factor of a decoder layer"):
        found = posterior.predictive(model, EXAMPLES, CHOICE, 3, keep_logits=True)
    assert found.mode == "batched"
    assert (found.logits - logits_alone(model, posterior, 3)).abs().max() < 1e-5


def test_an_uncertain_head(tiny_llama) -> None:
    model = adapted(tiny_llama, ("q_proj", "lm_head"))
    posterior = posterior_of(model, 0.1)
    found = posterior.predictive(model, EXAMPLES, CHOICE, 3, "batched", keep_logits=True)
    assert found.mode == "batched"
    assert (found.logits - logits_alone(model, posterior, 3)).abs().max() < 1e-5
    draws_module._said.clear()
    with pytest.warns(UserWarning, match="an uncertain LM head under a token likelihood"):
        texts = posterior.predictive(model, TEXTS, Tokens(), 3, "batched")
    same(texts, posterior.predictive(model, TEXTS, Tokens(), 3, "sequential"))


def test_the_named_adapter_is_asked_whichever_is_active(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    want = posterior.predictive(model, EXAMPLES, CHOICE, 3)
    model.add_adapter("other", replace_rank(model))
    model.set_adapter("other")
    for mode in ("sequential", "batched"):
        same(posterior.predictive(model, EXAMPLES, CHOICE, 3, mode), want)
    assert model.active_adapter == "other"


def replace_rank(model: PeftModel) -> LoraConfig:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return replace(config, r=4)


# ---------------------------------------------------------------------------------------------------------- text


PROMPTS = [(5, 9, 30), (8, 2, 60, 41, 3, 17), (6,), (11, 12, 13, 14)]


@torch.no_grad()
def written_alone(
    model: PeftModel, posterior: Posterior, n: int, steps: int, eos: tuple[int, ...] = ()
) -> list:
    """Each draw in the adapter, each prompt by itself, no cache: argmax after argmax."""
    texts = []
    for tree in posterior.sample(n, 0):
        posterior.write(model, tree)
        own = []
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(steps):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
                if ids[-1] in eos:
                    break
            own.append(tuple(ids[len(prompt) :]))
        texts.append(tuple(own))
    posterior.write(model, posterior.mean())
    return texts


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}, {"use_dora": True}])
@pytest.mark.filterwarnings("ignore:predictive")
def test_texts_are_those_each_draw_writes_alone(tiny_llama, options: dict[str, Any]) -> None:
    """Left padding, one cache a row, greedy: token for token; also in pieces, and with an end token."""
    model = adapted(tiny_llama, **options)
    posterior = posterior_of(model)
    want = written_alone(model, posterior, 3, 6)
    assert len(set(want)) == 3
    made = generate(posterior, model, PROMPTS, 3, 6)
    assert list(made.ids) == want
    assert list(generate(posterior, model, PROMPTS, 3, 6, rows=5).ids) == want
    assert list(generate(posterior, model, PROMPTS, 3, 6, rows=2).ids) == want
    eos = (want[0][0][3],)
    assert list(generate(posterior, model, PROMPTS, 3, 6, eos=eos).ids) == written_alone(
        model, posterior, 3, 6, eos
    )


def test_sampled_texts_depend_on_seed_draw_prompt_and_place_alone(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model, 0.1)
    made = generate(posterior, model, PROMPTS, 4, 6, temperature=1.0, seed=5)
    assert generate(posterior, model, PROMPTS, 2, 6, temperature=1.0, seed=5, rows=3).ids == made.ids[:2]
    assert generate(posterior, model, PROMPTS, 4, 3, temperature=1.0, seed=5).ids == tuple(
        tuple(text[:3] for text in own) for own in made.ids
    )
    assert generate(posterior, model, PROMPTS, 4, 6, temperature=1.0, seed=6).ids != made.ids
    assert len({own for own in made.ids}) == 4


def test_sampled_tokens_have_the_draws_law(tiny_llama) -> None:
    """First tokens of 600 copies of a prompt under one certain adapter: frequencies are probabilities."""
    model = adapted(tiny_llama)
    certain = posterior_of(model, only="nothing")
    made = generate(certain, model, [PROMPTS[0]] * 600, 1, 1, temperature=1.0, rows=600)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([text[0] for text in made.ids[0]]), minlength=64).double()
    big = p > 0.03
    assert big.sum() >= 3
    z = (counts - 600 * p)[big] / (600 * p * (1 - p))[big].sqrt()
    assert z.abs().max() < 3.5


@pytest.mark.parametrize(
    "prompts, options", [([], {}), ([()], {}), (PROMPTS, {"n": 0}), (PROMPTS, {"rows": 0})]
)
def test_generation_needs_prompts_and_draws(tiny_llama, prompts: list, options: dict[str, int]) -> None:
    model = adapted(tiny_llama)
    with pytest.raises(UserError):
        generate(posterior_of(model), model, prompts, **options)
