"""Concrete dropout: masks whose probability is learnt, one a layer, through a smooth stand-in for the mask.

    minimise   mean_i -log p(y_i | z_i)  +  1 / lambda sum_layers [ l^2 |A|^2 / (2 (1 - p)) - K H(p) ]
    z = 1 - sigmoid( (log p - log(1 - p) + log u - log(1 - u)) / t ),   u ~ U(0, 1)

K: units of the layer's A that are masked; H: entropy of a coin, nats. The bracket is KL(q || N(0, 1 / l^2)) up to a
constant, of Gal, Hron and Kendall 2017, "Concrete dropout", arXiv 1705.07832: with weights M = A / (1 - p) before the
mask, theirs reads l^2 (1 - p) |M|^2 / 2 - K H(p). After training the masks are hard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...errors import UserError
from ..adapter import adapter_tensors
from ..continual import start_from
from ..examples import Batch
from ..families.masks import AXES, FACTOR, Axis
from ..job import FitReport, Job
from ..likelihoods import Likelihood
from ..posterior import Posterior
from ..training import negative_log_likelihood, train
from .dropout import SequenceMasks, check_probability, mask_report, mask_sizes, masked, masks_of


@dataclass(frozen=True)
class ConcreteDropout:
    """initial_p: where p starts. prior_precision: l^2. ess: lambda, None is N; larger is colder: the data then weigh
    more against the prior. relaxation: t; smaller is nearer to a mask, with noisier gradients for p. p_learning_rate:
    AdamW's, for log(p / (1 - p)). axis: what is masked.

    When not to use it: with few examples. K H(p) counts one nat or less for every input of every layer, against N
    examples: unless l^2 |A|^2 is of that size, p goes to 1/2 and beyond whatever the data say.
    """

    initial_p: float = 0.1
    prior_precision: float = 25.0
    ess: float | None = None
    relaxation: float = 0.1
    p_learning_rate: float = 0.03
    axis: Axis = "columns"

    def __post_init__(self) -> None:
        check_probability("initial_p", self.initial_p)
        if self.axis not in AXES:
            raise UserError(f"axis must be one of {', '.join(AXES)}, got {self.axis!r}")
        for name in ("prior_precision", "ess", "relaxation", "p_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be > 0, got {value}")

    def fit(self, job: Job) -> tuple[Posterior, FitReport]:
        start_from(job)
        sizes = mask_sizes(job.model, job.adapter, self.axis)
        start = math.log(self.initial_p) - math.log1p(-self.initial_p)
        adapter = adapter_tensors(job.model, job.adapter)
        device = next(iter(adapter.values())).device
        logits = {name: nn.Parameter(torch.tensor(start, device=device)) for name in sizes}
        masks = SequenceMasks(job.seed)
        weight = 1 / (self.ess or len(job.train))

        def loss(model: PeftModel, batch: Batch, likelihood: Likelihood) -> Tensor:
            uniform = masks.uniform(batch.ids, sizes)
            factors = {
                name: relaxed_keep(logits[name], u.to(device), self.relaxation) / (1 - logits[name].sigmoid())
                for name, u in uniform.items()
            }
            with masked(model, job.adapter, factors, self.axis):
                nll = negative_log_likelihood(model, batch, likelihood)
            down = {name: adapter[name + FACTOR] for name in sizes}
            return nll + weight * mask_divergence(logits, down, sizes, self.prior_precision)

        def optimizer(parameters: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
            own = {id(p) for p in logits.values()}
            t = job.training
            groups = [
                {"params": [p for p in parameters if id(p) not in own], "weight_decay": t.weight_decay},
                {"params": list(logits.values()), "weight_decay": 0.0, "lr": self.p_learning_rate},
            ]
            return torch.optim.AdamW(groups, lr=t.learning_rate)

        parameters = [p for p in adapter.values() if isinstance(p, nn.Parameter)]
        trained = train(
            job,
            loss=loss,
            make_optimizer=optimizer,
            parameters=[*parameters, *logits.values()],
            callbacks=[masks],
            method=self,
        )
        drop = {name: float(logit.detach().double().sigmoid()) for name, logit in logits.items()}
        posterior = masks_of(job, drop, self.axis)
        low, high = min(drop.values()), max(drop.values())
        return posterior, mask_report(
            job, "concrete_dropout", posterior, trained, p_lowest=low, p_highest=high
        )


def relaxed_keep(logit: Tensor, uniform: Tensor, relaxation: float) -> Tensor:
    """z in (0, 1), the relaxed keep-mask; logit = log(p / (1 - p)), p the probability to drop. As relaxation -> 0 it is
    1 where uniform < 1 - p, else 0."""
    return 1 - ((logit + torch.logit(uniform)) / relaxation).sigmoid()


def mask_divergence(
    logits: Mapping[str, Tensor], down: Mapping[str, Tensor], sizes: Mapping[str, int], precision: float
) -> Tensor:
    """Sum over layers of l^2 |A|^2 / (2 (1 - p)) - K H(p), nats. down: A by layer; sizes: K by layer."""
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for name, logit in logits.items():
        p, keep = logit.sigmoid(), (-logit).sigmoid()
        entropy = -(p * nn.functional.logsigmoid(logit) + keep * nn.functional.logsigmoid(-logit))
        total = total + precision * down[name].float().square().sum() / (2 * keep) - sizes[name] * entropy
    return total
