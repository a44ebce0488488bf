"""Variational Bayesian last layers (Harrison, Willes and Snoek 2024, "Variational Bayesian Last Layers", arXiv
2404.11599), on the last-token feature of a language model:

    maximise   mean_n E_q log p(y_n | offset_n + w . phi_n) - KL(q(w) || p(w)) / N,      w_c ~ N(mu_c, S_c)

post_hoc: the model as it is; every example goes through it once, and the head is fitted on what comes out. joint:
adapter and head are trained together on the same bound.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict
from ..continual import check_not_scaled, start_from
from ..examples import Batch, make_batch
from ..families.last_layer import LastLayer, kind_of
from ..heads import (
    ClassificationTask,
    Data,
    FeatureMap,
    Fitted,
    Head,
    HeadSettings,
    RegressionTask,
    RewardTask,
    Task,
    elbo,
    fit_density,
    fit_head,
    make_map,
)
from ..heads.backbone import Backbone, States, states, targets_of
from ..heads.classification import Normals
from ..heads.features import check_projection
from ..heads.fit import elbo_of
from ..job import FitReport, Job
from ..likelihoods import Choice, Likelihood, Regression
from ..posterior import Origin, Posterior
from ..training import train


@dataclass(frozen=True)
class VBLL:
    """mode         post_hoc: backbone frozen, at job.start's mean where there is one; joint: with the adapter
    covariance   of each row of the head: diagonal | low_rank (with `rank`) | full; shared: one S for all rows
    projection   of the hidden state to `features` directions: pca | random | none
    offset       model: w is a correction to the model's own head, so that predictions start as the model's;
                 zero: the head replaces it, and starts near it
    bound        monte_carlo (quadrature for two classes) | jensen, of a classification; bound_draws of the former
    prior_scale  s of the prior N(0, s^2 I), about the standard deviation of f; learn_prior: s moves to its best (null:
                 of a regression alone)
    learn_noise  of a regression; else the likelihood's
    steps, batch_size, learning_rate   of Adam on features (post_hoc); learning_rate is also the head's in joint mode

    When not to use it: see LastLayer. Where features separate the training data (an adapter trained to the end on
    them), the head sees no errors and stays sure: fit it on held-out data or on the untrained base then.
    """

    mode: Literal["post_hoc", "joint"] = "post_hoc"
    covariance: str = "full"
    rank: int = 8
    shared: bool = False
    projection: str = "pca"
    features: int = 256
    offset: Literal["model", "zero"] = "model"
    bound: str = "monte_carlo"
    bound_draws: int = 8
    prior_scale: float = 3.0
    learn_prior: bool | None = None
    learn_noise: bool = True
    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("post_hoc", "joint")), ("offset", ("model", "zero"))):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"vbll: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        check_projection(self.projection, self.features)
        ClassificationTask(2, self.bound, self.bound_draws)
        self.head_settings(None)

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        """UserError for a likelihood without one target an example, and for what a last layer cannot be fitted on."""
        kind_of(job.likelihood)
        check_not_scaled(job, "vbll")
        start_from(job)
        began = time.perf_counter()
        backbone = Backbone(job.model, job.likelihood)
        found = backbone.states_of(job.train)
        feature_map = self.map_for(found, job)
        data = self.data(found, feature_map, targets_of(job.train), job.likelihood)
        task = self.task(job.likelihood)
        forward = time.perf_counter() - began
        settings = self.head_settings(job.likelihood)
        if self.mode == "joint":
            head, fitted = fit_head(task, data, replace(settings, steps=0), job.seed)
            steps = self._train_with_adapter(job, task, head, feature_map)
            found = Backbone(job.model, job.likelihood).states_of(job.train)
            data = self.data(found, feature_map, data.target, job.likelihood)
        else:
            head, fitted = fit_head(task, data, settings, job.seed)
            steps = fitted.steps
        posterior = self._posterior(job, head, feature_map, data)
        details = _details(task, head, data, fitted, forward, job.seed)
        return posterior, FitReport(
            "vbll", posterior.family, len(job.train), steps, time.perf_counter() - began,
            _train_nll(posterior, data, job), _held_out_nll(posterior, job), details,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------- what is fitted

    def task(self, likelihood: Likelihood) -> Task:
        if isinstance(likelihood, Choice):
            return ClassificationTask(len(likelihood.label_ids), self.bound, self.bound_draws)
        return RegressionTask() if isinstance(likelihood, Regression) else RewardTask()

    def head_settings(self, likelihood: Likelihood | None) -> HeadSettings:
        given = isinstance(likelihood, Regression) and not self.learn_noise
        noise = likelihood.noise**2 if isinstance(likelihood, Regression) and given else None
        return HeadSettings(
            self.covariance, self.rank, self.shared, self.prior_scale, self.learn_prior, noise, self.steps,
            self.batch_size, self.learning_rate,
        )  # fmt: skip

    def map_for(self, found: States, job: Job) -> FeatureMap:
        """Made for all sequences of the training data, both halves of pairs."""
        both = found.hidden if found.rejected is None else torch.cat([found.hidden, found.rejected])
        return make_map(both, self.projection, self.features, found.rejected is None, job.seed)

    def data(self, found: States, feature_map: FeatureMap, target: Tensor, likelihood: Likelihood) -> Data:
        """What `fit_head` takes; with gradient where `found` has one."""
        phi = feature_map(found.hidden)
        if found.rejected is not None:
            phi = phi - feature_map(found.rejected)
        own = found.outputs.float()
        offset = own if self.offset == "model" else torch.zeros_like(own)
        if isinstance(likelihood, Choice):
            target = target.long()
        elif isinstance(likelihood, Regression):
            target = target.to(own)[:, None]
        return Data(phi, offset, target, None if self.offset == "model" else own.detach())

    # -------------------------------------------------------------------------------------------------- joint mode

    def _train_with_adapter(self, job: Job, task: Task, head: Head, feature_map: FeatureMap) -> int:
        count = len(job.train)
        device = next(job.model.parameters()).device
        head.to(device), feature_map.to(device)
        clock, learns_prior = _Clock(), self.head_settings(job.likelihood).learns_prior(task)
        own = [p for n, p in head.named_parameters() if n != "log_noise" or self.learn_noise]
        adapter = cast("list[nn.Parameter]", list(adapter_tensors(job.model, job.adapter).values()))

        def loss(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
            data = self.data(states(model, batch, likelihood), feature_map, batch.target, likelihood)
            normals = _normals_of(job.seed, clock.step, batch.ids)
            return -elbo(task, head, data, count, learns_prior, normals)

        def make_optimizer(parameters: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
            mine = {id(p) for p in own}
            t = job.training
            theirs = [p for p in parameters if id(p) not in mine]
            return torch.optim.AdamW(
                [
                    {"params": theirs, "lr": t.learning_rate, "weight_decay": t.weight_decay},
                    {"params": own, "lr": self.learning_rate, "weight_decay": 0.0},
                ]
            )

        trained = train(
            job, loss=loss, make_optimizer=make_optimizer, parameters=[*adapter, *own], callbacks=[clock],
            name="vbll", method=self,
        )  # fmt: skip
        head.cpu(), feature_map.cpu()
        if learns_prior:
            head.prior_variance.fill_(head.closest_prior())
        return trained.steps

    def _posterior(self, job: Job, head: Head, feature_map: FeatureMap, data: Data) -> LastLayer:
        labels: Sequence[int] = job.likelihood.label_ids if isinstance(job.likelihood, Choice) else ()
        origin = Origin(base_fingerprint(job.model), data_size=len(job.train))
        return LastLayer(
            peft_config_dict(job.model, job.adapter), adapter_tensors(job.model, job.adapter), head, feature_map,
            fit_density(data.phi), kind_of(job.likelihood), self.offset == "model", labels, origin,
        )  # fmt: skip


class _Clock(TrainerCallback):
    """The number of the optimiser step, also after a resume: what noise is seeded by."""

    step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def _normals_of(seed: int, step: int, ids: Sequence[str]) -> Normals:
    """[K, B, C], those of an example its own, whatever it shares a batch with."""

    def normals(shape: tuple[int, ...]) -> Tensor:
        rows = []
        for name in ids:
            digest = hashlib.blake2b(f"vbll\x1f{seed}\x1f{step}\x1f{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            rows.append(torch.randn(shape[0], shape[2], generator=generator))
        return torch.stack(rows, 1)

    return normals


@torch.no_grad()
def _train_nll(posterior: LastLayer, data: Data, job: Job) -> float:
    """-mean log p(y) at the mean of the head."""
    f = data.offset + posterior.head.moments(data.phi)[0]
    return float(-posterior.with_noise(job.likelihood).log_prob(f, make_batch(job.train)).mean())


def _held_out_nll(posterior: LastLayer, job: Job) -> float | None:
    """Of the predictive in closed form, nats an example."""
    if not job.held_out:
        return None
    found = posterior.predictive(job.model, job.held_out, job.likelihood, seed=job.seed, adapter=job.adapter)
    assert found.log_prob is not None
    return -float(found.log_prob.mean())


@torch.no_grad()
def _details(task: Task, head: Head, data: Data, fitted: Fitted, forward: float, seed: int) -> dict[str, Any]:
    """elbo: nats an example, of the head as it is returned."""
    details = {
        "elbo_start": fitted.elbo_start, "elbo": elbo_of(task, head, data, False, seed), "features": head.features,
        "prior_scale": float(head.prior_variance) ** 0.5, "seconds_features": forward,
        "seconds_head": fitted.seconds,
    }  # fmt: skip
    if head.log_noise is not None:
        details["noise"] = [float(x) for x in (head.log_noise / 2).exp()]
    return details
