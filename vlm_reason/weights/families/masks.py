"""Bernoulli masks on a LoRA layer's A: a posterior with two values a unit, the adapter's own and nothing.

    A_ij = M_ij z_j / (1 - p),   z_j ~ Bernoulli(1 - p)        "columns": inputs of the layer are dropped
    A_ij = M_ij z_i / (1 - p),   z_i ~ Bernoulli(1 - p)        "ranks": whole rank-one parts B_:i A_i: are dropped

The mean is M, the adapter itself. A draw is one mask for all tokens of all sequences: one function. Dropout as layers
apply it, anew for each token, is no function of the weights: two tokens of one answer would come from two models.
(Gal and Ghahramani 2016, "Dropout as a Bayesian approximation", arXiv 1506.02142.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree, check_finite
from ..noise import BLOCK, POSTERIOR, Draw, check_draws
from ..posterior import Origin, Posterior

Axis = Literal["columns", "ranks"]
AXES: tuple[str, ...] = get_args(Axis)
FACTOR = ".lora_A.weight"
SUFFIX = {"columns": ".drop_columns", "ranks": ".drop_ranks"}


class Masks(Posterior):
    """mean: every tensor of the adapter. drop: key of an A -> probability p in [0, 1) that a unit of it is dropped.

    Draws compare uniform numbers of 16 bits with p, which is therefore met to 2^-17. Variances are tied to the mean,
    M^2 p / (1 - p), so there is no temperature; masks have no density and no opposite draws. UserError for all those,
    for a p outside [0, 1), and for a key that is no `lora_A.weight` of the mean.

    When not to use it: for uncertainty about what the adapter has not used. Where M is 0 it is certain.
    """

    family: ClassVar[str] = "masks"

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        drop: Mapping[str, float],
        axis: Axis,
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, origin)
        if axis not in AXES:
            raise UserError(f"masks are on columns or ranks, not on {axis!r}")
        self.axis: Axis = axis
        self._mean = {k: whole(v) for k, v in mean.items()}
        self._drop = {k: float(torch.tensor(drop[k], dtype=torch.float32)) for k in sorted(drop)}
        check_finite(self._mean, "of the mean")
        for key, p in self._drop.items():
            if key not in self._mean or not key.endswith(FACTOR):
                raise UserError(f"masks are on factors of the adapter named <layer>{FACTOR}, not on {key!r}")
            if not 0 <= p < 1:
                raise UserError(f"the drop probability of {key!r} must be in [0, 1), got {p}")

    def drop(self) -> dict[str, float]:
        """p by key."""
        return dict(self._drop)

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        check_draws(n)
        if antithetic:
            self._lacks("antithetic draws: the opposite of a mask about the mean is no mask")
        return (self._draw(seed, number) for number in range(n))

    def _draw(self, seed: int, number: int) -> Tree:
        tree = self.mean()
        total = sum(self._units(key) for key in self._drop)
        uniform = _uniform(Draw(seed, POSTERIOR, 0, number), total)
        for (key, p), own in zip(
            self._drop.items(), uniform.split([self._units(key) for key in self._drop]), strict=True
        ):
            tree[key] = self._masked(key, own >= p)
        return tree

    def _units(self, key: str) -> int:
        return self._mean[key].shape[1 if self.axis == "columns" else 0]

    def _masked(self, key: str, keep: Tensor) -> Tensor:
        """keep [units], bool."""
        factor = keep.float() / (1 - self._drop[key])
        return self._mean[key] * (factor if self.axis == "columns" else factor[:, None])

    def entropy(self) -> float:
        """Of the masks, in nats: sum over units of H(p)."""
        return sum(self._units(key) * binary_entropy(p) for key, p in self._drop.items())

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """Log of the probability (not a density) of drawing this tree; -inf for one that no mask gives. A unit of M
        that is 0 throughout is the same with and without its mask. UserError for other keys or shapes."""
        same_keys(self._mean, tree, "the tree is not of this posterior")
        total = 0.0
        for key, mean in self._mean.items():
            value = whole(tree[key])
            if value.shape != mean.shape:
                raise UserError(f"{key!r} has shape {tuple(value.shape)}, not {tuple(mean.shape)}")
            p = self._drop.get(key, 0.0)
            over = 0 if self.axis == "columns" else 1  # what one unit spans
            kept = (value == (self._all_kept(key) if key in self._drop else mean)).flatten()
            if p == 0:
                total += 0.0 if bool(kept.all()) else -math.inf
                continue
            kept = kept.view(mean.shape).all(over)
            gone = (value == 0).all(over)
            free = (mean == 0).all(over) & gone
            if not bool((kept | gone).all()):
                return -math.inf
            total += int((kept & ~free).sum()) * math.log1p(-p) + int((gone & ~free).sum()) * math.log(p)
        return total

    def _all_kept(self, key: str) -> Tensor:
        return self._masked(key, torch.ones(self._units(key), dtype=torch.bool))

    def precision_diag(self) -> Tree:
        """(1 - p) / (p M^2); the variance of a mask, not of a Gaussian."""
        odds = {k: self._drop.get(k, 0.0) / (1 - self._drop.get(k, 0.0)) for k in self._mean}
        return {k: (v.square() * odds[k]).reciprocal() for k, v in self._mean.items()}

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        """Exact for the masks: sum over units u of p / (1 - p) k_u k_u^T, k_u = sum over the unit of J * M."""
        total = None
        for key, p in self._drop.items():
            along = (jacobian[key].double() * self._mean[key].double()).sum(
                -2 if self.axis == "columns" else -1
            )
            part = p / (1 - p) * along @ along.mT
            total = part if total is None else total + part
        if total is None:
            raise UserError("a posterior that is certain of all weights has no covariance")
        return total

    def uncertain(self) -> list[str]:
        return [key for key, p in self._drop.items() if p > 0]

    def tensors(self) -> Tree:
        return {key + SUFFIX[self.axis]: torch.tensor([p]) for key, p in self._drop.items()}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Masks:
        found = {axis for axis, end in SUFFIX.items() if any(key.endswith(end) for key in tensors)}
        axis: Axis = "ranks" if found == {"ranks"} else "columns"
        wrong = [k for k, v in tensors.items() if not k.endswith(SUFFIX[axis]) or v.numel() != 1]
        if wrong:
            raise UserError(
                f"a posterior of masks has one number named <key>{SUFFIX[axis]} a factor, found {wrong[0]!r} of "
                f"shape {tuple(tensors[wrong[0]].shape)}"
            )
        drop = {key.removesuffix(SUFFIX[axis]): float(value) for key, value in tensors.items()}
        return cls(adapter_config, mean, drop, axis, origin)


def binary_entropy(p: float) -> float:
    """H(p) = -p log p - (1 - p) log(1 - p), nats."""
    return -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)


def _uniform(draw: Draw, size: int) -> Tensor:
    """(k + 1/2) / 2^16 [size], k uniform: the middles of equal parts of [0, 1]."""
    blocks = range(0, size, BLOCK)
    bits = [draw.bits(n, min(BLOCK, size - start), torch.device("cpu")) for n, start in enumerate(blocks)]
    return ((torch.cat(bits) if bits else torch.zeros(0)) + 0.5) / (1 << 16)
