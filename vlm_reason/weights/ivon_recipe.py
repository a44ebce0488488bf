"""IVON from a training recipe: settings that follow from the run's length, the size of the data and its learning rate.

    ess = N / temperature,    beta2 = 1 - 5 / T,    h_0 = 1 / (ess sigma^2) - delta,    clip_radius = learning rate / lr

T: updates planned. As the clip binds in most updates of language models, a recipe's learning rate means what it means
with AdamW, how far a weight moves in an update, and need not be changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .ivon import IVON
from .settings import suggest_settings


@dataclass(frozen=True)
class IVONConfig:
    """sigma         standard deviation of every weight at first
    temperature   N / lambda; 1 is the Bayesian posterior of the loss. Language models need it cold: their curvature a
                  weight is so small that at 1 no draw is of any use
    weight_decay  delta; the prior's standard deviation is sqrt(temperature / (N delta))
    lr            alpha, what the schedule multiplies
    mc_samples    steps whose gradients make one update: 1, or whole windows, each at a draw of its own
    hold          steps at one draw; None: those of a window
    ess, hess_init, beta2   in place of what follows from the above
    """

    sigma: float = 0.01
    temperature: float = 1e-4
    weight_decay: float = 1e-5
    lr: float = 0.1
    mc_samples: int = 1
    hold: int | None = None
    beta1: float = 0.9
    beta2: float | None = None
    ess: float | None = None
    hess_init: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "mc_samples", "sigma", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"ivon.{name} must be > 0, got {getattr(self, name)}")
        if self.hold is not None and self.hold < 1:
            raise UserError(f"ivon.hold must be at least 1, got {self.hold}")


def make_ivon(
    parameters: Sequence[Any],
    config: IVONConfig,
    *,
    learning_rate: float,
    steps: int,
    steps_per_window: int,
    data_size: int,
    seed: int,
) -> IVON:
    """parameters: as torch's optimisers take them. learning_rate: how far a weight may move in an update. UserError for
    settings that do not fit the run."""
    if config.mc_samples > 1 and config.mc_samples % steps_per_window:
        raise UserError(
            f"ivon.mc_samples is {config.mc_samples}, a window has {steps_per_window} steps: it counts steps, and must "
            f"be 1 or a multiple of {steps_per_window}, so that an update takes in whole windows"
        )
    if config.mc_samples > steps:
        raise UserError(
            f"ivon.mc_samples is {config.mc_samples}, the run has {steps} steps: nothing would ever be updated"
        )
    if not learning_rate > 0:
        raise UserError(f"trainer.learning_rate must be > 0 with optim: ivon, got {learning_rate}")
    updates = steps // config.mc_samples
    s = suggest_settings(updates, data_size, config.sigma, config.temperature, config.weight_decay)
    return IVON(
        list(parameters),
        lr=config.lr,
        ess=s.ess if config.ess is None else config.ess,
        hess_init=s.hess_init if config.hess_init is None else config.hess_init,
        beta1=config.beta1,
        beta2=s.beta2 if config.beta2 is None else config.beta2,
        weight_decay=config.weight_decay,
        clip_radius=learning_rate / config.lr,
        rescale_lr=False,
        mc_samples=config.mc_samples,
        hold=steps_per_window if config.hold is None else config.hold,
        seed=seed,
        horizon=updates,
        data_size=data_size,
    )
