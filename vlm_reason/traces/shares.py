"""A window in shares: what each process sampled and measured, put together as if one process had done all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..types import Scores, TraceGroup
from .measure import Measured
from .mismatch import Mismatch

NOTHING_DRAWN = {"log_evidence": float("-inf"), "logp_answer": float("-inf"), "worst_token": float("-inf")}
"""What a slot of a short group holds; 0 (False) everywhere else."""


@dataclass(frozen=True)
class Share:
    """One process's part of a window: its groups (problems `indices` of the window), their scores (None without
    groups), and the tokens of groups that were sampled and thrown away."""

    indices: tuple[int, ...]
    groups: tuple[TraceGroup, ...]
    measured: Measured | None
    discarded_tokens: int = 0


def merged(shares: Sequence[Share]) -> tuple[list[TraceGroup], Measured, int]:
    """(groups, their scores, tokens thrown away) of the whole window, in the window's order."""
    pairs = [(share, share.measured) for share in shares if share.measured is not None]
    where = torch.tensor([i for share, _ in pairs for i in share.indices]).argsort()
    order = where.tolist()
    groups = [group for share, _ in pairs for group in share.groups]
    parts = [measured for _, measured in pairs]
    verdicts = [v for part in parts for v in part.verdicts]
    right = _right(parts)
    measured = Measured(
        _scores([part.scores for part in parts], where),
        tuple(verdicts[i] for i in order),
        sum(part.scored_tokens for part in parts),
        all(part.ratio_known for part in parts),
        None if right is None else tuple(right[i] for i in order),
        sum(part.reused_tokens for part in parts),
        sum((part.mismatch for part in parts), Mismatch()),
    )
    return [groups[i] for i in order], measured, sum(share.discarded_tokens for share in shares)


def _right(parts: Sequence[Measured]) -> list[tuple[float, ...]] | None:
    """A share without one sampled answer has only incomplete traces if another share has some: they are wrong."""
    if all(part.right is None for part in parts):
        return None
    sampled = any(answers for part in parts for traces in part.verdicts for answers in traces)
    out: list[tuple[float, ...]] = []
    for part in parts:
        own = any(answers for traces in part.verdicts for answers in traces)
        if part.right is None or (sampled and not own):
            out += [(0.0,) * len(traces) for traces in part.verdicts]
        else:
            out += part.right
    return out


def _scores(parts: Sequence[Scores], order: Tensor) -> Scores:
    """All groups' scores: short groups are padded to the longest, then the window's order is restored."""
    columns: dict[str, Tensor | None] = {}
    for field in fields(Scores):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = (
            None if values[0] is None else _stacked(values, NOTHING_DRAWN.get(field.name, 0))[order]
        )
    return Scores(**columns)  # type: ignore[arg-type]  # the optional ones are None in every part or in none


def _stacked(values: Sequence[Tensor], padding: float) -> Tensor:
    width = max(v.shape[1] for v in values) if values[0].ndim > 1 else 0
    padded = []
    for value in values:
        if value.ndim > 1 and value.shape[1] < width:
            shape = (value.shape[0], width - value.shape[1], *value.shape[2:])
            value = torch.cat([value, value.new_full(shape, padding)], dim=1)
        padded.append(value)
    return torch.cat(padded)
