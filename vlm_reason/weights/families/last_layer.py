"""A certain adapter with an uncertain last layer on its features: w_c ~ N(mu_c, S_c), see weights/heads.

    f_c(x) = offset_c(x) + w_c . phi(x)          offset: what the model's own head says, or 0

Its draws are heads, not adapters: {"head": w [C, F]}. Outputs are Gaussian in closed form, so a prediction is one run
of the model. On disk the adapter is an ordinary one, without the head, which stock PEFT does not know.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from ...errors import UserError
from ..adapter import adapter_tensors, whole
from ..artefact import Tree, check_finite
from ..examples import Batch, Example, in_batches
from ..heads import FeatureDensity, FeatureMap, Head
from ..heads import covariance as covariances
from ..heads.backbone import States, device_of, states
from ..heads.reward import pessimistic
from ..likelihoods import BradleyTerry, Choice, Likelihood, Regression, last_hidden
from ..noise import POSTERIOR, Draw, normals, signed_draws
from ..posterior import Origin, Posterior
from ..predictive import Predictive

HEAD = "head"
KINDS = ("regression", "classification", "reward")


@dataclass(frozen=True)
class Rewards:
    """Of single sequences, [B] each: mean and standard deviation of r(x), and mean - k deviations."""

    ids: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    pessimistic: Tensor


@dataclass(frozen=True)
class Unusual:
    """How unlike the training data inputs are, [B] each, larger is more so. variance: of w . phi, mean over outputs;
    negative_max: -max_c p(c), None but for classes; surprise: -log density of phi under the training features."""

    ids: tuple[str, ...]
    variance: Tensor
    negative_max: Tensor | None
    surprise: Tensor


class LastLayer(Posterior):
    """mean: every tensor of the adapter. kind: regression | classification | reward. label_ids: of a classification.
    uses_model: whether the offset is the model's own output, else 0.

    When not to use it: where the adapter itself is the uncertain part (few examples, features still moving): the
    last layer alone has no opinion about features it was not trained on. Nor for generation: it has no next token.
    """

    family: ClassVar[str] = "last_layer"

    def __init__(
        self,
        adapter_config: Mapping[str, Any],
        mean: Mapping[str, Tensor],
        head: Head,
        feature_map: FeatureMap,
        density: FeatureDensity,
        kind: str,
        uses_model: bool,
        label_ids: Sequence[int],
        origin: Origin,
    ) -> None:
        super().__init__(adapter_config, origin)
        self._mean = {k: whole(v) for k, v in mean.items()}
        self.head, self.map = copy.deepcopy(head).float().cpu(), copy.deepcopy(feature_map).float().cpu()
        self.density = density
        self.head.requires_grad_(False)
        self.kind, self.uses_model, self.label_ids = kind, uses_model, tuple(label_ids)
        check_finite(self._mean, "of the mean")
        check_finite(self.tensors(), "of the last layer")
        if self.head.features != self.map.features:
            raise UserError(
                f"a head on {self.head.features} features has a map that makes {self.map.features}"
            )

    # ------------------------------------------------------------------------------------------------ distribution

    def mean(self) -> Tree:
        return {k: v.clone() for k, v in self._mean.items()}

    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        raise UserError(
            "a posterior of family 'last_layer' has no draws of adapters: its draws are heads, not adapters "
            "(sample_heads); predictions need none"
        )

    def sample_heads(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        """n draws {"head": w [C, F]}; the same draw for the same seed whatever n is."""
        shape = self.head.outputs, self.head.covariance.noise_size
        for number, sign in signed_draws(n, antithetic):
            (noise,) = normals([shape], Draw(seed, POSTERIOR, 0, number), torch.device("cpu"))
            yield {HEAD: self.head.draw(sign * noise)}

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        """Of a draw of `sample_heads`, nats."""
        if tree.keys() != {HEAD} or tree[HEAD].shape != self.head.mean.shape:
            raise UserError(
                f"the density of a last layer is over {{'{HEAD}': {tuple(self.head.mean.shape)}}}, as sample_heads "
                "gives it; an adapter is certain here"
            )
        return float(self.head.log_prob(tree[HEAD]))

    def kl(self, other: Posterior | None = None) -> float:
        """KL(self || other) of the heads, nats; None is the prior N(0, s^2 I). Infinite where the adapters differ."""
        if other is None:
            return float(copy.deepcopy(self.head).double().kl())
        if not isinstance(other, LastLayer):
            raise UserError(f"no KL divergence in closed form from {self.family!r} to {other.family!r}")
        if self.head.mean.shape != other.head.mean.shape:
            raise UserError(
                f"the other last layer has shape {tuple(other.head.mean.shape)}, this one "
                f"{tuple(self.head.mean.shape)}"
            )
        theirs = other.map.tensors()
        for key, value in {**self._mean, **self.map.tensors()}.items():
            same = other._mean.get(key, theirs.get(key))
            if same is None or same.shape != value.shape or not torch.equal(same, value):
                return math.inf
        return float(self.head.kl_to(other.head))

    def precision_diag(self) -> Tree:
        """Infinite: the adapter is certain. That of the head is 1 / head.covariance.diagonal()."""
        return {k: torch.full_like(v, math.inf) for k, v in self._mean.items()}

    def temper(self, tau: float) -> LastLayer:
        if not 0 < tau < math.inf:
            raise UserError(f"temper: tau must be > 0, got {tau}")
        noise = None if self.head.log_noise is None else self.head.log_noise.exp()
        colder = Head(
            self.head.mean, self.head.covariance.scaled(1 / tau), float(self.head.prior_variance), noise
        )
        origin = replace(self.origin, temper=self.origin.temper * tau)
        return LastLayer(
            self.adapter_config, self._mean, colder, self.map, self.density, self.kind, self.uses_model,
            self.label_ids, origin,
        )  # fmt: skip

    def uncertain(self) -> list[str]:
        """The head, which is no tensor of the adapter."""
        return [HEAD]

    # -------------------------------------------------------------------------------------------------- predictions

    def closed_form(
        self, model: PeftModel, batch: Batch, likelihood: Likelihood, adapter: str = "default"
    ) -> tuple[Tensor, Tensor]:
        """f ~ N(m, V): m = offset + mu . phi [B, C], V [B, C, C] with phi^T S_c phi on its diagonal."""
        self.check_likelihood(likelihood)
        with self.in_place(model, adapter):
            found = states(model, batch.to(device_of(model)), likelihood)
        mean, variance = self.moments(found)
        return mean, torch.diag_embed(variance)

    @torch.no_grad()
    def moments(self, found: States) -> tuple[Tensor, Tensor]:
        """Mean and variance [B, C] of f, on the CPU in fp32."""
        mean, variance = self.head.moments(self.features(found))
        return (mean + found.outputs.float().cpu() if self.uses_model else mean), variance

    @torch.no_grad()
    def features(self, found: States) -> Tensor:
        """phi [B, F]; of preference pairs the difference."""
        phi = self.map(found.hidden.float().cpu())
        return phi if found.rejected is None else phi - self.map(found.rejected.float().cpu())

    def predictive(
        self,
        model: PeftModel,
        data: Batch | Sequence[Example],
        likelihood: Likelihood,
        n: int = 10,
        mode: str = "auto",
        *,
        seed: int = 0,
        antithetic: bool = False,
        link: str = "mc",
        until: float | None = None,
        at_least: int = 4,
        with_mean: bool = False,
        keep_logits: bool = False,
        adapter: str = "default",
        tokens: int = 4096,
        memory: int = 1 << 30,
    ) -> Predictive:
        """As for any posterior; the noise of a regression is the one that was learnt, not the likelihood's."""
        return super().predictive(
            model, data, self.with_noise(likelihood), n, mode, seed=seed, antithetic=antithetic, link=link, until=until,
            at_least=at_least, with_mean=with_mean, keep_logits=keep_logits, adapter=adapter, tokens=tokens,
            memory=memory,
        )  # fmt: skip

    def with_noise(self, likelihood: Likelihood) -> Likelihood:
        """`likelihood` with the noise of the head where that is a regression."""
        if isinstance(likelihood, Regression) and self.head.log_noise is not None:
            return replace(likelihood, noise=float((self.head.log_noise / 2).exp()))
        return likelihood

    @torch.no_grad()
    def rewards(
        self,
        model: PeftModel,
        examples: Sequence[Example],
        likelihood: Likelihood,
        pessimism: float = 1.0,
        adapter: str = "default",
        tokens: int = 4096,
    ) -> Rewards:
        """Of each example's `ids` by itself, relative to the average sequence of training. pessimism: k >= 0 in
        mean - k deviations. UserError for a posterior that is not over rewards."""
        self.check_likelihood(likelihood)
        if not isinstance(likelihood, BradleyTerry):
            raise UserError(f"rewards are for a head fitted on preferences; this one is a {self.kind}")
        means, variances, rows = [], [], _numbered(examples)
        order: list[int] = []
        with self.in_place(model, adapter):
            for batch in in_batches([replace(e, rejected=()) for e in rows], tokens):
                hidden = last_hidden(model, batch.to(device_of(model))).float().cpu()
                mean, variance = self.head.moments(self.map(hidden))
                if self.uses_model:
                    mean = mean + (hidden @ likelihood.weight.float().cpu())[:, None]
                means.append(mean[:, 0])
                variances.append(variance[:, 0])
                order += [int(name) for name in batch.ids]
        back = torch.tensor(order).argsort()
        mean, variance = torch.cat(means)[back], torch.cat(variances)[back]
        ids = tuple(e.id for e in examples)
        return Rewards(ids, mean, variance.sqrt(), pessimistic(mean, variance, pessimism))

    @torch.no_grad()
    def ood_scores(
        self,
        model: PeftModel,
        examples: Sequence[Example],
        likelihood: Likelihood,
        adapter: str = "default",
        tokens: int = 4096,
    ) -> Unusual:
        """Three scores of how unusual inputs are, from one run of the model."""
        self.check_likelihood(likelihood)
        parts, order = [], []
        with self.in_place(model, adapter):
            for batch in in_batches(_numbered(examples), tokens):
                parts.append(states(model, batch.to(device_of(model)), likelihood))
                order += [int(name) for name in batch.ids]
        back = torch.tensor(order).argsort()
        variances, surprises, largest = [], [], []
        for found in parts:
            mean, variance = self.moments(found)
            variances.append(variance.mean(-1))
            surprises.append(-self.density.log_density(self.features(found)))
            p = (mean / (1 + math.pi / 8 * variance).sqrt() / self.origin.output_temperature).softmax(-1)
            largest.append(-p.amax(-1))
        negative_max = torch.cat(largest)[back] if self.kind == "classification" else None
        ids = tuple(e.id for e in examples)
        return Unusual(ids, torch.cat(variances)[back], negative_max, torch.cat(surprises)[back])

    def check_likelihood(self, likelihood: Likelihood) -> None:
        """UserError for another likelihood than the head was fitted with, or other labels."""
        kind = kind_of(likelihood)
        if kind != self.kind:
            raise UserError(
                f"a last layer for {self.kind} cannot predict under {type(likelihood).__name__}, a {kind}"
            )
        if isinstance(likelihood, Choice) and tuple(likelihood.label_ids) != self.label_ids:
            raise UserError(
                f"the last layer has a row for each of the label tokens {list(self.label_ids)}, the likelihood has "
                f"{list(likelihood.label_ids)}"
            )

    @contextmanager
    def in_place(self, model: PeftModel, adapter: str = "default") -> Iterator[None]:
        """Inside, the adapter of `model` holds the mean, and the model is in eval mode; then what was there before."""
        before = {k: p.detach().clone() for k, p in adapter_tensors(model, adapter).items()}
        same = before.keys() == self._mean.keys() and all(
            torch.equal(whole(before[k]), v) for k, v in self._mean.items()
        )
        training = model.training
        model.eval()
        if not same:
            self.write(model, self._mean, adapter)
        try:
            yield
        finally:
            if not same:
                self.write(model, before, adapter)
            model.train(training)

    # ----------------------------------------------------------------------------------------------------- on disk

    def tensors(self) -> Tree:
        kind = [float(KINDS.index(self.kind)), float(self.uses_model)]
        found = {
            "head.mean": self.head.mean.detach(),
            "head.prior_variance": self.head.prior_variance.view(1),
            "kind": torch.tensor(kind),
            "label_ids": torch.tensor([float(i) for i in self.label_ids]),
        }
        if self.head.log_noise is not None:
            found["head.log_noise"] = self.head.log_noise.detach()
        groups = (
            ("covariance", self.head.covariance.tensors()),
            ("map", self.map.tensors()),
            ("density", self.density.tensors()),
        )
        return found | {f"{group}.{name}": value for group, own in groups for name, value in own.items()}

    @classmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> LastLayer:
        def group(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}

        try:
            own = group("head")
            covariance = covariances.from_tensors(group("covariance"))
            head = Head(own["mean"], covariance, float(own["prior_variance"]), None)
            if "log_noise" in own:
                head.log_noise = torch.nn.Parameter(own["log_noise"])
            kind, uses_model = (int(x) for x in tensors["kind"])
            labels = [int(i) for i in tensors["label_ids"]]
            made = FeatureMap.from_tensors(group("map")), FeatureDensity.from_tensors(group("density"))
            return cls(adapter_config, mean, head, *made, KINDS[kind], bool(uses_model), labels, origin)
        except (KeyError, IndexError, ValueError, AssertionError) as error:
            raise UserError(f"the tensors of the last layer do not belong together: {error}") from error


def kind_of(likelihood: Likelihood) -> str:
    """What a last layer under this likelihood is. UserError for one that has no targets of its own."""
    if isinstance(likelihood, Choice):
        return "classification"
    if isinstance(likelihood, Regression):
        return "regression"
    if isinstance(likelihood, BradleyTerry):
        return "reward"
    raise UserError(
        f"a last layer needs one target an example (Choice, Regression or BradleyTerry); "
        f"{type(likelihood).__name__} has none"
    )


def _numbered(examples: Sequence[Example]) -> list[Example]:
    """Named by their place, so that results can be put back in order whatever they are called."""
    if not examples:
        raise UserError("no examples: give at least one")
    return [replace(e, id=str(n)) for n, e in enumerate(examples)]
