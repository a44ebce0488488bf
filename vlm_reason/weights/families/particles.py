"""Particles: a weighted set of whole adapters, from runs that know nothing of one another or along a chain.

    q = sum_k w_k delta(theta - theta_k)

It has draws and nothing else in closed form: no density, no temperature, no opposite draws.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import same_keys, whole
from ..artefact import Tree, check_finite
from ..noise import POSTERIOR, Draw, check_draws
from ..posterior import Origin, Posterior

WEIGHTS = "weights"
_NAMED = re.compile(r"s(\d+)\.(.+)")
_GOLDEN = (math.sqrt(5) - 1) / 2


class Particles(Posterior):
    """trees: K whole adapters. weights: K numbers >= 0, made to sum to 1; None: equal.

    mean: what `mean()` gives, what stock PEFT loads and what predictions "at the mean" use:

        None        sum_k w_k theta_k, for particles of one chain or one shared start, which lie in one basin
        a number k  particle k. Take this for independent runs: A and B of one are rotated against those of another
                    (B A = B R R^-1 A for any R), so an average of their factors is no good model. The ensemble's
                    best member on held-out data is the usual choice
        a tree      that tree

    On disk `s{k}.<peft key>` and `weights`. When not to use it: K adapters have to be kept, and shipped.
    """

    family: ClassVar[str] = "particles"

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        trees: Sequence[Mapping[str, Tensor]],
        origin: Origin,
        weights: Sequence[float] | Tensor | None = None,
        mean: int | Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(adapter_config, origin)
        self._trees = [{k: whole(v) for k, v in tree.items()} for tree in trees]
        self._weights = checked_weights(weights, len(self._trees), "particles")
        for number, tree in enumerate(self._trees):
            check_finite(tree, f"of particle {number}")
            check_alike(self._trees[0], tree, f"particles 0 and {number}")
        self._mean = _chosen_mean(mean, self._trees, self.weights)
        check_alike(self._trees[0], self._mean, "the particles and their mean")

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def weights(self) -> Tensor:
        """[K], fp64, of sum 1."""
        return self._weights.double() / self._weights.double().sum()

    def trees(self) -> list[Tree]:
        """The particles, in order."""
        return [{k: v.clone() for k, v in tree.items()} for tree in self._trees]

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        """Particles in the order of `in_proportion`: K draws of K equal ones are each of them once."""
        check_draws(n)
        if antithetic:
            self._lacks("draws that lie opposite each other: leave antithetic out")
        chosen = in_proportion(self.weights, n, seed)
        return ({k: v.clone() for k, v in self._trees[number].items()} for number in chosen)

    def uncertain(self) -> list[str]:
        first = self._trees[0]
        return [k for k in first if any(not torch.equal(first[k], tree[k]) for tree in self._trees[1:])]

    def tensors(self) -> Tree:
        named = {f"s{n}.{key}": value for n, tree in enumerate(self._trees) for key, value in tree.items()}
        return {WEIGHTS: self._weights, **named}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Particles:
        trees: dict[int, Tree] = {}
        for name, value in tensors.items():
            if name == WEIGHTS:
                continue
            found = _NAMED.fullmatch(name)
            if found is None:
                raise UserError(
                    f"particles have tensors named s<number>.<key> and {WEIGHTS!r}, found {name!r}"
                )
            trees.setdefault(int(found[1]), {})[found[2]] = value
        if WEIGHTS not in tensors or sorted(trees) != list(range(len(trees))):
            raise UserError(
                f"particles need {WEIGHTS!r} and the numbers s0, s1, ... without a gap; found "
                f"{', '.join(f's{n}' for n in sorted(trees)) or 'none'}"
            )
        return cls(adapter_config, [trees[n] for n in sorted(trees)], origin, tensors[WEIGHTS], mean)


def in_proportion(weights: Tensor, n: int, seed: int) -> Iterator[int]:
    """n choices among K, each k with probability `weights[k]` at every place, spread far more evenly than independent
    ones. The first m of n choices are the m choices of the same seed.

        equal weights   one random permutation of all K after another
        others          the k whose part of the unit interval u_i = u_0 + i (sqrt 5 - 1) / 2 (mod 1) lies in: systematic
                        resampling with an irrational step, so that it need not know n
    """
    count = len(weights)
    if bool((weights == weights[0]).all()):
        for start in range(0, n, count):
            order = list(range(count))
            random.Random(Draw(seed, POSTERIOR, start // count).block_seed(0)).shuffle(order)
            yield from order[: n - start]
        return
    edges = weights.double().cumsum(0)
    last = int(weights.nonzero().max())
    start_at = random.Random(Draw(seed, POSTERIOR).block_seed(0)).random()
    for i in range(n):
        u = torch.tensor((start_at + i * _GOLDEN) % 1.0, dtype=torch.float64)
        yield min(last, int(torch.searchsorted(edges, u, right=True)))


def weighted_mean(trees: Sequence[Mapping[str, Tensor]], weights: Tensor) -> Tree:
    """sum_k w_k theta_k, added up in fp64."""
    return {
        key: sum(
            (w * tree[key].double() for w, tree in zip(weights.tolist(), trees, strict=True)), torch.zeros(())
        ).float()
        for key in trees[0]
    }


def checked_weights(weights: Sequence[float] | Tensor | None, count: int, of: str) -> Tensor:
    """fp32 [count], not normalised. UserError for none, negative or infinite ones, a sum of 0, another number."""
    if count < 1:
        raise UserError(f"no {of}: give at least one")
    if weights is None:
        return torch.ones(count)
    found = torch.as_tensor(weights).detach().to(device="cpu", dtype=torch.float32, copy=True).flatten()
    if len(found) != count:
        raise UserError(f"{len(found)} weights for {count} {of}: give one for each")
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()) or not float(found.sum()) > 0:
        raise UserError(f"weights of {of} must be >= 0, finite and not all 0, got {found.tolist()}")
    return found


def check_alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """UserError where two trees differ in names or shapes."""
    same_keys(a, b, f"{what} are not of one adapter")
    for key in a:
        if a[key].shape != b[key].shape:
            raise UserError(
                f"{what} are not of one adapter: {key!r} has shapes {tuple(a[key].shape)} and {tuple(b[key].shape)}"
            )


def _chosen_mean(mean: int | Mapping[str, Tensor] | None, trees: Sequence[Tree], weights: Tensor) -> Tree:
    if mean is None:
        return weighted_mean(trees, weights)
    if isinstance(mean, int):
        if not 0 <= mean < len(trees):
            raise UserError(f"mean: there is no particle {mean}, they are 0 to {len(trees) - 1}")
        return {k: v.clone() for k, v in trees[mean].items()}
    return {k: whole(v) for k, v in mean.items()}
