"""BLoB: Bayesian LoRA by backpropagation, with one ELBO (Wang et al. 2024, arXiv 2406.11675).

    q(A) = prod_ij N(M_ij, Omega_ij^2),  Omega = G * G,   B certain,   p(A) = prod_ij N(0, sigma_p^2)
    minimise   E_q[ mean_i -log p(y_i | x_i, A, B) ]  +  KL(q || p) / N
    KL = sum_ij  log(sigma_p / Omega_ij) + (Omega_ij^2 + M_ij^2) / (2 sigma_p^2) - 1/2

M, G and B descend that one loss in one optimiser. With a prior that is degenerate in the same directions as q, the KL
between the laws of the whole update s B A is the same number, if B has full column rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ...compat.peft import lora_updates
from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict
from ..continual import start_from
from ..examples import Batch
from ..families.diagonal import DiagonalGaussian
from ..flipout import flipout, row_noise
from ..held_out import held_out_nll
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..per_row import A
from ..posterior import Origin, Posterior
from ..training import negative_log_likelihood, train


@dataclass(frozen=True)
class BLoB:
    """Trains the adapter as a diagonal Gaussian over A; B and what is not a plain LoRA linear layer stay certain.

    prior_sigma: sigma_p, of every element of A. init: G starts uniform in [init / sqrt(2), init], so sigma in
    [init^2 / 2, init^2]. samples: draws a step; each is one function a row (flipout). sigma_learning_rate: of G; None
    is what carries G from 0 to sqrt(sigma_p) twice over in the planned steps, 2 sqrt(sigma_p) / steps. kl_weight:
    multiplies the KL, 1 is the ELBO; below 1 is a colder posterior. cycle: None spreads the KL evenly; M steps weigh it
    by M 2^i / (2^(M+1) - 2), i = 1..M, in turn (mean 1), as the paper's code does, which is not one objective at any
    step and so off by default.

    Where `job.start` is a diagonal Gaussian over the A, it is where training starts and its law of A is the prior
    (continual learning); any other start is a start alone.

    When not to use it: with few examples and many weights the KL outweighs the likelihood: nearly all of A goes to the
    prior. Raise `prior_sigma` no further then, but lower the rank or kl_weight, or take a post-hoc method.
    """

    prior_sigma: float = 0.2
    init: float = 0.05
    samples: int = 1
    sigma_learning_rate: float | None = None
    kl_weight: float = 1.0
    cycle: int | None = None

    def __post_init__(self) -> None:
        for name in ("prior_sigma", "init"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"blob: {name} must be > 0, got {getattr(self, name)}")
        if self.kl_weight < 0:
            raise UserError(f"blob: kl_weight must be >= 0, got {self.kl_weight}")
        if self.samples < 1:
            raise UserError(f"blob: samples must be at least 1, got {self.samples}")
        if self.sigma_learning_rate is not None and not self.sigma_learning_rate > 0:
            raise UserError(f"blob: sigma_learning_rate must be > 0, got {self.sigma_learning_rate}")
        if self.cycle is not None and self.cycle < 1:
            raise UserError(f"blob: cycle must be at least 1 step, got {self.cycle}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        """report.details: elbo and nll (nats an example), kl (nats, of all weights), sigma (quantiles), prior. The nll
        is the mean over the last tenth of the steps, under q. UserError for an adapter without plain LoRA layers."""
        start_from(job)
        layers = noisy_layers(job.model, job.adapter)
        means = {name: layer.lora_A[job.adapter].weight for name, layer in layers.items()}
        prior, sigmas = self._prior(job, means)
        roots = {
            name: self._root(mean, job.seed + n) if sigmas is None else nn.Parameter(sigmas[name].sqrt())
            for n, (name, mean) in enumerate(means.items())
        }
        loss = _Elbo(self, job, means, roots, prior)
        trained = train(
            job, loss=loss, make_optimizer=lambda p, steps: self._optimizer(job, loss, p, steps),
            parameters=[*_parameters(job.model, job.adapter), *roots.values()], callbacks=[_Step(loss)], name="blob",
            method=self,
        )  # fmt: skip
        posterior = self._posterior(job, roots, zero_mean=sigmas is None)
        with torch.no_grad():
            kl = float(loss.kl())
        nll = loss.likelihood_part(trained.losses)
        sigma = torch.cat([v.view(-1) for v in posterior.sigma().values()]).numpy()
        details = {
            "elbo": -nll - self.kl_weight * kl / len(job.train), "nll": nll, "kl": kl, "kl_weight": self.kl_weight,
            "uncertain_weights": sigma.size, "prior": "N(0, prior_sigma^2)" if sigmas is None else "start",
            "sigma": {str(q): float(np.quantile(sigma, q)) for q in (0.1, 0.5, 0.9)},
        }  # fmt: skip
        return posterior, FitReport(
            "blob", posterior.family, len(job.train), trained.steps, trained.seconds,
            held_out_nll=held_out_nll(posterior, job), details=details,
        )  # fmt: skip

    def _root(self, weight: Tensor, seed: int) -> nn.Parameter:
        """G of one layer, fp32."""
        uniform = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        low = self.init / math.sqrt(2)
        return nn.Parameter((low + (self.init - low) * uniform).to(weight.device))

    def _prior(self, job: Job, means: Mapping[str, Tensor]) -> tuple[_Prior, dict[str, Tensor] | None]:
        """The prior, and sigma of the start where that is the prior."""
        start = job.start
        if not isinstance(start, DiagonalGaussian) or any(
            name + A not in start.uncertain() for name in means
        ):
            zero = torch.zeros(())
            return {name: (zero, torch.tensor(self.prior_sigma)) for name in means}, None
        mean, sigma = start.mean(), start.sigma()
        own = {name: (mean[name + A].to(a.device), sigma[name + A].to(a.device)) for name, a in means.items()}
        if any(bool((s == 0).any()) for _, s in own.values()):
            raise UserError(
                "blob: the start is certain of some elements of A: as a prior it would fix them for good"
            )
        return own, {name: s for name, (_, s) in own.items()}

    def _optimizer(
        self, job: Job, loss: _Elbo, parameters: list[nn.Parameter], steps: int
    ) -> torch.optim.Optimizer:
        """AdamW; weight decay is for what has no prior."""
        rate = self.sigma_learning_rate or 2 * math.sqrt(self.prior_sigma) / steps
        roots, means = {id(p) for p in loss.roots.values()}, {id(p) for p in loss.means.values()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) in roots], "lr": rate, "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) in means], "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) not in roots | means]},
        ]
        t = job.training
        return torch.optim.AdamW(groups, lr=t.learning_rate, weight_decay=t.weight_decay)

    def _posterior(self, job: Job, roots: Mapping[str, Tensor], zero_mean: bool) -> DiagonalGaussian:
        """zero_mean: of the prior; another than N(0, sigma_p^2) is not what an Origin can hold."""
        count = len(job.train)
        prior = {name + A: self.prior_sigma**-2 for name in roots} if zero_mean else {}
        origin = Origin(
            base_fingerprint(job.model), ess=count / self.kl_weight if self.kl_weight else None, data_size=count,
            prior=prior,
        )  # fmt: skip
        sigma = {name + A: root.detach().square() for name, root in roots.items()}
        mean = adapter_tensors(job.model, job.adapter)
        return DiagonalGaussian(peft_config_dict(job.model, job.adapter), mean, sigma, origin)


_Prior = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation by name of layer."""


class _Elbo:
    """The loss of a batch, and what it was made of."""

    def __init__(
        self,
        method: BLoB,
        job: Job,
        means: Mapping[str, Tensor],
        roots: Mapping[str, nn.Parameter],
        prior: _Prior,
    ) -> None:
        self.method, self.job, self.means, self.roots, self.prior = method, job, means, roots, prior
        self.shapes = {name: (root.shape[0], root.shape[1]) for name, root in roots.items()}
        self.step = 0
        self.divergences: list[float] = []
        """Weight times KL / N, by step."""

    def __call__(self, model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
        nll = torch.stack(
            [self._sampled(model, batch, likelihood, k) for k in range(self.method.samples)]
        ).mean()
        return nll + self._divergence()

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Step `step`, whether or not this process has examples of it."""
        self.step = step
        self.divergences[step:] = [float(self._divergence())]

    def _divergence(self) -> Tensor:
        return self._weight() * self.kl() / len(self.job.train)

    def likelihood_part(self, losses: Sequence[float]) -> float:
        """Mean over the last tenth of the steps of E_q[-log p(y | x)], nats an example."""
        last = max(1, len(losses) // 10)
        apart = zip(losses[-last:], self.divergences[-last:], strict=True)
        return sum(loss - divergence for loss, divergence in apart) / last

    def _sampled(self, model: PeftModel, batch: Batch, likelihood: Likelihood, draw: int) -> Tensor:
        noise = row_noise(self.shapes, batch.ids, self.job.seed, self.step, draw, batch.input_ids.device)
        sigma = {name: root.square() for name, root in self.roots.items()}
        with flipout(model, sigma, noise, self.job.adapter):
            return negative_log_likelihood(model, batch, likelihood)

    def kl(self) -> Tensor:
        """KL(q(A) || p(A)) of all layers, nats."""
        total = []
        for name, root in self.roots.items():
            (centre, scale), sigma = self.prior[name], root.square()
            apart = (sigma.square() + (self.means[name].float() - centre.to(sigma)).square()) / scale.to(
                sigma
            ).square()
            total.append((scale.to(sigma).log() - 2 * root.abs().log() + apart / 2 - 0.5).sum())
        return torch.stack(total).sum()

    def _weight(self) -> float:
        size = self.method.cycle
        if size is None:
            return self.method.kl_weight
        i = self.step % size + 1
        return self.method.kl_weight * size * 2.0 ** (i - size) / (2 - 2.0 ** (1 - size))


class _Step(TrainerCallback):
    """Tells the loss which optimiser step it is in, so that a resumed run draws what it would have drawn."""

    def __init__(self, loss: _Elbo) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.begin(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"divergences": list(self.loss.divergences)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.divergences = list(state["divergences"])


def noisy_layers(model: PeftModel, adapter: str) -> dict[str, Any]:
    """Plain LoRA linear layers of an adapter, by what their keys have before `.lora_A.weight`. UserError if none."""
    found: dict[str, Any] = {}

    def look(name: str, layer: Any) -> None:
        found[name] = layer

    with lora_updates(model, adapter, look):
        pass
    if not found:
        raise UserError(f"adapter {adapter!r} has no plain LoRA linear layer (DoRA and embeddings are not): no A to be "
                        "uncertain about")  # fmt: skip
    return found


def _parameters(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [p for p in adapter_tensors(model, adapter).values() if isinstance(p, nn.Parameter)]
