"""Laplace on an adapter where everything is known in closed form: Bayesian linear regression in the B of a LoRA layer,
and its matrix algebra against dense matrices. fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from vlm_reason.weights import Example, Job
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.curvature import LowRank
from vlm_reason.weights.curvature.evidence import Spectrum, best_delta, best_deltas_dense
from vlm_reason.weights.examples import Batch
from vlm_reason.weights.families.gaussian import BlockGaussian, Dense
from vlm_reason.weights.families.kronecker import Kronecker
from vlm_reason.weights.methods.laplace import Laplace

N, IN, OUT, RANK, NOISE = 40, 7, 4, 3, 0.3
KEY = "base_model.model.linear.lora_B.weight"


class Regressor(nn.Module):
    """One linear layer on the features of example n, which is token n."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Embedding(N, IN)
        self.linear = nn.Linear(IN, OUT)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.features(ids[:, 0]))


@dataclass(frozen=True)
class LinearGaussian:
    """y_n ~ N(f_n, NOISE^2 1); target: n."""

    y: Tensor

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.input_ids)

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        z = (f - self.y[batch.target.long()]) / NOISE
        return -z.square().sum(-1) / 2 - OUT * math.log(NOISE * math.sqrt(2 * math.pi))

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def hessian(self, f: Tensor) -> Tensor:
        return (torch.eye(OUT, dtype=f.dtype) / NOISE**2).expand(*f.shape, OUT)

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return (f - self.y[batch.target.long()]) / NOISE**2


class Problem:
    def __init__(self) -> None:
        torch.manual_seed(5)
        config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["linear"])
        self.model: PeftModel = get_peft_model(Regressor(), config).double().eval()
        tensors = adapter_tensors(self.model)
        self.b = tensors[KEY]
        a = tensors[KEY.replace("lora_B", "lora_A")].detach()
        base = self.model.base_model.model
        x = base.features.weight.detach()
        self.phi = 2.0 * x @ a.mT  # [N, r]; s = 6 / 3
        self.offset = base.linear.base_layer(x).detach()
        self.y = (
            self.offset
            + self.phi @ torch.randn(RANK, OUT).double() * 0.4
            + NOISE * torch.randn(N, OUT).double()
        )
        examples = [Example(str(n), (n,), n) for n in range(N)]
        self.job = Job(self.model, examples, LinearGaussian(self.y))

    def precision(self, delta: float) -> Tensor:
        """Of one row of B."""
        return self.phi.mT @ self.phi / NOISE**2 + delta * torch.eye(RANK).double()

    def go_to_mode(self, delta: float) -> None:
        rows = torch.linalg.solve(self.precision(delta), self.phi.mT @ (self.y - self.offset) / NOISE**2)
        self.b.data.copy_(rows.mT)

    def evidence(self, delta: float) -> float:
        covariance = NOISE**2 * torch.eye(N).double() + self.phi @ self.phi.mT / delta
        law = MultivariateNormal(torch.zeros(N).double(), covariance)
        return float(law.log_prob((self.y - self.offset).mT).sum())


SETTINGS = {
    "full": Laplace(structure="full", over="B", train=False),
    "kronecker": Laplace(rank=OUT, over="B", train=False),
    # the large side is a multiple of the identity: one direction and the trace of the rest are all of it
    "low-rank": Laplace(rank=1, over="B", train=False),
    "kfac": Laplace(rank=OUT, factors="activations", over="B", train=False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_is_the_exact_posterior_of_linear_regression(name: str) -> None:
    p = Problem()
    p.go_to_mode(2.0)
    posterior, report = replace(SETTINGS[name], prior="fixed", prior_precision=2.0).fit(p.job)
    assert isinstance(posterior, BlockGaussian)
    x = torch.randn(5, RANK).double()
    jacobian = torch.zeros(5, OUT, OUT, RANK).double()
    for c in range(OUT):
        jacobian[:, c, c] = x
    expected = torch.einsum("bi,ij,bj->b", x, torch.linalg.inv(p.precision(2.0)), x)
    found = posterior.output_covariance({KEY: jacobian})
    assert (found - expected[:, None, None] * torch.eye(OUT)).abs().max() < 1e-10
    assert report.details["log_evidence"] == pytest.approx(p.evidence(2.0), rel=1e-11)
    assert posterior.log_det() == pytest.approx(OUT * float(torch.logdet(p.precision(2.0))), rel=1e-11)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_prior_of_highest_evidence_is_type_two_maximum_likelihood(name: str) -> None:
    p = Problem()
    delta = 1.0
    for _ in range(25):  # mode and prior in turn
        p.go_to_mode(delta)
        delta = SETTINGS[name].fit(p.job)[1].details["prior_precision"]["all"]
    grid = torch.linspace(-4, 4, 81).double().exp()
    best = float(grid[max(range(len(grid)), key=lambda n: p.evidence(float(grid[n])))])
    assert delta == pytest.approx(best, rel=0.06)  # half the spacing of the grid
    step = 1e-4  # and there the exact evidence is flat
    slope = (p.evidence(delta * math.exp(step)) - p.evidence(delta * math.exp(-step))) / (2 * step)
    assert abs(slope) < 1e-5


def test_temperature_and_batches_change_what_they_should() -> None:
    p = Problem()
    p.go_to_mode(1.0)
    fixed = replace(SETTINGS["full"], prior="fixed")
    whole = fixed.fit(p.job)[0].output_covariance(
        {KEY: torch.eye(OUT * RANK).double().view(1, -1, OUT, RANK)}
    )
    one_by_one = replace(fixed, tokens=1).fit(p.job)[0]
    same = one_by_one.output_covariance({KEY: torch.eye(OUT * RANK).double().view(1, -1, OUT, RANK)})
    assert (whole - same).abs().max() < 1e-12
    cold = replace(fixed, temperature=0.5, prior_precision=2.0).fit(p.job)[0]  # 2 H + 2: half the variance
    found = cold.output_covariance({KEY: torch.eye(OUT * RANK).double().view(1, -1, OUT, RANK)})
    assert (whole / 2 - found).abs().max() < 1e-12


def test_diagonal_is_the_diagonal_of_the_full_precision() -> None:
    p = Problem()
    p.go_to_mode(1.0)
    sigma = Laplace(structure="diagonal", over="B", prior="fixed").fit(p.job)[0].sigma()[KEY]  # type: ignore[attr-defined]
    expected = p.precision(1.0).diagonal().expand(OUT, RANK).rsqrt()
    assert torch.allclose(sigma.double(), expected, rtol=1e-6)


# -------------------------------------------------------------------------------------------------- matrices alone


def block(rank: int, size: int, kept: int, rest: float = 0.3) -> Kronecker:
    v = torch.linalg.qr(torch.randn(rank, rank).double()).Q
    u = torch.linalg.qr(torch.randn(size, size).double()).Q[:, :kept]
    s, q = torch.rand(rank).double() * 3, torch.rand(kept).double() * 4 + rest
    return Kronecker(v, s, u, q, torch.tensor(rest).double(), torch.tensor(0.7).double())


def dense(b: Kronecker) -> Tensor:
    size = b.shape[1]
    u = b.large_vectors
    large = (u * b.large_values) @ u.mT
    if u.shape[1] < size:
        large = large + b.rest * (torch.eye(size).double() - u @ u.mT)
    small = (b.small_vectors * b.small_values) @ b.small_vectors.mT
    return torch.kron(small, large) + b.delta * torch.eye(b.shape[0] * size).double()


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_low_rank_algebra_is_the_dense_one(kept: int) -> None:
    b, other = block(3, 6, kept), block(3, 6, min(kept + 1, 6))
    p = dense(b)
    inverse = torch.linalg.inv(p)
    j, x = torch.randn(2, 4, 3, 6).double(), torch.randn(3, 6).double()
    flat = j.flatten(2)
    assert (b.covariance(j) - flat @ inverse @ flat.mT).abs().max() < 1e-12
    assert b.log_det() == pytest.approx(float(torch.logdet(p)), rel=1e-12)
    assert b.square(x) == pytest.approx(float(x.flatten() @ p @ x.flatten()), rel=1e-12)
    assert (b.variance().flatten() - inverse.diagonal()).abs().max() < 1e-12
    root = torch.stack([b.root(e.view(3, 6)).flatten() for e in torch.eye(18).double()], 1).double()
    assert (root @ root.mT - inverse).abs().max() < 1e-6  # draws are fp32
    assert b.trace_under(other) == pytest.approx(float((dense(other) @ inverse).trace()), rel=1e-12)
    assert (dense(b.colder(3.0)) - 3 * p).abs().max() < 1e-12


def test_is_woodbury_with_its_inner_matrix() -> None:
    b = block(2, 5, 3, rest=0.0)
    x, small = b.large_vectors * b.large_values.sqrt(), b.small_vectors * b.small_values.sqrt()
    tau2 = 1 / float(b.delta)
    inner = torch.eye(6) + tau2 * torch.kron(small.mT @ small, x.mT @ x)
    j = torch.randn(1, 3, 2, 5).double()
    flat = j.flatten(2)
    through = flat @ torch.kron(small, x)
    expected = tau2 * flat @ flat.mT - tau2**2 * through @ torch.linalg.solve(inner, through.mT)
    assert (b.covariance(j) - expected).abs().max() < 1e-12
    log_det = -2 * 5 * math.log(tau2) + float(torch.logdet(inner))
    assert b.log_det() == pytest.approx(log_det, rel=1e-12)


def test_dense_block_is_its_matrix() -> None:
    a = torch.randn(5, 5).double()
    p, q = a @ a.mT + torch.eye(5), torch.eye(5).double() * 2 + 1
    b = Dense.of(p)
    j, x = torch.randn(2, 3, 5).double(), torch.randn(5).double()
    inverse = torch.linalg.inv(p)
    assert (b.covariance(j) - j @ inverse @ j.mT).abs().max() < 1e-12
    assert b.log_det() == pytest.approx(float(torch.logdet(p)))
    assert b.square(x) == pytest.approx(float(x @ p @ x))
    assert (b.variance() - inverse.diagonal()).abs().max() < 1e-12
    assert b.trace_under(Dense.of(q)) == pytest.approx(float((q @ inverse).trace()))
    root = torch.stack([b.root(e) for e in torch.eye(5).double()], 1).double()
    assert (root @ root.mT - inverse).abs().max() < 1e-6


@pytest.mark.parametrize(("rows", "size", "rank"), [(5, 12, 6), (300, 12, 12), (300, 200, 20), (200, 40, 8)])
def test_large_side_keeps_what_it_has_room_for(rows: int, size: int, rank: int) -> None:
    directions = min(rank, size)
    data = torch.randn(rows, directions).double() @ torch.randn(directions, size).double()
    held = LowRank(size, rank)
    for part in data.split(90):
        held.add(part)
    halves = LowRank(size, rank), LowRank(size, rank)
    for half, part in zip(halves, data.split(-(-rows // 2)), strict=True):
        half.add(part)
    halves[0].merge(halves[1])
    for found in (held, halves[0]):
        u, q, rest = found.factors()
        exact = data.mT @ data
        assert ((u * q) @ u.mT - exact).abs().max() < 1e-9 * exact.abs().max()
        assert rest * (size - len(q)) < 1e-9 * float(exact.trace())
        assert (u.mT @ u - torch.eye(len(q))).abs().max() < 1e-9


def test_large_side_beyond_its_room_keeps_the_trace_and_nearly_the_best_directions() -> None:
    data = torch.randn(600, 50).double() * torch.arange(1, 51).double().rsqrt()
    held = LowRank(50, 10)
    for part in data.split(70):
        held.add(part)
    u, q, rest = held.factors()
    exact = data.mT @ data
    assert float(q.sum()) + rest * 40 == pytest.approx(float(exact.trace()), rel=1e-12)
    best = torch.linalg.eigvalsh(exact)[-10:].sum()
    assert float((u.mT @ exact @ u).trace() / best) > 0.97


def test_best_delta_is_where_the_evidence_peaks() -> None:
    h = torch.tensor([0.0, 0.2, 3.0, 50.0]).double()
    spectrum = Spectrum(h, torch.tensor([2.0, 1, 3, 1]).double(), 1.7)
    delta = best_delta(spectrum)
    assert spectrum.effective(delta) == pytest.approx(delta * 1.7, rel=1e-10)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert spectrum.evidence(delta * factor) < spectrum.evidence(delta)
    dense_delta = best_deltas_dense(
        torch.diag(h.repeat_interleave(torch.tensor([2, 1, 3, 1]))),
        {"k": slice(0, 7)},
        {"k": 1.7},
        {"k": "all"},
    )
    assert dense_delta["k"] == pytest.approx(delta, rel=1e-6)
