"""The door to every way of computing a posterior's predictive."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from ...engines.hf import evaluating
from ...errors import UserError, nearest
from ...models.adapters import use_adapter
from ..artefact import Tree
from ..examples import Batch, Example
from ..likelihoods import Likelihood, Regression, Tokens
from .draws import Outputs, Stop, adapter_kept, outputs_of_draws, way_of
from .gaussian import closed_form, has_closed_form, has_covariance, linearised
from .result import Predictive
from .rows import Rows
from .summary import joined, of_draws, of_gaussian, only, refuse_sequences, taken

if TYPE_CHECKING:
    from ..posterior import Posterior

Mode = Literal["auto", "mean", "sequential", "batched", "linearised", "closed_form"]
MODES: tuple[str, ...] = get_args(Mode)
LINKS = ("mc", "probit")


@torch.no_grad()
def predictive(
    posterior: Posterior,
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
    """See `Posterior.predictive`."""
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{nearest(mode, MODES)}")
    if link not in LINKS:
        raise UserError(f"link must be one of {', '.join(LINKS)}, got {link!r}{nearest(link, LINKS)}")
    for name, value in (("n", n), ("tokens", tokens), ("memory", memory), ("at_least", at_least)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    stop = None
    if until is not None:
        if not until > 0:
            raise UserError(f"until must be > 0 nats, got {until}")
        if isinstance(likelihood, Regression | Tokens):
            raise UserError(f"until is for entropies of classes, and {type(likelihood).__name__} has none")
        at_least = max(2, at_least)
        stop = Stop(
            until, max(4, at_least + at_least % 2) if antithetic else at_least
        )  # whole pairs, two of them
    mode = _chosen(posterior) if mode == "auto" else mode
    if stop is not None and mode not in ("sequential", "batched"):
        raise UserError(
            f"until is for draws that cost a run each (sequential, batched), not for mode {mode!r}"
        )
    asked = _Asked(
        posterior, model, Rows(data), likelihood, n, seed, antithetic, link, with_mean, keep_logits, adapter, tokens,
        memory, stop,
    )  # fmt: skip
    with ExitStack() as inside:
        inside.enter_context(use_adapter(model, adapter))
        inside.enter_context(evaluating(model))
        inside.enter_context(adapter_kept(model, adapter))
        if mode in ("sequential", "batched"):
            return asked.of_draws(mode)
        posterior.write(model, posterior.mean(), adapter)
        if mode == "mean" or (mode == "linearised" and not posterior.uncertain()):
            return asked.of_mean(mode)
        return asked.linearised(mode) if mode == "linearised" else asked.closed_form()


def _chosen(posterior: Posterior) -> str:
    if has_closed_form(posterior):
        return "closed_form"
    return "batched" if posterior.uncertain() else "mean"


@dataclass(frozen=True)
class _Asked:
    """One call. `write` has put the mean in place, but for draws."""

    posterior: Posterior
    model: PeftModel
    rows: Rows
    likelihood: Likelihood
    n: int
    seed: int
    antithetic: bool
    link: str
    with_mean: bool
    keep: bool
    adapter: str
    tokens: int
    memory: int
    stop: Stop | None

    def of_draws(self, mode: str) -> Predictive:
        posterior = self.posterior
        way = (
            "sequential"
            if mode == "sequential"
            else way_of(posterior, self.model, self.likelihood, self.adapter)
        )
        found = outputs_of_draws(
            posterior, self.model, self.rows, self.likelihood, self.n, way, seed=self.seed, antithetic=self.antithetic,
            adapter=self.adapter, tokens=self.tokens, memory=self.memory, stop=self.stop, with_mean=self.with_mean,
        )  # fmt: skip
        mode = "sequential" if way == "sequential" else mode
        result = self._summed(found.f, found.mean, mode) if self.stop is None else self._adaptive(found, mode)
        return result

    def of_mean(self, mode: str) -> Predictive:
        if has_closed_form(self.posterior):  # the mean is not all in the adapter
            m, _ = self._outputs()
            return self._summed(m[None], m, mode)
        device = next(self.model.parameters()).device
        parts, order = [], []
        for numbers, batch in self.rows.batches(range(len(self.rows)), self.tokens):
            parts.append(self.likelihood.outputs(self.model, batch.to(device)).float().cpu())
            order += numbers
        f = torch.cat(parts)[torch.tensor(order).argsort()]
        return self._summed(f[None], f, mode)

    def linearised(self, mode: str) -> Predictive:
        if has_closed_form(self.posterior):  # linear already
            return self._gaussian(*self._outputs(), mode, self.link)
        by_draws = not has_covariance(self.posterior)
        if by_draws and self.link == "probit":
            self.posterior._lacks('covariance in closed form: link "probit" needs one')
        draws = list(self.posterior.sample(self.n, self.seed, self.antithetic)) if by_draws else None
        refuse_sequences(self.likelihood, mode)
        m, found = self._linearised(draws)
        return self._summed(found, m, mode) if by_draws else self._gaussian(m, found, mode, self.link)

    def _linearised(self, draws: list[Tree] | None) -> tuple[Tensor, Tensor]:
        return linearised(
            self.posterior,
            self.model,
            self.rows,
            self.likelihood,
            self.adapter,
            self.tokens,
            self.memory,
            draws,
        )

    def closed_form(self) -> Predictive:
        refuse_sequences(self.likelihood, "closed_form")
        if has_closed_form(self.posterior):
            return self._gaussian(*self._outputs(), "closed_form", self.link)
        if not has_covariance(self.posterior):
            self.posterior._lacks("predictive in closed form: use batched")
        if not self.posterior.uncertain():
            return self.of_mean("closed_form")
        m, v = self._linearised(None)
        return self._gaussian(m, v, "closed_form", "probit")

    def _outputs(self) -> tuple[Tensor, Tensor]:
        return closed_form(self.posterior, self.model, self.rows, self.likelihood, self.adapter, self.tokens)

    def _targets(self, index: Sequence[int] | None = None) -> Batch:
        return only(self.rows.batch, range(len(self.rows)) if index is None else index)

    def _summed(
        self, f: Tensor, mean: Tensor | None, mode: str, index: Sequence[int] | None = None
    ) -> Predictive:
        temperature = self.posterior.origin.output_temperature
        return of_draws(self.likelihood, f, self._targets(index), mode, temperature, mean, self.keep)

    def _gaussian(self, m: Tensor, v: Tensor, mode: str, link: str) -> Predictive:
        return of_gaussian(
            self.likelihood, m, v, self._targets(), mode, link, self.n, self.seed,
            self.posterior.origin.output_temperature, self.keep,
        )  # fmt: skip

    def _adaptive(self, found: Outputs, mode: str) -> Predictive:
        """Examples that had the same number of draws together."""
        parts, order, most = [], [], int(found.used.max())
        for count in found.used.unique().tolist():
            index = (found.used == count).nonzero().squeeze(-1).tolist()
            mean = None if found.mean is None else found.mean[index]
            part = self._summed(found.f[:count, index], mean, mode, index)
            if part.logits is not None:
                part = replace(part, logits=found.f[:most, index] / self.posterior.origin.output_temperature)
            parts.append(part)
            order += index
        result = taken(joined(parts), torch.tensor(order).argsort().tolist())
        return replace(result, n=most, draws_used=found.used)
