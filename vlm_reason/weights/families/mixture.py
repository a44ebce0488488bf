"""A mixture of posteriors of any families over one adapter: several SWAG runs, an ensemble beside an IVON run.

    q(theta) = sum_k w_k q_k(theta)

(Wilson and Izmailov 2020, arXiv 2002.08791, for mixtures of SWAG.) For a density or a variance of the mixture every
component has to have one. Its outputs are no Gaussian, so it has no covariance of them: predictions are by draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ..adapter import whole
from ..artefact import Tree
from ..noise import POSTERIOR, Draw, check_draws
from ..posterior import Origin, Posterior
from .particles import WEIGHTS, check_alike, checked_weights, in_proportion, weighted_mean


class Mixture(Posterior):
    """components: posteriors over one adapter, of one base model. weights: as for `Particles`; None: equal.

    mean: as for `Particles`: None is sum_k w_k m_k; a number is that component's mean, for components from independent
    runs, whose LoRA factors have no common gauge. origin: of the first component where none is given.

    On disk a folder a component, `component000` and so on, each of which `Posterior.load` reads by itself.
    """

    family: ClassVar[str] = "mixture"

    def __init__(
        self,
        components: Sequence[Posterior],
        weights: Sequence[float] | Tensor | None = None,
        mean: int | Mapping[str, Tensor] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._components = tuple(components)
        self._weights = checked_weights(weights, len(self._components), "components")
        first = self._components[0]
        super().__init__(first.adapter_config, first.origin if origin is None else origin)
        self._means = [component.mean() for component in self._components]
        for number, component in enumerate(self._components):
            check_alike(self._means[0], self._means[number], f"components 0 and {number}")
            if component.origin.base != first.origin.base:
                raise UserError(
                    f"components 0 and {number} were fitted on different base models, with hashes "
                    f"{first.origin.base} and {component.origin.base}"
                )
            if type(component).closed_form is not Posterior.closed_form:
                raise UserError(
                    f"component {number}, of family {component.family!r}, is uncertain of a head beside the adapter: a "
                    "mixture draws adapters alone"
                )
            if component.origin.output_temperature != 1.0:
                raise UserError(
                    f"component {number} divides its logits by {component.origin.output_temperature}; a mixture has "
                    "one output temperature: scale the mixture instead"
                )
        if isinstance(mean, int) and not 0 <= mean < len(self._components):
            raise UserError(f"mean: there is no component {mean}, they are 0 to {len(self._components) - 1}")
        self._mean = self._chosen_mean(mean)
        check_alike(self._means[0], self._mean, "the components and the mixture's mean")

    def __len__(self) -> int:
        return len(self._components)

    @property
    def components(self) -> tuple[Posterior, ...]:
        return self._components

    @property
    def weights(self) -> Tensor:
        """[K], fp64, of sum 1."""
        return self._weights.double() / self._weights.double().sum()

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        """Components in the order of `in_proportion`, so a share w_k of the draws is of component k; each has noise of
        its own. antithetic: pairs stay in one component and lie opposite each other about that component's mean."""
        check_draws(n)
        group = 2 if antithetic else 1
        order = [k for k in in_proportion(self.weights, -(-n // group), seed) for _ in range(group)][:n]
        seeds = [Draw(seed, POSTERIOR, 0, k).block_seed(0) for k in range(len(self))]
        streams = {
            k: self._components[k].sample(order.count(k), seeds[k], antithetic) for k in sorted(set(order))
        }
        return (next(streams[k]) for k in order)

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """log sum_k w_k q_k(tree), nats. UserError where a component has no density."""
        logs = torch.tensor([c.log_prob(tree) for c, w in self._weighted() if w > 0], dtype=torch.float64)
        positive = torch.tensor([w for _, w in self._weighted() if w > 0], dtype=torch.float64)
        if bool((logs == math.inf).any()):
            return math.inf
        return float((logs + positive.log()).logsumexp(0))

    def precision_diag(self) -> Tree:
        """1 / variance, that between the components' means included."""
        inside = [
            {key: value.double().reciprocal() for key, value in c.precision_diag().items()}
            for c, _ in self._weighted()
        ]
        centre, weights = weighted_mean(self._means, self.weights), self.weights.tolist()
        variance = {
            key: sum(
                (
                    w * (part[key] + (m[key].double() - centre[key].double()).square())
                    for w, part, m in zip(weights, inside, self._means, strict=True)
                ),
                torch.zeros(()),
            )
            for key in centre
        }
        return {key: value.reciprocal().float() for key, value in variance.items()}

    def temper(self, tau: float) -> Mixture:
        """Every component tempered; the spread between components stays."""
        components = [c.temper(tau) for c in self._components]
        origin = replace(self.origin, temper=self.origin.temper * tau)
        return Mixture(components, self._weights, self._mean, origin)

    def uncertain(self) -> list[str]:
        """Keys that are uncertain in a component, or that components have different means of."""
        inside = {key for c in self._components for key in c.uncertain()}
        first = self._means[0]
        return [
            k for k in first if k in inside or any(not torch.equal(first[k], m[k]) for m in self._means[1:])
        ]

    def tensors(self) -> Tree:
        return {WEIGHTS: self._weights}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Mixture:
        raise UserError(
            "a mixture is read from its folder, with a folder for each component inside: Posterior.load"
        )

    # ------------------------------------------------------------------------------------------------------ on disk

    def files(self) -> Iterator[tuple[str, bytes]]:
        yield from super().files()
        for number, component in enumerate(self._components):
            for name, content in component.files():
                yield f"{_folder_of(number)}/{name}", content

    @classmethod
    def from_folder(
        cls, folder: Path, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Mixture:
        if list(tensors) != [WEIGHTS]:
            raise UserError(
                f"a mixture has one tensor, {WEIGHTS!r}; found {', '.join(sorted(tensors)) or 'none'}"
            )
        components = [Posterior.load(folder / _folder_of(n)) for n in range(tensors[WEIGHTS].numel())]
        return cls(components, tensors[WEIGHTS], mean, origin)

    def _weighted(self) -> list[tuple[Posterior, float]]:
        return list(zip(self._components, self.weights.tolist(), strict=True))

    def _chosen_mean(self, mean: int | Mapping[str, Tensor] | None) -> Tree:
        if mean is None:
            return weighted_mean(self._means, self.weights)
        chosen = self._means[mean] if isinstance(mean, int) else mean
        return {k: whole(v) for k, v in chosen.items()}


def _folder_of(number: int) -> str:
    return f"component{number:03d}"
