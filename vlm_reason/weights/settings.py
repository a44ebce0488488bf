"""What IVON's settings amount to, and settings that follow from the length of the run and the size of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .ivon import IVON
from .shards import local

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST = 1_000_000  # weights looked at a parameter group


@dataclass(frozen=True)
class Diagnostics:
    """noise_to_weight  quantiles QUANTILES of sigma / |m| over weights; all far below 1: the posterior is a point
    sigma               the same of sigma
    hess_drift          the same of (h + delta) / (h_0 + delta); all near 1: the data have not shaped the posterior
    memory              beta2^T, what is left of h_0; T is the horizon, or the updates done when none was given
    temperature         N / lambda; 1 is the Bayesian posterior, below it is colder. None without data_size
    updates             done so far
    """

    noise_to_weight: tuple[float, ...]
    sigma: tuple[float, ...]
    hess_drift: tuple[float, ...]
    memory: float
    temperature: float | None
    updates: int


@dataclass(frozen=True)
class Settings:
    """Arguments of IVON by the same names."""

    ess: float
    hess_init: float
    beta2: float
    horizon: int
    data_size: int


@torch.no_grad()
def diagnose(optimizer: IVON, group: int = 0) -> Diagnostics:
    """Of one parameter group of `optimizer`; looks at every n-th weight of groups above a million."""
    settings = optimizer.param_groups[group]
    states = [optimizer.state[p] for p in settings["params"]]
    size = sum(local(state["mean"]).numel() for state in states)
    stride = max(1, size // _MOST)

    def all_of(name: str) -> Tensor:
        return torch.cat([local(state[name]).reshape(-1)[::stride].cpu() for state in states])

    delta = settings["weight_decay"]
    mean, total = all_of("mean"), all_of("precision")
    sigma = (settings["ess"] * total).rsqrt()
    updates = int(settings["updates"])
    return Diagnostics(
        noise_to_weight=_quantiles(sigma / mean.abs()),
        sigma=_quantiles(sigma),
        hess_drift=_quantiles(total / (settings["hess_init"] + delta)),
        memory=settings["beta2"] ** (optimizer.horizon or updates),
        temperature=None if optimizer.data_size is None else optimizer.data_size / settings["ess"],
        updates=updates,
    )


def suggest_settings(
    updates: int, data_size: int, sigma: float = 0.01, temperature: float = 1.0, weight_decay: float = 1e-4
) -> Settings:
    """lambda = N / temperature, beta2 = 1 - 5 / T, and the h_0 that makes the initial standard deviation `sigma`:

        h_0 = 1 / (lambda sigma^2) - delta

    With beta2 = 1 - 5 / T less than 1 % of h_0 is left at the end. sigma 0.01 is between what the LoRA recipes start
    from (0.02 to 0.03, with a temperature near 1e-4) and what BLoB does (0.002). UserError for values out of range, and
    for a sigma wider than the prior.
    """
    for name, value, low in (("updates", updates, 1), ("data_size", data_size, 1)):
        if not value >= low:
            raise UserError(f"{name} must be at least {low}, got {value}")
    for name, number in (("sigma", sigma), ("temperature", temperature)):
        if not 0 < number < math.inf:
            raise UserError(f"{name} must be > 0, got {number}")
    ess = data_size / temperature
    hess_init = 1 / (ess * sigma**2) - weight_decay
    if hess_init <= 0:
        raise UserError(
            f"sigma {sigma} is not below the prior's, {1 / math.sqrt(ess * weight_decay):.3g}: "
            "take a smaller sigma or weight_decay"
        )
    return Settings(ess, hess_init, max(0.9, 1 - 5 / updates), updates, data_size)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    if not values.numel():
        return tuple(math.nan for _ in QUANTILES)
    return tuple(torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist())
