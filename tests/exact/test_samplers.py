"""Chains against the laws they sample: quadratics, where the law of the discrete chain too is known."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.chain_parts import Stopped, same_trees, state_of, stop_after, tiny_job
from vlm_reason.errors import UserError
from vlm_reason.weights import METHODS
from vlm_reason.weights.chains import evenly, in_cycles
from vlm_reason.weights.families.particles import Particles, weighted_mean
from vlm_reason.weights.noise import TRAINING, Draw
from vlm_reason.weights.samplers import SGHMC, SGLD, CyclicalSchedule, EntropyMCMC, Langevin

N, PRIOR, T = 50, 10.0, 0.7
CURVATURES = (0.5, 1.0, 2.0)


def moments(make: Any, lr: float, steps: int, burn_in: int, width: int = 3000, **keys: Any) -> Tensor:
    """[curvatures, 2, 2]: second moments of (theta, theta_a or momentum) on l = sum_i c_i theta_i^2 / 2."""
    c = torch.tensor(CURVATURES).repeat_interleave(width)
    p = torch.zeros(len(c), requires_grad=True)
    chain = make([p], lr=lr, data_size=N, prior_precision=PRIOR, temperature=T, seed=5, **keys)
    total = torch.zeros(len(CURVATURES), 2, 2, dtype=torch.float64)
    for step in range(steps):
        p.grad = c * p.detach()
        chain.step()
        if step >= burn_in and step % 5 == 0:
            other = next(iter(chain.state[p].values()), p.detach())
            pair = torch.stack([p.detach(), other]).view(2, len(CURVATURES), width).double()
            total += torch.einsum("icw,jcw->cij", pair, pair) / width
    return total / len(range(burn_in + (-burn_in) % 5, steps, 5))


def stationary(transition: Tensor, noise: Tensor) -> Tensor:
    """S = F S F^T + Q, solved as a linear system."""
    size = len(transition)
    system = torch.eye(size * size, dtype=torch.float64) - torch.kron(transition, transition)
    return torch.linalg.solve(system, noise.flatten()).view(size, size)


# ---------------------------------------------------------------------------------------------- stationary laws


def test_sgld_has_the_posterior_s_variance_and_that_of_its_discrete_chain() -> None:
    lr = 0.03
    found = moments(SGLD, lr, 2500, 500)[:, 0, 0]
    for c, variance in zip(CURVATURES, found.tolist(), strict=True):
        h = c + PRIOR / N
        assert variance == pytest.approx(T / (N * h), rel=0.05)
        assert variance == pytest.approx(T / (N * h) / (1 - lr * h / 2), rel=0.01)


def test_sghmc_has_the_posterior_s_variance_and_that_of_its_discrete_chain() -> None:
    lr, a = 0.004, 0.1
    found = moments(SGHMC, lr, 3000, 800, friction=a)
    for c, pair in zip(CURVATURES, found, strict=True):
        h = c + PRIOR / N
        assert float(pair[0, 0]) == pytest.approx(T / (N * h), rel=0.05)
        # v' = (1 - a) v - lr h theta + xi, theta' = theta + v'
        f = torch.tensor([[1 - lr * h, 1 - a], [-lr * h, 1 - a]], dtype=torch.float64)
        q = torch.full((2, 2), 2 * a * lr * T / N, dtype=torch.float64)
        exact = stationary(f, q)
        assert float(pair[0, 0]) == pytest.approx(float(exact[0, 0]), rel=0.02)
        assert float(pair[1, 1]) == pytest.approx(float(exact[1, 1]), rel=0.02)


def test_entropy_mcmc_has_the_joint_gaussian() -> None:
    lr, eta = 0.05, 0.02
    found = moments(EntropyMCMC, lr, 2500, 500, eta=eta)
    for c, pair in zip(CURVATURES, found, strict=True):
        h = N * c + PRIOR
        closed = T * torch.tensor([[1 / h, 1 / h], [1 / h, 1 / h + eta]], dtype=torch.float64)
        precision = torch.tensor([[h + 1 / eta, -1 / eta], [-1 / eta, 1 / eta]], dtype=torch.float64) / T
        assert torch.allclose(closed, torch.linalg.inv(precision))
        f = torch.eye(2, dtype=torch.float64) - lr / N * T * precision
        exact = stationary(f, torch.eye(2, dtype=torch.float64) * 2 * lr * T / N)
        assert torch.allclose(pair, closed, rtol=0.08) and torch.allclose(pair, exact, rtol=0.015)
    fine = moments(EntropyMCMC, 0.02, 4000, 1000, eta=eta, width=1500)
    for c, pair in zip(CURVATURES, fine, strict=True):
        h = N * c + PRIOR
        closed = T * torch.tensor([[1 / h, 1 / h], [1 / h, 1 / h + eta]], dtype=torch.float64)
        assert torch.allclose(pair, closed, rtol=0.05)


# ------------------------------------------------------------------------------------------------------- the steps


def test_a_step_is_the_equation() -> None:
    torch.manual_seed(0)
    lr, eta, a = 0.1, 0.3, 0.2
    start, gradient = torch.randn(70_000), torch.randn(70_000)
    g = gradient + PRIOR / N * start
    z = [_noise(11, step, draw, 70_000) for step, draw in ((0, 0), (0, 1), (1, 0), (1, 1))]
    s = math.sqrt(2 * lr * T / N)
    common: dict[str, Any] = dict(lr=lr, data_size=N, prior_precision=PRIOR, temperature=T, seed=11)

    theta = _after([start], [gradient], SGLD, 1, **common)[0]
    torch.testing.assert_close(theta, start - lr * g + s * z[0])

    v = -lr * g + s * math.sqrt(a) * z[0]
    once = start + v
    v = (1 - a) * v - lr * (gradient + PRIOR / N * once) + s * math.sqrt(a) * z[2]
    theta = _after([start], [gradient], SGHMC, 2, friction=a, **common)[0]
    torch.testing.assert_close(theta, once + v)

    theta, guide = start - lr * g + s * z[0], start + s * z[1]
    pull = lr / (N * eta) * (theta - guide)
    theta, guide = (
        theta - lr * (gradient + PRIOR / N * theta) - pull + s * z[2],
        guide + pull + s * z[3],
    )
    p = start.clone().requires_grad_()
    chain = EntropyMCMC([p], eta=eta, **common)
    assert torch.equal(chain.guides()[p], start)
    for _ in range(2):
        p.grad = gradient
        chain.step()
    torch.testing.assert_close(p.detach(), theta)
    torch.testing.assert_close(chain.guides()[p], guide)


def _noise(seed: int, step: int, draw: int, size: int) -> Tensor:
    own = Draw(seed, TRAINING, step, draw)
    cpu = torch.device("cpu")
    return torch.cat([own.normal(0, 65_536, cpu), own.normal(1, size - 65_536, cpu)])


def _after(values: list[Tensor], gradients: list[Tensor], kind: Any, steps: int, **keys: Any) -> list[Tensor]:
    parameters = [v.clone().requires_grad_() for v in values]
    chain = kind(parameters, **keys)
    for _ in range(steps):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        chain.step()
    return [p.detach() for p in parameters]


def test_without_temperature_they_are_sgd() -> None:
    torch.manual_seed(0)
    values, gradients = [torch.randn(5), torch.randn(2, 3)], [torch.randn(5), torch.randn(2, 3)]
    cold: dict[str, Any] = dict(lr=0.1, data_size=N, prior_precision=PRIOR, temperature=0.0)
    decay = PRIOR / N
    for ours, theirs in (
        (_after(values, gradients, SGLD, 4, **cold), dict(momentum=0.0)),
        (_after(values, gradients, SGHMC, 4, friction=0.2, **cold), dict(momentum=0.8)),
    ):
        expected = _after(values, gradients, torch.optim.SGD, 4, lr=0.1, weight_decay=decay, **theirs)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_noise_belongs_to_places_not_to_tensors_or_groups() -> None:
    flat = torch.linspace(-1, 1, 140_000)
    keys: dict[str, Any] = dict(lr=0.1, data_size=N, eta=1.0)
    (whole,) = _after([flat], [flat], EntropyMCMC, 3, **keys)
    parts = list(flat.split([60_000, 79_000, 1_000]))
    assert torch.equal(torch.cat(_after(parts, parts, EntropyMCMC, 3, **keys)), whole)
    p = [v.clone().requires_grad_() for v in parts]
    groups = EntropyMCMC([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}], **keys)
    for _ in range(3):
        for own, g in zip(p, parts, strict=True):
            own.grad = g
        groups.step()
    assert torch.equal(torch.cat([own.detach() for own in p]), whole)


@pytest.mark.parametrize("kind", [SGLD, SGHMC, EntropyMCMC])
def test_resuming_is_exact_and_parameters_without_a_gradient_stay(kind: Any) -> None:
    keys: dict[str, Any] = dict(lr=0.01, data_size=N, seed=4, **({"eta": 1.0} if kind is EntropyMCMC else {}))
    p, idle = torch.ones(9, requires_grad=True), torch.ones(2, requires_grad=True)
    chain = kind([p, idle], **keys)

    def go(chain: Langevin, p: Tensor, steps: int) -> None:
        for _ in range(steps):
            p.grad = p.detach() ** 3
            chain.step()

    go(chain, p, 5)
    q = p.detach().clone().requires_grad_()
    resumed = kind([q, idle], **{**keys, "seed": 0})
    resumed.load_state_dict(copy.deepcopy(chain.state_dict()))
    go(chain, p, 5)
    go(resumed, q, 5)
    assert torch.equal(p, q) and torch.equal(idle, torch.ones(2))
    other = torch.ones(9, requires_grad=True)
    go(kind([other], **{**keys, "seed": 5}), other, 10)
    assert not torch.equal(other, p)


def test_wrong_settings_are_refused() -> None:
    p = [torch.ones(3, requires_grad=True)]
    for keys, said in (
        (dict(lr=-1.0, data_size=5), "lr must be at least 0, got -1"),
        (dict(lr=1.0, data_size=0), "data_size must be at least 1, got 0"),
        (dict(lr=1.0, data_size=5, temperature=math.nan), "temperature must be at least 0, got nan"),
        (dict(lr=1.0, data_size=5, friction=0.0), "friction must be above 0"),
    ):
        with pytest.raises(UserError, match=said):
            SGHMC(p, **keys)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="below data_size \\* eta = 0.5"):
        EntropyMCMC(p, lr=0.5, data_size=5, eta=0.1)
    with pytest.raises(UserError, match="bfloat16"):
        SGLD([torch.ones(3, dtype=torch.bfloat16, requires_grad=True)], lr=0.1, data_size=5)


# ---------------------------------------------------------------------------------------------------- the schedule


def test_cyclical_schedule_is_the_paper_s() -> None:
    schedule = CyclicalSchedule(lr=0.4, temperature=0.3, steps=22, cycles=4, exploration=0.5)
    assert schedule.length == 6
    for k in range(1, 23):  # the paper counts from 1
        rate = 0.4 / 2 * (math.cos(math.pi * ((k - 1) % 6) / 6) + 1)
        found = schedule.at(k - 1)
        assert found["lr"] == pytest.approx(rate)
        assert found["temperature"] == (0.3 if (k - 1) % 6 >= 3 else 0.0)
    assert in_cycles(schedule, 8) == [5, 6, 11, 12, 17, 18, 22]  # the last cycle has one sampling step
    assert in_cycles(schedule, 3) == [12, 18, 22]
    assert evenly(10, 20, 5) == [12, 14, 16, 18, 20] and evenly(3, 5, 9) == [4, 5]
    with pytest.raises(UserError, match="from 1 to the number of steps, 3, got 4"):
        CyclicalSchedule(0.1, 1.0, 3, 4)


# ------------------------------------------------------------------------------------------------------ as methods

CHAINS: list[tuple[str, dict[str, Any]]] = [
    ("langevin", {"kind": "cyclical", "particles": 4, "cycles": 2, "exploration": 0.5}),
    ("entropy_mcmc", {"particles": 2, "cycles": 1}),
]


@pytest.mark.parametrize(("name", "settings"), CHAINS)
def test_a_chain_stopped_and_started_again_gives_the_same_particles(
    name: str, settings: dict[str, Any], tiny_llama: Any, tmp_path: Path
) -> None:
    method = METHODS[name](**settings)
    straight, report = method.fit(tiny_job(copy.deepcopy(tiny_llama), 2))
    assert isinstance(straight, Particles) and len(straight) == 4 == report.details["particles"]
    stopped = tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path)
    stop_after(7)
    with pytest.raises(Stopped):
        method.fit(stopped)
    again, _ = method.fit(tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path))
    assert isinstance(again, Particles) and same_trees(again.trees(), straight.trees())
    assert len(straight.uncertain()) == len(straight.mean())
    read_back = tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path)
    stop_after(0)
    finished, _ = method.fit(read_back)
    assert isinstance(finished, Particles) and same_trees(finished.trees(), straight.trees())
    colder = METHODS[name](**settings, temperature=1e-9)
    with pytest.raises(UserError, match="choose another output_dir"):
        colder.fit(read_back)


def test_what_a_chain_keeps_is_the_chain(tiny_llama: Any) -> None:
    """At temperature 0 from burn-in 0 with every state kept: plain SGD, state by state; the model holds the mean."""
    method = METHODS["langevin"](
        temperature=0.0, prior_precision=0.0, burn_in=0.0, particles=6, learning_rate=0.05
    )
    job = tiny_job(copy.deepcopy(tiny_llama), epochs=1)
    posterior, report = method.fit(job)
    assert isinstance(posterior, Particles) and report.details["kept_after_steps"] == [1, 2, 3, 4, 5, 6]
    expected = weighted_mean(posterior.trees(), posterior.weights)
    assert same_trees([state_of(job)], [expected]) and same_trees([posterior.mean()], [expected])
    cyclical = METHODS["langevin"](kind="cyclical", cycles=2, exploration=0.0, particles=6)
    job = tiny_job(copy.deepcopy(tiny_llama), epochs=1)
    posterior, _ = cyclical.fit(job)
    assert isinstance(posterior, Particles)
    assert same_trees([state_of(job)], [posterior.trees()[-1]])
    job = tiny_job(copy.deepcopy(tiny_llama), epochs=1)
    both, _ = METHODS["entropy_mcmc"](
        cycles=1, particles=6, exploration=0.0, learning_rate=1e-3, temperature=0.0
    ).fit(job)
    assert isinstance(both, Particles) and len(both) == 12
    theta, guide = both.trees()[:2]  # without noise, after one step, the guide is still where it was
    start = state_of(tiny_job(copy.deepcopy(tiny_llama)))
    assert same_trees([guide], [start]) and not same_trees([theta], [start])


@pytest.mark.parametrize(("temperature", "precision"), [(0.25, 12.0), (1.0, 3.0), (0.0, None)])
@pytest.mark.parametrize("name", ["langevin", "entropy_mcmc"])
def test_the_prior_of_a_cold_chain_is_as_cold(
    name: str, temperature: float, precision: float | None, tiny_llama: Any
) -> None:
    """exp(-(N l + p |theta|^2 / 2) / T) has the prior N(0, T / p), as IVON's of lambda = N / T has."""
    method = METHODS[name](temperature=temperature, prior_precision=3.0, cycles=1, learning_rate=1e-3)
    posterior, _ = method.fit(tiny_job(tiny_llama, epochs=2))
    expected = {} if precision is None else dict.fromkeys(posterior.mean(), precision)
    assert posterior.origin.prior == expected


def test_methods_refuse_wrong_settings(tiny_llama: Any) -> None:
    for name, settings, said in (
        ("langevin", {"kind": "sghcm"}, "kind must be one of sgld, sghmc, cyclical, got 'sghcm'"),
        ("langevin", {"burn_in": 1.0}, "burn_in is a share of the steps"),
        ("langevin", {"particles": 0}, "particles must be >= 1, got 0"),
        ("langevin", {"cycles": 0}, "cycles must be from 1"),
        ("entropy_mcmc", {"eta": 0.0}, "eta must be > 0, got 0.0"),
        ("entropy_mcmc", {"learning_rate": -1.0}, "learning_rate must be > 0"),
    ):
        with pytest.raises(UserError, match=said):
            METHODS[name](**settings)
    with pytest.raises(UserError, match=r"lower lr or raise eta"):
        METHODS["entropy_mcmc"](learning_rate=1.0, eta=1e-3).fit(tiny_job(tiny_llama))
