"""The low-dimensional core: Delta W = s B R A with a full Gaussian over R, against autograd and dense Gaussians."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from transformers import LlamaForCausalLM

from vlm_reason.errors import UserError
from vlm_reason.weights import DiagonalGaussian, Example, Job, Posterior
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.curvature import CoreCurvature, collect
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.core import CoreGaussian
from vlm_reason.weights.jacobians import jacobians
from vlm_reason.weights.likelihoods import Choice
from vlm_reason.weights.methods.core import Core

CHOICE = Choice((3, 5, 7))
RANK = 3


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> PeftModel:
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(tiny_llama, config)
    torch.manual_seed(3)
    for key, p in adapter_tensors(adapted).items():  # type: ignore[arg-type]
        if "lora_B" in key:
            p.data.normal_(0, 0.3)
    return adapted.eval()  # type: ignore[return-value]


@pytest.fixture
def job(model: PeftModel) -> Job:
    generator = torch.Generator().manual_seed(1)
    data = [
        Example(str(n), tuple(torch.randint(0, 64, (3 + n % 4,), generator=generator).tolist()), n % 3)
        for n in range(10)
    ]
    return Job(model, data, CHOICE, held_out=data[:4])


def test_curvature_is_that_of_the_outputs_in_r(job: Job) -> None:
    """By finite differences of A <- (1 + e E_pq) A, one example at a time."""
    curvature, parts = CoreCurvature(), (CoreCurvature(), CoreCurvature())
    collect(job.model, job.train, CHOICE, curvature, tokens=9)
    collect(job.model, job.train[:3], CHOICE, parts[0])
    collect(job.model, job.train[3:], CHOICE, parts[1])
    parts[0].merge(parts[1])
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    job.model.double()
    tensors = adapter_tensors(job.model)
    a = tensors[key].detach().clone()
    expected = torch.zeros(RANK**2, RANK**2).double()
    for example in job.train:
        batch, rows = make_batch([example]), []
        for place in range(RANK**2):
            nudge = torch.zeros(RANK**2).double()
            nudge[place] = 1e-4
            f = []
            for sign in (1, -1):
                tensors[key].data.copy_(a + sign * nudge.view(RANK, RANK) @ a)
                with torch.no_grad():
                    f.append(CHOICE.outputs(job.model, batch)[0].double())
            rows.append((f[0] - f[1]) / 2e-4)
        tensors[key].data.copy_(a)
        with torch.no_grad():
            law = CHOICE.hessian(CHOICE.outputs(job.model, batch).double())[0]
        j = torch.stack(rows, 1)
        expected += j.mT @ law @ j
    found = curvature.sums[key.removesuffix(".lora_A.weight")]
    # outputs are fp32: the differences carry its rounding over 2e-4
    assert (found - expected).abs().max() < 3e-3 * expected.abs().max()
    for name, value in curvature.sums.items():
        assert torch.allclose(value, parts[0].sums[name], rtol=1e-4, atol=1e-5)


def test_is_the_gaussian_in_r(job: Job) -> None:
    posterior, report = Core(groups="tensor").fit(job)
    assert isinstance(posterior, CoreGaussian)
    assert report.details["curvature_numbers"] == 4 * RANK**4
    keys = posterior.uncertain()
    mean = posterior.mean()
    # covariance over R: the Jacobian of R -> A picks nothing but R out where J = e (A^+)^T
    jacobian, laws, priors = {}, {}, {}
    for key in keys:
        jacobian = {k: torch.zeros(1, RANK**2, *mean[k].shape) for k in keys}
        inverse = torch.linalg.pinv(mean[key].double())  # [in, r]
        jacobian[key] = torch.einsum(
            "crq,dq->crd", torch.eye(RANK**2).double().view(-1, RANK, RANK), inverse
        )[None]
        covariance = posterior.output_covariance(jacobian)[0]
        laws[key] = MultivariateNormal(torch.eye(RANK).flatten().double(), (covariance + covariance.mT) / 2)
        delta = posterior.origin.prior[key] * torch.eye(RANK**2).double()
        priors[key] = MultivariateNormal(torch.zeros(RANK**2).double(), precision_matrix=delta)

    def core(tree: dict[str, Tensor], key: str) -> Tensor:
        return torch.linalg.lstsq(mean[key].double().mT, tree[key].double().mT).solution.mT.flatten()

    tree = next(posterior.sample(1, 4))
    assert all(torch.equal(tree[k], mean[k]) == (k not in keys) for k in mean)
    expected = sum(float(laws[k].log_prob(core(tree, k))) for k in keys)
    assert posterior.log_prob(tree) == pytest.approx(expected, rel=1e-4)
    expected = sum(float(kl_divergence(laws[k], priors[k])) for k in keys)
    assert posterior.kl() == pytest.approx(expected, rel=1e-4)
    assert posterior.kl(posterior) == pytest.approx(0.0, abs=1e-8)
    # log Z = log p - KL-free form: -1/2 [delta r + log|P| - log|P_0|]
    share = sum(
        -(posterior.origin.prior[k] * RANK - float(torch.logdet(laws[k].covariance_matrix))
          - RANK**2 * float(torch.tensor(posterior.origin.prior[k]).log())) / 2
        for k in keys
    )  # fmt: skip
    assert report.details["log_evidence"] == pytest.approx(-report.train_nll * 10 + share, rel=1e-4)  # type: ignore[operator]
    draws = torch.stack([core(t, keys[0]) for t in posterior.sample(1500, 2)])
    found = torch.cov(draws.mT)
    exact = laws[keys[0]].covariance_matrix
    assert float((found - exact).norm() / exact.norm()) < 0.2
    variance = torch.stack([t[keys[0]] for t in posterior.sample(1500, 2)]).var(0)
    ratio = variance * posterior.precision_diag()[keys[0]]
    assert 0.97 < float(ratio.mean()) < 1.03


def test_off_the_rows_of_a_there_is_no_density(job: Job) -> None:
    posterior, _ = Core().fit(job)
    tree = posterior.mean()
    tree[posterior.uncertain()[0]] += torch.randn(tree[posterior.uncertain()[0]].shape)
    assert posterior.log_prob(tree) == -float("inf")
    other: Any = DiagonalGaussian(posterior.adapter_config, posterior.mean(), {}, posterior.origin)
    with pytest.raises(UserError, match="no KL divergence in closed form from 'core' to 'diagonal'"):
        posterior.kl(other)
    with pytest.raises(UserError, match="only for structure diagonal and full"):
        sigma = {k: torch.ones_like(v) for k, v in posterior.mean().items()}
        start = DiagonalGaussian(posterior.adapter_config, posterior.mean(), sigma, posterior.origin)
        Core(prior="start").fit(dataclasses.replace(job, start=start))


def test_output_covariance_is_the_spread_of_the_linearised_outputs(job: Job) -> None:
    posterior, _ = Core(prior="fixed", prior_precision=50.0).fit(job)
    f, j = jacobians(job.model, make_batch(job.train[:2]), CHOICE)
    mean = posterior.mean()
    moved = torch.stack([
        sum(((t[k] - mean[k]) * j[k]).flatten(2).sum(-1) for k in j) for t in posterior.sample(3000, 0)
    ])  # fmt: skip
    expected = posterior.output_covariance(j)
    for b in range(2):
        found = torch.cov(moved[:, b].mT).double()
        assert float((found - expected[b]).norm() / expected[b].norm()) < 0.1


def test_saved_is_the_same_and_loads_as_an_adapter(job: Job, tmp_path: Path) -> None:
    posterior, report = Core(prior="held_out", grid=(0.1, 10.0)).fit(job)
    assert report.details["grid"][0]["prior_precision"] == 0.1
    loaded = Posterior.load(posterior.save(tmp_path / "p"))
    for ours, theirs in zip(posterior.sample(2, 1, True), loaded.sample(2, 1, True), strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    colder = loaded.temper(4.0)
    halved = {
        k: (t - m)
        for (k, t), m in zip(next(colder.sample(1, 1)).items(), posterior.mean().values(), strict=True)
    }
    whole = {
        k: (t - m)
        for (k, t), m in zip(next(loaded.sample(1, 1)).items(), posterior.mean().values(), strict=True)
    }
    assert all(torch.allclose(halved[k] * 2, whole[k], atol=1e-6) for k in whole)
    batched = loaded.predictive(job.model, job.train, CHOICE, 3, "batched").probs
    assert (
        batched - loaded.predictive(job.model, job.train, CHOICE, 3, "sequential").probs
    ).abs().max() < 1e-5
