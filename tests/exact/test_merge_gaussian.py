"""Two Gaussian tasks: merged posteriors, and one task as the prior of the next, against all data at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear_parts import DOWN, UP, Linear, linear_model, rows, up_of
from vlm_reason.errors import UserError
from vlm_reason.weights import IVON, DiagonalGaussian, Job, Origin, Regression, Training
from vlm_reason.weights.adapter import base_fingerprint, peft_config_dict
from vlm_reason.weights.continual import prior_loss, prior_penalty, start_from, with_prior_precision
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.merging import merge
from vlm_reason.weights.methods.ivon import IVON as IVONMethod
from vlm_reason.weights.methods.map import MAP
from vlm_reason.weights.posterior import Posterior
from vlm_reason.weights.training import negative_log_likelihood, train

NOISE, PRIOR, FEATURES = 0.5, 3.0, 5


class Task:
    """Features at right angles, so that the posterior of a regression is diagonal: curvature h, data b = h theta."""

    def __init__(self, seed: int, size: int = 20) -> None:
        torch.manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(size, FEATURES, dtype=torch.float64))
        self.x = q * (0.5 + 3 * torch.rand(FEATURES, dtype=torch.float64))
        self.y = self.x @ torch.randn(FEATURES, dtype=torch.float64) + NOISE * torch.randn(size).double()
        self.h = self.x.square().sum(0) / NOISE**2
        self.b = self.x.T @ self.y / NOISE**2


def exact(
    tasks: list[Task], prior: float | Tensor = PRIOR, centre: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """(mean, precision) given all tasks."""
    precision = prior + sum(t.h for t in tasks)
    return (prior * centre + sum(t.b for t in tasks)) / precision, precision


def gaussian(mean: Tensor, precision: Tensor, prior: float = PRIOR, size: int = 20) -> DiagonalGaussian:
    origin = Origin(data_size=size, ess=float(size), prior={"w": prior} if prior else {})
    return DiagonalGaussian({}, {"w": mean}, {"w": precision.rsqrt()}, origin)


def posterior_of(task: Task) -> DiagonalGaussian:
    return gaussian(*exact([task]))


def close(found: Posterior, expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found.mean()["w"], expected[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.precision_diag()["w"], expected[1].float(), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------- merge


def test_two_tasks_give_the_joint_posterior() -> None:
    a, b = Task(0), Task(1)
    merged, report = merge([posterior_of(a), posterior_of(b)])
    close(merged, exact([a, b]))
    assert (report.tasks, report.space, report.alignment, dict(report.kept)) == (2, "parameters", None, {})
    assert (merged.origin.data_size, merged.origin.ess, merged.origin.prior) == (40, 40.0, {"w": PRIOR})
    close(posterior_of(a).merge([posterior_of(b), posterior_of(Task(2))]), exact([a, b, Task(2)]))
    close(merge([merged, posterior_of(Task(2))])[0], exact([a, b, Task(2)]))  # in any grouping
    average = (posterior_of(a).mean()["w"] + posterior_of(b).mean()["w"]) / 2
    assert float((average - merged.mean()["w"]).abs().max()) > 0.05  # not what a plain mean gives


def test_a_base_posterior_as_the_prior() -> None:
    old, a, b = Task(3), Task(0), Task(1)
    base = posterior_of(old)
    tasks = [gaussian(*exact([old, t]), prior=0.0) for t in (a, b)]
    merged, _ = merge(tasks, base=base)
    close(merged, exact([old, a, b]))


def test_weights_of_tasks_and_another_prior() -> None:
    """alpha_t counts task t's data alpha_t times; a task's prior is taken out before delta0 comes in."""
    a, b = Task(0), Task(1)
    pa, pb = posterior_of(a), posterior_of(b)
    merged, _ = merge([pa, pb], alphas=[0.5, 2.0], delta0=7.0)
    precision = 7.0 + 0.5 * a.h + 2 * b.h
    close(merged, ((0.5 * a.b + 2 * b.b) / precision, precision))
    flat = [gaussian(t.b / t.h, t.h, prior=0.0) for t in (a, b)]
    close(merge(flat)[0], ((a.b + b.b) / (a.h + b.h), a.h + b.h))
    other = gaussian(*exact([b], 1.0), prior=1.0)
    between, report = merge([pa, other])  # the mean of the two priors, each taken out of its own task
    close(between, ((a.b + b.b) / (2.0 + a.h + b.h), 2.0 + a.h + b.h))
    assert report.prior == (2.0, 2.0)
    close(merge([pa, other], delta0=PRIOR)[0], exact([a, b]))


def test_tempering_before_is_tempering_afterwards() -> None:
    """q^tau of each, P = tau (h + delta), is exp(-tau (data + prior)): together tau (delta + h_a + h_b), at the joint
    mean. Other taus weigh the data: delta + tau_a h_a + tau_b h_b about (tau_a b_a + tau_b b_b) / that."""
    a, b, old = Task(0), Task(1), Task(3)
    pa, pb, base = posterior_of(a), posterior_of(b), posterior_of(old)
    mean, precision = exact([a, b])
    merged, report = merge([pa.temper(2), pb.temper(2)])
    close(merged, (mean, 2 * precision))
    assert merged.origin == merge([pa, pb])[0].temper(2).origin and report.prior == (PRIOR, PRIOR)
    seven = 2 * (7.0 + a.h + b.h)
    close(merge([pa.temper(2), pb.temper(2)], delta0=7.0)[0], (2 * (a.b + b.b) / seven, seven))
    twice = PRIOR + 2 * a.h + b.h
    close(merge([pa.temper(2), pb])[0], ((2 * a.b + b.b) / twice, twice))
    tasks = [gaussian(*exact([old, t]), prior=0.0).temper(2) for t in (a, b)]
    mean, precision = exact([old, a, b])
    close(merge(tasks, base=base)[0], (mean, 2 * precision))


# ----------------------------------------------------------------------------------------- yesterday's posterior today


def test_map_with_the_start_as_prior(tasks: list[Task]) -> None:
    """Trained hard on the new data alone it forgets the old; with the start as its prior it is near the joint mean."""
    old, new = tasks
    joint, precision = exact(tasks)

    def off(prior: Any) -> float:
        """In posterior standard deviations, as a function of x: A may move too."""
        first = job_of(new)
        start = start_of(first, old)
        start = DiagonalGaussian(
            start.adapter_config, start.mean(), {**start.sigma(), DOWN: torch.full((FEATURES, FEATURES), 1e-3)},
            start.origin,
        )  # fmt: skip
        job = replace(job_of(new, epochs=150.0, learning_rate=0.03), model=first.model, start=start)
        mean = MAP(prior=prior).fit(job)[0].mean()
        return float((((mean[UP] @ mean[DOWN])[0].double() - joint) * precision.sqrt()).abs().max())

    assert off("start") < 0.2 and off("flat") > 2


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [Task(5), Task(6)]


def job_of(task: Task, start: Posterior | None = None, **training: Any) -> Job:
    model = linear_model(task.x.float(), 1)
    settings = Training(batch_size=20, schedule="constant", warmup_share=0.0, max_grad_norm=0.0, **training)
    likelihood = Linear(Regression(torch.zeros(1), NOISE))
    return Job(model, rows(task.y.float()), likelihood, settings, start=start)


def start_of(job: Job, task: Task) -> DiagonalGaussian:
    mean, precision = exact([task])
    return DiagonalGaussian(
        peft_config_dict(job.model, "default"),
        {DOWN: torch.eye(FEATURES), UP: mean[None]},
        {UP: precision.rsqrt()[None]},
        Origin(base_fingerprint(job.model), data_size=20, prior={UP: PRIOR}),
    )


def test_the_penalised_loss_has_the_joint_mode(tasks: list[Task]) -> None:
    """N times its gradient is that of -log p(theta | old and new data) at any theta, so it is 0 at the joint mean."""
    old, new = tasks
    job = job_of(new)
    loss = prior_penalty(start_of(job, old), len(job.train))
    mean, precision = exact(tasks)
    batch = make_batch(job.train)
    weight = up_of(job.model)
    for shift in (0.0, 0.3):
        with torch.no_grad():
            weight.copy_(mean[None] + shift)
        weight.grad = None
        loss(job.model, batch, job.likelihood).backward()
        assert weight.grad is not None
        torch.testing.assert_close(20 * weight.grad[0], (precision * shift).float(), atol=2e-3, rtol=1e-4)


def test_trained_in_sequence_is_trained_jointly(tasks: list[Task]) -> None:
    old, new = tasks
    first = job_of(new)
    job = replace(job_of(new, epochs=80.0), model=first.model, start=start_of(first, old))
    start_from(job)
    torch.testing.assert_close(up_of(job.model).detach()[0], exact([old])[0].float())
    train(
        job, loss=prior_loss(job), parameters=[up_of(job.model)],
        make_optimizer=lambda p, steps: torch.optim.SGD(p, 0.4, momentum=0.45),
    )  # fmt: skip
    torch.testing.assert_close(up_of(job.model).detach()[0], exact(tasks)[0].float(), atol=1e-4, rtol=1e-4)
    alone = DiagonalGaussian(
        peft_config_dict(job.model, "default"), {DOWN: torch.eye(FEATURES), UP: up_of(job.model)},
        {UP: (new.h + PRIOR).rsqrt()[None]}, replace(start_of(first, old).origin),
    )  # fmt: skip
    whole = with_prior_precision(alone, job.start)
    torch.testing.assert_close(whole.precision_diag()[UP][0], exact(tasks)[1].float(), rtol=1e-5, atol=0)
    assert with_prior_precision(alone, None) is alone


def test_ivon_with_the_penalty_finds_the_joint_posterior(tasks: list[Task]) -> None:
    """Without weight decay and with lambda = N the penalty is all of its prior."""
    old, new = tasks
    job = job_of(new)
    loss = prior_penalty(start_of(job, old), len(job.train))
    weight = up_of(job.model)
    with torch.no_grad():
        weight.copy_(exact([old])[0][None])
    optimizer = IVON([weight], 0.05, 20.0, hess_init=2.0, beta2=0.995, weight_decay=0.0, data_size=20)
    batch, means, precisions = make_batch(job.train), [], []
    for step in range(1100):
        optimizer.zero_grad()
        loss(job.model, batch, job.likelihood).backward()
        optimizer.step()
        if step >= 300:
            means.append(optimizer.state[weight]["mean"][0].clone())
        if step >= 300 and step % 20 == 0:
            precisions.append(Posterior.from_optimizer(optimizer, job.model).precision_diag()[UP][0])
    mean, precision = exact(tasks)
    apart = (torch.stack(means).mean(0) - mean) * precision.sqrt()
    assert float(apart.abs().max()) < 0.12  # of a posterior standard deviation
    assert float((torch.stack(precisions).mean(0) / precision - 1).abs().max()) < 0.1


def test_the_method_ivon_with_the_start_as_prior(tasks: list[Task]) -> None:
    job = job_of(tasks[0], epochs=1.0)
    job = replace(job, start=start_of(job, tasks[1]))
    group = IVONMethod(prior="start").optimizer(job, [up_of(job.model)], 10).param_groups[0]
    assert (group["weight_decay"], group["ess"]) == (0.0, 20.0)  # the penalty is all of the prior
    assert IVONMethod().optimizer(job, [up_of(job.model)], 10).param_groups[0]["weight_decay"] == 1e-4
    assert IVONMethod(prior="start").fit(job)[1].steps == 1


def test_what_is_no_prior(tasks: list[Task]) -> None:
    job = job_of(tasks[0])
    start = start_of(job, tasks[1])
    point = DiagonalGaussian(start.adapter_config, start.mean(), {}, start.origin)
    assert prior_loss(job, "flat") is negative_log_likelihood
    for wrong, words in ((job, "there is none"), (replace(job, start=point), "certain of all weights")):
        with pytest.raises(UserError, match=words):
            prior_loss(wrong)
    with pytest.raises(UserError, match="3 weights of .* are certain in the prior"):
        prior_penalty(start.prune(0.6), 20)
    with pytest.raises(UserError, match="at least 1, got 0"):
        prior_penalty(start, 0)


def test_the_prior_of_a_tempered_posterior_is_tempered_too() -> None:
    """A posterior N(0, 1 / (h + 2)) tempered by 2 has curvature 2 h: its prior's precision is 4 by then."""
    h = torch.tensor([2.0, 14.0, 23.0])
    zero = {"a": torch.zeros(3)}
    new = DiagonalGaussian({}, zero, {"a": (h + 2).rsqrt()}, Origin(prior={"a": 2.0}))
    old = DiagonalGaussian({}, zero, {"a": torch.ones(3)}, Origin())
    whole = with_prior_precision(new.temper(2), old)
    torch.testing.assert_close(whole.precision_diag()["a"], 2 * h + 1)
