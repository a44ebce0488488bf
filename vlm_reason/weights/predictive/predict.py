"""The door to every way of computing a posterior's predictive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from ...errors import UserError, nearest
from ..examples import Batch, Example, in_batches
from ..likelihoods import Likelihood
from ..per_row import draws_in_rows, stack
from .result import Predictive, from_logits

if TYPE_CHECKING:
    from ..posterior import Posterior

Mode = Literal["auto", "mean", "sequential", "batched", "linearised", "closed_form"]
MODES: tuple[str, ...] = get_args(Mode)


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
    batches = [data] if isinstance(data, Batch) else list(in_batches(data, tokens))
    before = None
    trees = list(posterior.sample(n, seed, antithetic)) if mode != "mean" else [posterior.mean()]
    parts: list[Predictive] = []
    for batch in batches:
        if mode in ("auto", "batched"):
            with draws_in_rows(model, stack(trees), adapter):
                f = likelihood.outputs(model, batch)
            logits = f.view(-1, len(batch), f.shape[-1])
            logits = logits.expand(len(trees), -1, -1)
        else:
            passes = []
            for tree in trees:
                posterior.write(model, tree, adapter)
                passes.append(likelihood.outputs(model, batch))
            logits = torch.stack(passes)
        parts.append(
            from_logits(batch.ids, logits / posterior.origin.output_temperature, mode, before, keep_logits)
        )
    whole = joined(parts)
    return whole if isinstance(data, Batch) else in_order(whole, [e.id for e in data])


def joined(parts: Sequence[Predictive]) -> Predictive:
    """Batches as one."""
    first = parts[0]
    changes: dict[str, object] = {"ids": tuple(i for p in parts for i in p.ids)}
    for f in fields(Predictive):
        value = getattr(first, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = torch.cat([getattr(p, f.name) for p in parts], 1 if f.name == "logits" else 0)
    return replace(first, **changes)  # type: ignore[arg-type]


def in_order(result: Predictive, ids: Sequence[str]) -> Predictive:
    """The rows of `result` in the order of `ids`."""
    place = {name: n for n, name in enumerate(result.ids)}
    index = torch.tensor([place[i] for i in ids])
    changes: dict[str, object] = {"ids": tuple(ids)}
    for f in fields(Predictive):
        value = getattr(result, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = value[:, index] if f.name == "logits" else value[index]
    return replace(result, **changes)  # type: ignore[arg-type]
