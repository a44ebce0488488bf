"""The diagonal Gaussian: q = N(m, diag sigma^2) over the weights of an adapter.

    log q(theta) = -1/2 sum_i [ (theta_i - m_i)^2 / sigma_i^2 + log(2 pi sigma_i^2) ]
    KL(q || p)   =  1/2 sum_i [ sigma_i^2 / s_i^2 + (m_i - n_i)^2 / s_i^2 - 1 + log(s_i^2 / sigma_i^2) ]

with p = N(n, diag s^2). sigma_i = 0 is a certain weight, a point mass: it has density 1 at its place and KL 0 from
itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from ...errors import UserError
from ..adapter import adapter_tensors, base_fingerprint, peft_config_dict, same_keys, whole
from ..artefact import Tree, check_finite
from ..noise import POSTERIOR, Draw, normals, signed_draws
from ..posterior import Origin, Posterior

if TYPE_CHECKING:
    from ..ivon import IVON

SCALE = ".scale"


class DiagonalGaussian(Posterior):
    """mean: every tensor of the adapter. sigma: of those that are uncertain, same keys and shapes, >= 0.

    When not to use it: where the covariance between weights matters; the two factors of a LoRA layer are correlated
    under the true posterior, and a diagonal is narrower than its marginals.
    """

    family: ClassVar[str] = "diagonal"

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        sigma: Mapping[str, Tensor],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, origin)
        self._mean = {k: whole(v) for k, v in mean.items()}
        self._sigma = {k: whole(sigma[k]) for k in sorted(sigma)}
        check_finite(self._mean, "of the mean")
        check_finite(self._sigma, "of sigma")
        for key, value in self._sigma.items():
            if key not in self._mean:
                raise UserError(f"sigma of {key!r} has no mean beside it: the adapter has no such tensor")
            if value.shape != self._mean[key].shape:
                raise UserError(
                    f"sigma of {key!r} has shape {tuple(value.shape)}, its mean {tuple(self._mean[key].shape)}"
                )
            if bool((value < 0).any()):
                raise UserError(f"sigma of {key!r} has negative values")

    @classmethod
    def from_ivon(cls, optimizer: IVON, model: PeftModel, adapter: str = "default") -> DiagonalGaussian:
        """See `Posterior.from_optimizer`. sigma^2 = 1 / (lambda (h + delta)), prior precision lambda delta. Groups of
        the optimiser that name another adapter in their key `adapter` are left out."""
        tensors = adapter_tensors(model, adapter)
        key_of = {id(p): key for key, p in tensors.items()}
        mean: Tree = {}
        sigma: Tree = {}
        prior: dict[str, float] = {}
        groups = [g for g in optimizer.param_groups if g.get("adapter", adapter) == adapter]
        for group in groups:
            for p in group["params"]:
                if id(p) not in key_of:
                    raise UserError(
                        f"the optimiser trains a parameter of shape {tuple(p.shape)} that is not in adapter {adapter!r}"
                    )
                key, state = key_of[id(p)], optimizer.state[p]
                mean[key] = whole(state["mean"])
                sigma[key] = (group["ess"] * whole(state["precision"])).rsqrt()
                prior[key] = group["ess"] * group["weight_decay"]
        if not groups:
            raise UserError(f"the optimiser trains nothing of adapter {adapter!r}")
        first = groups[0]
        origin = Origin(
            base_fingerprint(model), first["ess"], optimizer.data_size, first["updates"], 1.0, prior
        ).on(model)
        certain = {key: whole(p) for key, p in tensors.items() if key not in mean}
        return cls(peft_config_dict(model, adapter), {**certain, **mean}, sigma, origin)

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sigma(self) -> Tree:
        """Of the uncertain tensors."""
        return {k: v.clone() for k, v in self._sigma.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        return (self._draw(seed, number, sign) for number, sign in signed_draws(n, antithetic))

    def _draw(self, seed: int, number: int, sign: float) -> Tree:
        tree = self.mean()
        shapes = [tuple(sigma.shape) for sigma in self._sigma.values()]
        white = normals(shapes, Draw(seed, POSTERIOR, 0, number), torch.device("cpu"))
        for (key, sigma), z in zip(self._sigma.items(), white, strict=True):
            tree[key].addcmul_(sigma, z, value=sign)
        return tree

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """In nats, over the uncertain weights; -inf where a certain one differs. UserError for other keys or shapes."""
        same_keys(self._mean, tree, "the tree is not of this posterior")
        total = 0.0
        for key, mean in self._mean.items():
            if tree[key].shape != mean.shape:
                raise UserError(f"{key!r} has shape {tuple(tree[key].shape)}, not {tuple(mean.shape)}")
            apart = whole(tree[key]).double() - mean
            sigma = self._sigma_or_zero(key)
            if bool((apart[sigma == 0] != 0).any()):
                return -math.inf
            apart, sigma = apart[sigma > 0], sigma[sigma > 0]
            total -= float(((apart / sigma).square() + (2 * math.pi * sigma.square()).log()).sum()) / 2
        return total

    def kl(self, other: Posterior | None = None) -> float:
        """KL(self || other) in nats, other a diagonal Gaussian over the same tensors; None is the prior, and then only
        the uncertain tensors count. Infinite where one is certain and the other is not, or of another value.

        UserError for a flat prior, another family, other tensors.
        """
        if other is None:
            other = self._prior()
            keys = list(self._sigma)
        elif isinstance(other, DiagonalGaussian):
            same_keys(self._mean, other._mean, "the posteriors are not over the same adapter")
            keys = list(self._mean)
        else:
            raise UserError(f"no KL divergence in closed form from {self.family!r} to {other.family!r}")
        total = 0.0
        for key in keys:
            if self._mean[key].shape != other._mean[key].shape:
                raise UserError(f"{key!r} has another shape in the other posterior")
            sigma, s = self._sigma_or_zero(key), other._sigma_or_zero(key)
            apart = self._mean[key].double() - other._mean[key]
            certain = (sigma == 0) & (s == 0)
            if bool(((sigma == 0) != (s == 0)).any()) or bool((apart[certain] != 0).any()):
                return math.inf
            ratio, apart = (sigma / s)[~certain].square(), (apart / s)[~certain].square()
            total += float((ratio + apart - 1 - ratio.log()).sum()) / 2
        return total

    def _prior(self) -> DiagonalGaussian:
        flat = [k for k in self._sigma if not self.origin.prior.get(k, 0.0) > 0]
        if flat:
            raise UserError(
                f"the prior of {flat[0]!r} is flat (weight_decay 0): no KL divergence to it; give another posterior"
            )
        sigma = {k: torch.full_like(v, self.origin.prior[k] ** -0.5) for k, v in self._sigma.items()}
        zero = {k: torch.zeros_like(v) for k, v in self._mean.items()}
        return DiagonalGaussian(self.adapter_config, zero, sigma, self.origin)

    def uncertain(self) -> list[str]:
        return list(self._sigma)

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        total = None
        for key, sigma in self._sigma.items():
            j = jacobian[key].flatten(2).double()
            part = (j * sigma.view(-1).double().square()) @ j.mT
            total = part if total is None else total + part
        if total is None:
            raise UserError("a posterior that is certain of all weights has no covariance")
        return total

    def precision_diag(self) -> Tree:
        return {k: self._sigma_or_zero(k).float().square().reciprocal() for k in self._mean}

    def temper(self, tau: float) -> DiagonalGaussian:
        if not 0 < tau < math.inf:
            raise UserError(f"temper: tau must be > 0, got {tau}")
        sigma = {k: v / math.sqrt(tau) for k, v in self._sigma.items()}
        origin = replace(self.origin, temper=self.origin.temper * tau)
        return DiagonalGaussian(self.adapter_config, self._mean, sigma, origin)

    def prune(self, fraction: float) -> DiagonalGaussian:
        """Counts the uncertain weights; a weight that is certain already is not chosen."""
        if not 0 <= fraction <= 1:
            raise UserError(f"prune: fraction must be in [0, 1], got {fraction}")
        mean, sigma = self.mean(), self.sigma()
        if not sigma:
            return DiagonalGaussian(self.adapter_config, mean, sigma, self.origin)
        ratio = torch.cat(
            [(mean[k].abs() / v).nan_to_num(math.inf, math.inf).view(-1) for k, v in sigma.items()]
        )
        count = min(int(fraction * ratio.numel()), int((ratio < math.inf).sum()))
        chosen = torch.zeros(ratio.numel(), dtype=torch.bool)
        chosen[ratio.argsort(stable=True)[:count]] = True
        parts = chosen.split([v.numel() for v in sigma.values()])
        for (key, value), part in zip(sigma.items(), parts, strict=True):
            mean[key].view(-1)[part] = 0.0
            value.view(-1)[part] = 0.0
        return DiagonalGaussian(self.adapter_config, mean, sigma, self.origin)

    def tensors(self) -> Tree:
        return {key + SCALE: value for key, value in self._sigma.items()}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> DiagonalGaussian:
        wrong = [key for key in tensors if not key.endswith(SCALE)]
        if wrong:
            raise UserError(f"a diagonal posterior has tensors named <key>{SCALE} only, found {wrong[0]!r}")
        sigma = {key.removesuffix(SCALE): value for key, value in tensors.items()}
        return cls(adapter_config, mean, sigma, origin)

    def _sigma_or_zero(self, key: str) -> Tensor:
        return self._sigma[key].double() if key in self._sigma else torch.zeros_like(self._mean[key]).double()
