"""Masks: their law, what training under them does to each row, and the relaxation that learns their probability."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.weights import Choice, Example, Job, Origin, Tokens, Training
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.masks import Masks, binary_entropy
from vlm_reason.weights.methods.concrete_dropout import ConcreteDropout, mask_divergence, relaxed_keep
from vlm_reason.weights.methods.dropout import Dropout, SequenceMasks, mask_sizes, masked
from vlm_reason.weights.methods.rank_masks import RankMasks

KEY = "layer.lora_A.weight"
LIKELIHOOD = Choice((5, 9, 11))


def adapted(
    base: Any, rank: int = 3, targets: Sequence[str] = ("q_proj", "v_proj"), **keys: Any
) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=4, target_modules=list(targets), **keys)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for key, value in adapter_tensors(model).items():
            if "lora_B" in key:
                value.copy_(0.2 * torch.randn_like(value))
    return model


def examples(count: int) -> list[Example]:
    torch.manual_seed(2)
    rows = [tuple(torch.randint(3, 64, (4 + n % 4,)).tolist()) for n in range(count)]
    return [Example(f"e{n}", row, n % 3) for n, row in enumerate(rows)]


def small(p: float = 0.3, axis: Any = "columns") -> Masks:
    torch.manual_seed(0)
    mean = {KEY: torch.randn(3, 40), "layer.lora_B.weight": torch.randn(5, 3)}
    return Masks({}, mean, {KEY: p}, axis, Origin())


# ---------------------------------------------------------------------------------------------------------- the family


@pytest.mark.parametrize("axis", ["columns", "ranks"])
def test_draws_are_the_mean_under_a_mask(axis: Any) -> None:
    q, kept = small(axis=axis), []
    over = 0 if axis == "columns" else 1
    for tree in q.sample(400, 1):
        ratio = tree[KEY] / q.mean()[KEY]
        unit = ratio.amax(over)
        torch.testing.assert_close(ratio.amin(over), unit)  # one number a unit
        torch.testing.assert_close(unit[unit > 0], torch.full_like(unit[unit > 0], 1 / 0.7))
        assert torch.equal(tree["layer.lora_B.weight"], q.mean()["layer.lora_B.weight"])
        kept.append((unit > 0).float())
    units = 40 if axis == "columns" else 3
    share = torch.stack(kept)
    assert share.shape == (400, units)
    assert float((share.mean(0) - 0.7).abs().max()) < 4.5 * math.sqrt(0.21 / 400)
    assert float(share.mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 400 / units))
    together = torch.corrcoef(share.T) - torch.eye(units)
    assert float(together.abs().max()) < 5 / 20  # units are independent


def test_probabilities_of_draws() -> None:
    q = small(0.3, "ranks")
    trees = {}
    for tree in q.sample(200, 2):
        trees[tuple((tree[KEY] != 0).any(1).tolist())] = tree
    assert len(trees) == 8  # all masks of three ranks
    for mask, tree in trees.items():
        on = sum(mask)
        assert q.log_prob(tree) == pytest.approx(on * math.log(0.7) + (3 - on) * math.log(0.3), rel=1e-6)
    assert sum(math.exp(q.log_prob(t)) for t in trees.values()) == pytest.approx(1, abs=1e-6)
    entropy = -sum(math.exp(q.log_prob(t)) * q.log_prob(t) for t in trees.values())
    assert q.entropy() == pytest.approx(entropy, rel=1e-6)
    assert q.log_prob(q.mean()) == -math.inf  # the mean itself is no draw
    assert binary_entropy(0.5) == pytest.approx(math.log(2)) and binary_entropy(0.0) == 0.0


def test_a_unit_of_zeros_has_no_say() -> None:
    q = small(0.3, "ranks")
    mean = q.mean()
    mean[KEY][1] = 0
    q = Masks({}, mean, q.drop(), "ranks", q.origin)
    tree = next(q.sample(1, 0))
    kept = (tree[KEY] != 0).any(1)
    expected = math.log(0.7 if kept[0] else 0.3) + math.log(0.7 if kept[2] else 0.3)
    assert q.log_prob(tree) == pytest.approx(expected, rel=1e-6)
    assert bool(q.precision_diag()[KEY][1].isinf().all())


@pytest.mark.parametrize("axis", ["columns", "ranks"])
def test_covariance_of_outputs_by_enumeration(axis: Any) -> None:
    torch.manual_seed(0)
    mean = {KEY: torch.randn(3, 4)}
    q = Masks({}, mean, {KEY: 0.3}, axis, Origin())
    j = torch.randn(2, 3, 3, 4)
    units = 4 if axis == "columns" else 3
    exact = torch.zeros(2, 3, 3, dtype=torch.float64)
    for n in range(2**units):
        z = torch.tensor([float(n >> k & 1) for k in range(units)], dtype=torch.float64)
        weight = float((0.7**z * 0.3 ** (1 - z)).prod())
        moved = mean[KEY].double() * ((z if axis == "columns" else z[:, None]) / 0.7 - 1)
        f = (j.double() * moved).flatten(2).sum(2)
        exact += weight * f[:, :, None] * f[:, None]
    torch.testing.assert_close(q.output_covariance({KEY: j}), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(1 / q.precision_diag()[KEY], mean[KEY].square() * 0.3 / 0.7)


def test_wrong_masks_are_refused() -> None:
    q = small()
    for call, words in (
        (lambda: Masks({}, q.mean(), {KEY: 1.0}, "columns", Origin()), r"in \[0, 1\), got 1"),
        (
            lambda: Masks({}, q.mean(), {"layer.lora_B.weight": 0.1}, "columns", Origin()),
            "not on 'layer.lora_B",
        ),
        (lambda: Masks({}, q.mean(), {KEY: 0.1}, "tokens", Origin()), "not on 'tokens'"),  # type: ignore[arg-type]
        (lambda: Masks.from_tensors({}, q.mean(), {KEY + ".scale": torch.ones(1)}, Origin()), "one number"),
        (lambda: q.sample(2, 0, antithetic=True), "antithetic"),
        (lambda: q.temper(2.0), "'masks' has no temperature"),
        (lambda: Dropout(0.0), r"p must be in \(0, 1\)"),
        (lambda: RankMasks(1.0), r"p must be in \(0, 1\)"),
        (lambda: ConcreteDropout(initial_p=2.0), "initial_p"),
        (lambda: ConcreteDropout(relaxation=0.0), "relaxation must be > 0"),
        (lambda: ConcreteDropout(axis="tokens"), "axis must be one of columns, ranks"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=words):
            call()


# ------------------------------------------------------------------------------------------------------ under training


@pytest.mark.parametrize("axis", ["columns", "ranks"])
def test_masks_on_the_lm_head(axis: Any, tiny_llama: Any) -> None:
    """Which is given one vector an example, [B, width]; under a token likelihood, positions: refused."""
    model = adapted(tiny_llama, targets=["lm_head"])
    data, tensors = examples(4), adapter_tensors(model)
    factors = {
        k: (torch.rand(4, n) > 0.3).float() / 0.7 for k, n in mask_sizes(model, "default", axis).items()
    }
    (name,) = factors
    with torch.no_grad(), masked(model, "default", factors, axis):
        f = LIKELIHOOD.outputs(model, make_batch(data))
        with pytest.raises(UserError, match="one row an example"):
            Tokens().outputs(model, make_batch(data))
    a = tensors[name + ".lora_A.weight"]
    own = a.detach().clone()
    for n, example in enumerate(data):
        a.data.copy_(own * (factors[name][n] if axis == "columns" else factors[name][n][:, None]))
        alone = LIKELIHOOD.outputs(model, make_batch([example]))[0]
        torch.testing.assert_close(f[n], alone.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", ["columns", "ranks"])
def test_each_row_goes_through_its_own_masked_adapter(axis: Any, tiny_llama: Any) -> None:
    """The masked forward of row b is that of an adapter whose A is masked with the row's mask; so are gradients."""
    model = adapted(tiny_llama, lora_dropout=0.5)  # which the masks replace
    model.train()
    data = examples(4)
    sizes = mask_sizes(model, "default", axis)
    assert set(sizes.values()) == ({32} if axis == "columns" else {3}) and len(sizes) == 4
    factors = {k: (torch.rand(4, n) > 0.3).float() / 0.7 for k, n in sizes.items()}
    tensors = adapter_tensors(model)
    own = {k: v.detach().clone() for k, v in tensors.items()}
    with masked(model, "default", factors, axis):
        f = LIKELIHOOD.outputs(model, make_batch(data))
    f.square().sum().backward()
    grads = {k: v.grad.clone() for k, v in tensors.items() if v.grad is not None}
    assert grads.keys() == tensors.keys()
    model.eval()
    total = {k: torch.zeros_like(v) for k, v in own.items()}
    for n, example in enumerate(data):
        for key, value in tensors.items():
            factor = torch.ones_like(value)
            if "lora_A" in key:
                z = factors[key.removesuffix(".lora_A.weight")][n]
                factor = factor * (z if axis == "columns" else z[:, None])
            value.data.copy_(own[key] * factor)
            value.grad = None
        alone = LIKELIHOOD.outputs(model, make_batch([example]))[0]
        torch.testing.assert_close(f[n], alone, atol=1e-5, rtol=1e-5)
        alone.square().sum().backward()
        for key, value in tensors.items():
            factor = torch.ones_like(value)
            if "lora_A" in key:
                z = factors[key.removesuffix(".lora_A.weight")][n]
                factor = factor * (z if axis == "columns" else z[:, None])
            assert value.grad is not None
            total[key] += value.grad * factor
    for key, value in total.items():
        torch.testing.assert_close(grads[key], value, atol=1e-5, rtol=1e-4)


def test_masks_are_of_the_example_and_the_step() -> None:
    """However examples lie in batches: neither micro-batches nor processes change them."""
    masks, sizes = SequenceMasks(3), {"a": 4, "b": 2}
    masks.on_step_begin(None, type("State", (), {"global_step": 5})(), None)
    both = masks.uniform(["x", "y"], sizes)
    assert {k: v.shape for k, v in both.items()} == {"a": (2, 4), "b": (2, 2)}
    alone = masks.uniform(["y"], sizes)
    assert all(torch.equal(alone[k][0], both[k][1]) for k in sizes)
    assert not torch.equal(both["a"][0], both["a"][1])
    masks.step = 6
    assert not torch.equal(masks.uniform(["y"], sizes)["a"], alone["a"])
    other = SequenceMasks(4)
    other.step = 5
    assert not torch.equal(other.uniform(["y"], sizes)["a"], alone["a"])


def job_of(base: Any, **training: Any) -> Job:
    settings = Training(**{"epochs": 2, "batch_size": 4, "learning_rate": 5e-3, **training})
    return Job(adapted(base), examples(12), LIKELIHOOD, settings)


@pytest.mark.parametrize("method", [Dropout(0.2), RankMasks(0.3), ConcreteDropout()])
def test_micro_batches_do_not_change_a_fit(method: Any, tiny_llama: Any) -> None:
    whole, _ = method.fit(job_of(copy.deepcopy(tiny_llama)))
    cut, _ = method.fit(job_of(copy.deepcopy(tiny_llama), tokens_per_microbatch=8))
    for key, value in whole.mean().items():
        torch.testing.assert_close(cut.mean()[key], value, atol=1e-5, rtol=1e-3)
    for key, p in whole.drop().items():
        assert cut.drop()[key] == pytest.approx(p, abs=1e-5)


def test_a_fit_that_was_stopped_goes_on(tiny_llama: Any, tmp_path: Path) -> None:
    method = ConcreteDropout()
    straight, _ = method.fit(job_of(copy.deepcopy(tiny_llama)))

    class Stopped(Exception):
        pass

    calls = 0
    likelihood = Choice((5, 9, 11))

    class Fails(Choice):
        def log_prob(self, f: Tensor, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise Stopped
            return likelihood.log_prob(f, batch)

    job = replace(
        job_of(copy.deepcopy(tiny_llama), save_steps=2), output_dir=tmp_path, likelihood=Fails((5, 9, 11))
    )
    with pytest.raises(Stopped):
        method.fit(job)
    resumed, _ = method.fit(replace(job, model=adapted(copy.deepcopy(tiny_llama))))
    assert calls < 10  # it did not begin anew
    for key, value in straight.mean().items():
        assert torch.equal(resumed.mean()[key], value)
    assert resumed.drop() == straight.drop()


# ------------------------------------------------------------------------------------------------------- learnt p


def test_the_relaxation_tends_to_the_mask() -> None:
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logit = torch.tensor(math.log(0.3 / 0.7), dtype=torch.float64)
    sharp = relaxed_keep(logit, uniform, 1e-4)
    torch.testing.assert_close(
        sharp[uniform < 0.699], torch.ones_like(sharp[uniform < 0.699]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        sharp[uniform > 0.701], torch.zeros_like(sharp[uniform > 0.701]), atol=1e-3, rtol=0
    )
    assert float(relaxed_keep(logit, uniform, 0.1).mean()) == pytest.approx(0.7, abs=0.02)


def test_the_regulariser_is_the_divergence_up_to_a_constant() -> None:
    """KL between a mixture of narrow Gaussians at 0 and M, and N(0, 1 / l^2), one unit of K weights, by quadrature."""
    precision, narrow = 1.5, 0.02

    def exact(p: float, m: float) -> float:
        x = torch.linspace(-3, 3, 60001, dtype=torch.float64)

        def normal(at: float, sd: float) -> Tensor:
            return torch.distributions.Normal(torch.tensor(at).double(), sd).log_prob(x)

        logq = torch.logaddexp(math.log(p) + normal(0.0, narrow), math.log1p(-p) + normal(m, narrow))
        return float(torch.trapezoid(logq.exp() * (logq - normal(0.0, precision**-0.5)), x))

    def ours(p: float, m: float) -> float:
        a = torch.tensor([[m * (1 - p)]], dtype=torch.float64)  # the adapter's A: M times 1 - p
        logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64)
        return float(mask_divergence({"x": logit}, {"x": a}, {"x": 1}, precision))

    places = [(0.1, 1.0), (0.3, 1.0), (0.3, 0.5), (0.6, 1.3)]
    apart = [exact(p, m) - ours(p, m) for p, m in places]
    assert max(apart) - min(apart) < 1e-5


def test_p_goes_where_the_divergence_wants_it(tiny_llama: Any) -> None:
    """Without data (lambda near 0) p is the minimiser of l^2 |A|^2 / (2 (1 - p)) - K H(p), found on a grid."""
    job = job_of(
        tiny_llama, epochs=30, learning_rate=1e-9, schedule="constant", warmup_share=0.0, max_grad_norm=0.0
    )
    posterior, report = ConcreteDropout(
        prior_precision=30.0, ess=1e-4, p_learning_rate=0.1, axis="ranks"
    ).fit(job)
    assert isinstance(posterior, Masks) and posterior.axis == "ranks"
    grid = torch.linspace(1e-3, 0.999, 9999, dtype=torch.float64)
    for key, p in posterior.drop().items():
        size = float(posterior.mean()[key].double().square().sum())
        h = -(grid * grid.log() + (1 - grid) * (1 - grid).log())
        best = float(grid[(30 * size / (2 * (1 - grid)) - 3 * h).argmin()])
        assert p == pytest.approx(best, abs=0.01)
    assert report.details["p_lowest"] == pytest.approx(min(posterior.drop().values()))
    assert report.details["entropy"] == pytest.approx(posterior.entropy())


def test_a_start_is_where_training_begins(tiny_llama: Any) -> None:
    job = job_of(copy.deepcopy(tiny_llama))
    start, _ = Dropout(0.2).fit(job)
    tiny = replace(job_of(copy.deepcopy(tiny_llama), epochs=1, learning_rate=1e-12), start=start)
    moved, _ = RankMasks(0.4).fit(tiny)
    for key, value in start.mean().items():
        torch.testing.assert_close(moved.mean()[key], value, atol=1e-8, rtol=0)
