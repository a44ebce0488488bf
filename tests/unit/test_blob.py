"""BLoB on a tiny model: what flipout's rows are draws of, what a fit reports, priors, resumption, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.weights import (
    METHODS,
    BradleyTerry,
    Choice,
    DiagonalGaussian,
    Example,
    Job,
    Origin,
    Posterior,
    Training,
    make_batch,
)  # fmt: skip
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.flipout import flipout, row_noise
from vlm_reason.weights.methods import blob
from vlm_reason.weights.methods.blob import BLoB, noisy_layers

LIKELIHOOD = Choice((3, 5, 7))


def adapted(base: Any, **keys: Any) -> PeftModel:
    """With a B that is not 0."""
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "v_proj"], **keys}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **targets))
    with torch.no_grad():
        for key, p in adapter_tensors(model).items():
            if ".lora_B" in key:
                p.copy_(0.3 * torch.randn(p.shape))
    return model


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 64, (5 + n % 4,), generator=generator).tolist() for n in range(count)]
    return [Example(f"e{n}", tuple(row), row[0] % 3) for n, row in enumerate(rows)]


def shapes_of(model: PeftModel) -> dict[str, tuple[int, int]]:
    return {
        name: tuple(m.lora_A["default"].weight.shape) for name, m in noisy_layers(model, "default").items()
    }


def sigma_of(model: PeftModel, size: float = 0.2) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: size * (0.5 + torch.rand(shape)) for name, shape in shapes_of(model).items()}


# ---------------------------------------------------------------------------------------------------------- flipout


def test_each_row_is_one_adapter(tiny_llama: Any) -> None:
    """Row r with noise equals the plain model with A_r = M + (sigma E) t_r s_r^T written into it, at every position."""
    model, rows = adapted(tiny_llama).eval(), examples(4)
    sigma, ids = sigma_of(model), make_batch(rows).input_ids
    noise = row_noise(shapes_of(model), [e.id for e in rows], seed=5, step=3)
    with torch.no_grad(), flipout(model, sigma, noise):
        together = model(input_ids=ids).logits
    layers = noisy_layers(model, "default")
    mean = {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}
    for r in range(len(rows)):
        with torch.no_grad():
            for name, layer in layers.items():
                signs = noise.outputs[name][r][:, None] * noise.inputs[name][r][None]
                layer.lora_A["default"].weight.copy_(mean[name] + sigma[name] * noise.normals[name] * signs)
            alone = model(input_ids=ids[r : r + 1]).logits
        torch.testing.assert_close(together[r : r + 1], alone, rtol=1e-4, atol=1e-5)
    assert float((together[0] - model(input_ids=ids[:1]).logits).abs().max()) > 0.05


def test_rows_have_the_law_of_draws_and_do_not_share_it() -> None:
    """Of a linear layer's noise, over steps: standard deviation within 3 % of the one of weight samples, which is in
    closed form; rows of one batch with the same input uncorrelated."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 3, bias=False)),  # type: ignore[arg-type]
        LoraConfig(r=2, lora_alpha=4, target_modules=["0"]),
    )
    (name,) = shapes = {
        n: tuple(m.lora_A["default"].weight.shape) for n, m in noisy_layers(model, "default").items()
    }
    layer = noisy_layers(model, "default")[name]
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    sigma, x, names = {name: 0.1 + torch.rand(2, 6)}, torch.randn(6), ["a", "b", "c", "d"]
    seen = []
    with torch.no_grad():
        plain = model(x[None].repeat(4, 1))
        for step in range(2000):
            with flipout(model, sigma, row_noise(shapes, names, seed=0, step=step)):
                seen.append(model(x[None].repeat(4, 1)) - plain)
    noise = torch.stack(seen).double()  # [steps, rows, outputs]
    b = layer.lora_B["default"].weight.detach().double()
    exact = 2 * (b.square() @ (sigma[name].double().square() @ x.double().square())).sqrt()
    ratio = noise.flatten(0, 1).std(0) / exact
    assert float((ratio - 1).abs().max()) < 0.03
    assert float((noise.std(0) / exact - 1).abs().max()) < 0.05  # each row by itself
    correlation = torch.corrcoef(noise[:, :, 0].T) - torch.eye(4)
    assert float(correlation.abs().max()) < 0.08


def test_noise_does_not_depend_on_the_batch() -> None:
    shapes = {"a": (2, 5), "b": (3, 4)}
    whole = row_noise(shapes, ["x", "y", "z"], seed=1, step=2)
    part = row_noise(shapes, ["z"], seed=1, step=2)
    for name in shapes:
        assert torch.equal(whole.normals[name], part.normals[name])
        assert torch.equal(whole.inputs[name][2:], part.inputs[name])
        assert torch.equal(whole.outputs[name][2:], part.outputs[name])
    other = row_noise(shapes, ["z"], seed=1, step=3)
    assert not torch.equal(other.normals["a"], part.normals["a"])
    assert set(whole.inputs["a"].unique().tolist()) == {-1, 1}


def test_both_halves_of_a_pair_meet_the_same_function(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    same = [Example(e.id, e.ids, 1, e.ids) for e in examples(3)]
    batch, likelihood = make_batch(same), BradleyTerry(torch.randn(32))
    with flipout(model, sigma_of(model), row_noise(shapes_of(model), batch.ids, seed=0)):
        assert float(likelihood.outputs(model, batch).abs().max()) == 0


def test_flipout_refuses_rows_it_has_no_noise_for(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    noise = row_noise(shapes_of(model), ["a", "b"], seed=0)
    with (
        pytest.raises(UserError, match="given 3 rows, its noise has 2"),
        flipout(model, sigma_of(model), noise),
    ):
        model(input_ids=torch.zeros(3, 4, dtype=torch.long))
    with (
        pytest.raises(UserError, match="not 'elsewhere'"),
        flipout(model, {"elsewhere": torch.ones(1)}, noise),
    ):
        pass


# -------------------------------------------------------------------------------------------------------------- fit


def job_of(base: Any, folder: Path | None = None, **training: Any) -> Job:
    settings = Training(**{"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, **training})
    return Job(adapted(base), examples(), LIKELIHOOD, settings, seed=4, output_dir=folder)


def test_a_fit_reports_its_elbo_and_leaves_b_certain(tiny_llama: Any) -> None:
    job = job_of(tiny_llama)
    posterior, report = METHODS["blob"]().fit(job)
    assert posterior.family == "diagonal" and report.steps == 9
    assert all(".lora_A." in key for key in posterior.uncertain()) and len(posterior.uncertain()) == 4
    details = report.details
    assert details["kl"] == pytest.approx(posterior.kl(), rel=1e-5)
    assert details["elbo"] == pytest.approx(-details["nll"] - details["kl"] / 12, rel=1e-6)
    assert posterior.origin.prior == {key: pytest.approx(25.0) for key in posterior.uncertain()}
    assert posterior.origin.ess == posterior.origin.data_size == 12
    held = {k: v.detach() for k, v in adapter_tensors(job.model).items()}
    assert all(
        torch.equal(held[k], v) for k, v in posterior.mean().items()
    )  # the job's adapter holds the mean
    assert not [n for n, _ in job.model.named_parameters() if "root" in n]


def test_the_first_sigma_is_the_papers(tiny_llama: Any) -> None:
    posterior, _ = BLoB(sigma_learning_rate=1e-9).fit(job_of(tiny_llama, epochs=0.3))
    assert isinstance(posterior, DiagonalGaussian)
    sigma = torch.cat([s.view(-1) for s in posterior.sigma().values()])
    assert 0.00125 <= float(sigma.min()) < 0.00135 and 0.0024 < float(sigma.max()) <= 0.0025


def test_micro_batches_change_nothing(tiny_llama: Any) -> None:
    means = []
    for tokens in (8192, 8):
        q, report = BLoB().fit(job_of(copy.deepcopy(tiny_llama), tokens_per_microbatch=tokens))
        assert isinstance(q, DiagonalGaussian)
        means.append((q.mean(), q.sigma(), report.details["elbo"]))
    for a, b in zip(means[0][:2], means[1][:2], strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)
    assert means[0][2] == pytest.approx(means[1][2], rel=1e-4)


def test_a_killed_fit_goes_on_where_it_was(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path) -> tuple[Posterior, Any]:
        return BLoB().fit(job_of(copy.deepcopy(tiny_llama), folder, save_steps=2))

    straight, whole = fit(tmp_path / "a")
    begin = blob._Step.on_step_begin

    def dies(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        begin(self, args, state, control, **rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(blob._Step, "on_step_begin", dies)
        fit(tmp_path / "b")
    resumed, report = fit(tmp_path / "b")
    for key, value in straight.mean().items():
        assert torch.equal(value, resumed.mean()[key])
    for key, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[key])
    assert report.details == whole.details
    _, again = fit(tmp_path / "b")  # a finished stage is read back
    assert again.details == whole.details


def test_yesterdays_posterior_is_todays_prior(tiny_llama: Any) -> None:
    first, _ = BLoB().fit(job_of(copy.deepcopy(tiny_llama)))
    job = job_of(tiny_llama)
    job = Job(job.model, job.train, job.likelihood, Training(epochs=1, learning_rate=1e-6), start=first)
    second, report = BLoB(sigma_learning_rate=1e-7).fit(job)
    assert isinstance(first, DiagonalGaussian) and isinstance(second, DiagonalGaussian)
    assert report.details["prior"] == "start"
    assert second.origin.prior == {}
    assert report.details["kl"] == pytest.approx(0, abs=1e-2)
    for key in first.uncertain():
        torch.testing.assert_close(second.sigma()[key], first.sigma()[key], rtol=1e-3, atol=0)
    # a start that is certain is a start alone
    start = DiagonalGaussian(first.adapter_config, first.mean(), {}, Origin())
    job = Job(job.model, job.train, job.likelihood, job.training, start=start)
    _, report = BLoB().fit(job)
    assert report.details["prior"] == "N(0, prior_sigma^2)"


def test_the_cyclic_weights_have_mean_one(tiny_llama: Any) -> None:
    job = job_of(tiny_llama)
    loss = blob._Elbo(BLoB(cycle=7), job, {}, {}, {})
    weights = []
    for loss.step in range(14):
        weights.append(loss._weight())
    assert sum(weights) / 14 == pytest.approx(1)
    assert weights[:7] == weights[7:] and weights[1] / weights[0] == pytest.approx(2)
    assert weights[0] == pytest.approx(7 * 2 / (2**8 - 2))


def test_a_process_without_examples_of_a_step_knows_its_divergence(tiny_llama: Any) -> None:
    """Batches of one example on two processes: one of them never computes a loss."""
    root, mean = torch.nn.Parameter(torch.full((2, 3), 0.3)), torch.ones(2, 3)
    prior = {"layer": (torch.zeros(()), torch.tensor(0.2))}
    loss = blob._Elbo(BLoB(), job_of(tiny_llama), {"layer": mean}, {"layer": root}, prior)
    for step in range(20):
        loss.begin(step)
    share = float(loss.kl().detach()) / len(loss.job.train)
    assert loss.likelihood_part([5.0 + share] * 20) == pytest.approx(5.0)


def test_layers_of_another_kind_are_trained_and_certain(tiny_llama: Any) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1
    )
    job = Job(get_peft_model(tiny_llama, config), examples(), LIKELIHOOD, Training(epochs=1, batch_size=4))
    before = {k: v.clone() for k, v in adapter_tensors(job.model).items()}
    posterior, _ = BLoB().fit(job)
    assert len(posterior.uncertain()) == 2 and all("q_proj" in k for k in posterior.uncertain())
    assert not torch.equal(posterior.mean()["base_model.model.model.embed_tokens.lora_embedding_B"],
                           before["base_model.model.model.embed_tokens.lora_embedding_B"])  # fmt: skip


def test_errors(tiny_llama: Any) -> None:
    for wrong, message in [
        ({"prior_sigma": 0.0}, "prior_sigma must be > 0, got 0.0"), ({"init": -1.0}, "init must be > 0"),
        ({"samples": 0}, "samples must be at least 1"), ({"cycle": 0}, "cycle must be at least 1 step"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0"), ({"sigma_learning_rate": 0.0}, "sigma_learning_rate"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            BLoB(**wrong)  # type: ignore[arg-type]
    model = get_peft_model(
        tiny_llama, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True)
    )
    with pytest.raises(UserError, match="no plain LoRA linear layer"):
        BLoB().fit(Job(model, examples(), LIKELIHOOD))
