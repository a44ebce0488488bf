"""The forward and backward passes of one optimiser step: rows in micro-batches of one adapter and a token budget.

    loss = - sum_rows objective(row) / scale

The coefficients are fixed numbers by now: the loss is a sum over rows, and the cut into micro-batches cannot change it.
A micro-batch is a forest: rows behind one prompt share it, so the K traces of a group stay together where they fit, and
the two adapters, whose prompts differ, have trees of their own. Only tokens with a coefficient meet the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.adapters import use_adapter
from ..scoring.attention import tree_attention
from ..scoring.logprobs import batches as scoring_batches
from ..scoring.logprobs import score_sequences
from .recipe import Phase
from .rows import Row, rows_objective


class Batch(NamedTuple):
    """What one forward and backward pass takes: rows of one adapter, and the tokens it forwards. `counts` False: a pass
    run for its collectives alone, with loss and gradient 0."""

    adapter: str
    rows: list[Row]
    tokens: int
    counts: bool = True


@dataclass(frozen=True)
class StepCost:
    """What one step's passes did: the loss (detached, on the device) and the tokens forwarded, a shared prefix once."""

    loss: Tensor
    forwarded: int


def backward_batches(
    model: nn.Module,
    batches: Sequence[Batch],
    phase: Phase,
    scale: float,
    backward: Callable[[Tensor, bool], None],
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> StepCost:
    """Accumulate the gradient of `- sum_rows objective(row) / scale`: `backward(part of the loss, whether it is the
    last part)` once a micro-batch. `precision`: the context of each forward pass (autocast)."""
    loss = torch.zeros((), device=next(model.parameters()).device)
    for i, (adapter, rows, _, counts) in enumerate(batches):
        with use_adapter(model, adapter), tree_attention(model):
            with precision():
                logps, _ = score_sequences(model, _pairs(rows), wanted=_wanted(rows))
            part = -rows_objective(rows, logps, phase) / scale
            if not counts:
                part = part * 0.0
            backward(part, i == len(batches) - 1)
        loss += part.detach()
    return StepCost(loss, sum(batch.tokens for batch in batches))


def cut_batches(model: nn.Module, rows: Sequence[Row], token_budget: int) -> list[Batch]:
    """Micro-batches of at most `token_budget` tokens: one adapter each, rows of one prompt together while they fit."""
    out = []
    for adapter in sorted({row.adapter for row in rows}, reverse=True):
        mine = [row for row in rows if row.adapter == adapter]
        for members, tokens in scoring_batches(model, _pairs(mine), token_budget, _wanted(mine)):
            out.append(Batch(adapter, [mine[i] for i in members], tokens))
    return out


def _pairs(rows: Sequence[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(row.context, row.target) for row in rows]


def _wanted(rows: Sequence[Row]) -> list[list[bool]]:
    """Tokens without a coefficient are context: no LM-head row, and no KL term either (rows.py)."""
    return [[w != 0.0 for w in row.weight] for row in rows]
