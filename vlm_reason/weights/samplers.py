"""Markov chains over weights, as torch optimisers: SGLD, SGHMC and Entropy-MCMC, and the cyclical schedule for them.

With l the mean training loss, N = `data_size`, p = `prior_precision`, T = `temperature`, the chain's law is, for small
steps and exact gradients, proportional to exp(-U / T) with

    U(theta) = N l(theta) + p |theta|^2 / 2

`lr` is in units of the mean loss, as SGD's is (the step on U itself is lr / N), and g = dl/dtheta + p theta / N:

    SGLD          theta <- theta - lr g + (2 lr T / N)^1/2 z
    SGHMC         v <- (1 - a) v - lr g + (2 a lr T / N)^1/2 z,      theta <- theta + v
    Entropy-MCMC  SGLD on (theta, theta_a) jointly, under U(theta) + |theta - theta_a|^2 / (2 eta)

Gradients of minibatches add noise of their own, of covariance lr^2 C / B a step where the chain's is 2 lr T / N: small
against it only for lr << 2 T B / (N C). Noise belongs to the place of a weight in the global index (noise.py), and its
counter is saved with the groups: resuming is exact, and shards draw what the whole would.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import UserError
from .noise import TRAINING, Block, Draw, cut_into_blocks, for_each_block
from .shards import global_start, local, size_of_whole

_LEAST = {"lr": 0.0, "data_size": 1.0, "prior_precision": 0.0, "temperature": 0.0}


class Langevin(torch.optim.Optimizer):
    """What the samplers share. A group may set its own lr, prior_precision, temperature; all may change at any step.

    data_size        N
    prior_precision  p of the prior N(0, I / p); flat at 0
    temperature      T; 1 is the Bayesian posterior, below it is colder, 0 is gradient descent
    seed             of all noise

    fp32 parameters only: steps of a chain are far smaller than bf16's. Parameters without a gradient stay as they are.
    UserError for settings out of range.
    """

    draws: ClassVar[int] = 1
    """Noise vectors a step."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for group in self.param_groups:
            _check(type(self).__name__, group)
            self._step_group(group, start)
            start += sum(size_of_whole(p) for p in group["params"])
            group["updates"] += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(type(self).__name__, group)
        except UserError:
            self.param_groups.pop()
            raise

    def _step_group(self, group: dict[str, Any], start: int) -> None:
        spans: list[tuple[int, int]] = []
        parts: list[dict[str, Tensor]] = []
        for p in group["params"]:
            whole_start, start = start, start + size_of_whole(p)
            if p.grad is None:
                continue
            tensors = self._tensors(p)
            tensors["value"], tensors["gradient"] = local(p.detach()), local(p.grad).to(p.dtype)
            parts.append({k: v.view(-1) if k != "gradient" else v.reshape(-1) for k, v in tensors.items()})
            spans.append((whole_start + global_start(p), parts[-1]["value"].numel()))
        noises = [
            Draw(group["seed"], TRAINING, group["updates"], k)
            for k in range(self.draws if _hot(group) else 0)
        ]

        def move(block: Block) -> None:
            normals: dict[torch.device, list[Tensor]] = {}
            for piece in block.pieces:
                at = {k: v[piece.lo : piece.hi] for k, v in parts[piece.tensor].items()}
                device = at["value"].device
                if device not in normals:
                    normals[device] = [noise.normal(block.number, block.stop, device) for noise in noises]
                size = piece.hi - piece.lo
                z = [n[piece.offset : piece.offset + size].to(at["value"].dtype) for n in normals[device]]
                self._move(group, at, z)

        devices = {part["value"].device for part in parts}
        if parts:
            for_each_block(
                cut_into_blocks(spans), devices.pop() if len(devices) == 1 else torch.device("meta"), move
            )

    def _tensors(self, p: Tensor) -> dict[str, Tensor]:
        """The sampler's state of one parameter, this process's part of it."""
        return {}

    @abstractmethod
    def _move(self, group: dict[str, Any], at: dict[str, Tensor], z: Sequence[Tensor]) -> None:
        """One step of the elements `at` (value, gradient and state); no noise (z empty) at temperature 0."""


def _drift(group: dict[str, Any], at: dict[str, Tensor]) -> Tensor:
    """g."""
    return at["gradient"].add(at["value"], alpha=group["prior_precision"] / group["data_size"])


def _hot(group: dict[str, Any]) -> bool:
    return group["temperature"] > 0 and group["lr"] > 0


def _noise_of(group: dict[str, Any], share: float = 1.0) -> float:
    return math.sqrt(2 * share * group["lr"] * group["temperature"] / group["data_size"])


class SGLD(Langevin):
    """Stochastic gradient Langevin dynamics (Welling and Teh 2011); see the head of this file.

    On a quadratic l of curvature c its variance is T / (N c) / (1 - lr c / 2): keep lr far below 2 / c.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        data_size: int,
        prior_precision: float = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, data_size=data_size, prior_precision=prior_precision, temperature=temperature, seed=seed
        )
        super().__init__(params, defaults)

    def _move(self, group: dict[str, Any], at: dict[str, Tensor], z: Sequence[Tensor]) -> None:
        at["value"].add_(_drift(group, at), alpha=-group["lr"])
        for noise in z:
            at["value"].add_(noise, alpha=_noise_of(group))


class SGHMC(Langevin):
    """Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin 2014, arXiv 1402.4102), with their estimate
    of the gradient's own noise at 0. friction: a in (0, 1]; 1 - a is the momentum of SGD, so a step goes as far as one
    of SGLD with lr / a."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        data_size: int,
        prior_precision: float = 0.0,
        temperature: float = 1.0,
        friction: float = 0.1,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, data_size=data_size, prior_precision=prior_precision, temperature=temperature,
            friction=friction, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _tensors(self, p: Tensor) -> dict[str, Tensor]:
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return {"momentum": local(self.state[p]["momentum"])}

    def _move(self, group: dict[str, Any], at: dict[str, Tensor], z: Sequence[Tensor]) -> None:
        v = at["momentum"]
        v.mul_(1 - group["friction"]).add_(_drift(group, at), alpha=-group["lr"])
        for noise in z:
            v.add_(noise, alpha=_noise_of(group, group["friction"]))
        at["value"].add_(v)


class EntropyMCMC(Langevin):
    """Langevin dynamics of theta and a guiding copy theta_a, which follows wide valleys (Li and Zhang 2024, arXiv
    2310.05401): theta_a alone has the law of U smoothed over a Gaussian of variance eta T.

        theta   <- theta   - lr [ g + (theta - theta_a) / (N eta) ] + (2 lr T / N)^1/2 z
        theta_a <- theta_a - lr (theta_a - theta) / (N eta)         + (2 lr T / N)^1/2 z_a

    eta: variance of the coupling, > 0; stable for lr < N eta. theta_a starts at theta; `guides()` gives it.
    On a quadratic of curvature c, with h = N c + p: Var theta = Cov = T / h, Var theta_a = T (1 / h + eta).
    """

    draws: ClassVar[int] = 2

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        data_size: int,
        eta: float,
        prior_precision: float = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, data_size=data_size, eta=eta, prior_precision=prior_precision, temperature=temperature,
            seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)

    def guides(self) -> dict[Tensor, Tensor]:
        """Parameter -> its theta_a; the parameter itself before the first step."""
        return {
            p: self.state[p].get("guide", p.detach()) for group in self.param_groups for p in group["params"]
        }

    def _tensors(self, p: Tensor) -> dict[str, Tensor]:
        if "guide" not in self.state[p]:
            self.state[p]["guide"] = p.detach().clone(memory_format=torch.contiguous_format)
        return {"guide": local(self.state[p]["guide"])}

    def _move(self, group: dict[str, Any], at: dict[str, Tensor], z: Sequence[Tensor]) -> None:
        theta, guide, lr = at["value"], at["guide"], group["lr"]
        pull = (theta - guide).mul_(lr / (group["data_size"] * group["eta"]))
        theta.add_(_drift(group, at), alpha=-lr).sub_(pull)
        guide.add_(pull)
        for place, noise in zip((theta, guide), z, strict=False):
            place.add_(noise, alpha=_noise_of(group))


@dataclass(frozen=True)
class CyclicalSchedule:
    """Warm restarts (Zhang et al. 2020, arXiv 1902.03932): in each of `cycles` cycles of L = ceil(steps / cycles) steps

        lr_t = lr / 2 [ cos(pi (t mod L) / L) + 1 ],      t = 0, 1, ...

    The first `exploration` of a cycle is gradient descent (temperature 0) to another mode, the rest samples it.
    """

    lr: float
    temperature: float
    steps: int
    cycles: int = 4
    exploration: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.cycles <= self.steps:
            raise UserError(f"cycles must be from 1 to the number of steps, {self.steps}, got {self.cycles}")
        if not 0 <= self.exploration < 1:
            raise UserError(
                f"exploration is a share of a cycle, at least 0 and below 1, got {self.exploration}"
            )

    @property
    def length(self) -> int:
        return -(-self.steps // self.cycles)

    def samples(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is of a sampling stage."""
        return step % self.length >= self.exploration * self.length

    def at(self, step: int) -> dict[str, float]:
        """lr and temperature of the groups during step `step`."""
        phase = (step % self.length) / self.length
        lr = self.lr / 2 * (math.cos(math.pi * phase) + 1)
        return {"lr": lr, "temperature": self.temperature if self.samples(step) else 0.0}


def _check(name: str, group: dict[str, Any]) -> None:
    for key, least in _LEAST.items():
        if not least <= group[key] < math.inf:
            raise UserError(f"{name}: {key} must be at least {least:g}, got {group[key]}")
    if "friction" in group and not 0 < group["friction"] <= 1:
        raise UserError(f"{name}: friction must be above 0 and at most 1, got {group['friction']}")
    if "eta" in group:
        if not 0 < group["eta"] < math.inf:
            raise UserError(f"{name}: eta must be > 0, got {group['eta']}")
        if not group["lr"] < group["data_size"] * group["eta"]:
            raise UserError(
                f"{name}: unstable at lr {group['lr']:g}: it must be below data_size * eta = "
                f"{group['data_size'] * group['eta']:g}; lower lr or raise eta"
            )
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.float64):
            raise UserError(f"{name}: a parameter is {p.dtype}; a chain needs fp32 parameters")
