"""Expectations over every group that could have been drawn, by enumeration.

An atom is what one draw can be: a trace, or a trace with the M answers sampled behind it. A group is a K-tuple of
independent atoms; all of them are enumerated with their probability, so a mean over groups is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

MAX_ENTRIES = 20_000_000


def tuples(atoms: int, size: int) -> Tensor:
    """All `size`-tuples of range(atoms), [atoms^size, size], last place fastest. UserError if they do not fit."""
    if size < 1:
        raise UserError(f"K (traces a group) must be >= 1, got {size}")
    if atoms**size * size > MAX_ENTRIES:
        raise UserError(
            f"{atoms} possible draws to the power K={size} are too many groups to enumerate; "
            "take a smaller world, K or M"
        )
    axes = [torch.arange(atoms)] * size
    return torch.cartesian_prod(*axes).reshape(-1, size)


@dataclass(frozen=True)
class Atoms:
    """Everything one draw can be. trace [S] the string, answers [S, M] the answers behind it (M = 0: none sampled),
    logp [K, S] the log-probability of the atom in each of the K slots."""

    trace: Tensor
    answers: Tensor
    logp: Tensor


def make_atoms(slots: Tensor, logp_answer: Tensor, samples: int) -> Atoms:
    """Atoms of draws z ~ slots[k] ([K, N] log-probabilities), each followed by `samples` answers ~ logp_answer [N, A].

    Traces with probability 0 in every slot are left out.
    """
    trace = (~slots.isneginf().all(0)).nonzero().flatten()
    if samples == 0:
        return Atoms(trace, torch.zeros(len(trace), 0, dtype=torch.long), slots[:, trace])
    outcomes = tuples(logp_answer.shape[1], samples)
    repeated = trace.repeat_interleave(len(outcomes))
    answers = outcomes.repeat(len(trace), 1)
    logp = slots[:, repeated] + logp_answer[repeated.unsqueeze(1), answers].sum(1)
    return Atoms(repeated, answers, logp)


def possible_groups(atoms: Atoms, size: int) -> tuple[Tensor, Tensor]:
    """All groups of positive probability, as atom numbers [G, K], and their log-probabilities [G]."""
    groups = tuples(atoms.logp.shape[1], size)
    logp = atoms.logp[torch.arange(size), groups].sum(1)
    possible = ~logp.isneginf()
    return groups[possible], logp[possible]
