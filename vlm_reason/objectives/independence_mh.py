"""Independence Metropolis over the draws of a group: the current state against each draw in turn.

    accept z_k with probability min(1, w_k / w_current),   w = pi e / r

With draws from r this leaves the posterior invariant: started from a posterior sample (a problem's stored
chain in slot 0) every state is one, at any K. TRICE, Phan et al. 2023 (arXiv 2312.02179).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .groups import as_groups, drawn


@dataclass(frozen=True)
class Chain:
    """occupancy [groups, K]  share of the K states (start, and after each proposal) spent at each draw; sums to 1,
                              to 0 for a group without weight. A state of weight 0 is nowhere: its time is not counted.
    last      [groups]        index of the final state, to be kept as the problem's chain; -1 for none.
    accepted  [groups, K]     True where the draw was accepted (slot 0 is the start, not a proposal)."""

    occupancy: Tensor
    last: Tensor
    accepted: Tensor


def metropolis(logw: Tensor, uniforms: Tensor, mask: Tensor | None = None) -> Chain:
    """Run the chain over slots 0..K-1 with the given uniforms `[groups, K]` in [0, 1) (that of slot 0 is
    unused).

    The first drawn trace starts the chain. A draw of weight 0 is never accepted; while the current state has
    weight 0 any draw with weight is. Masked slots pass without a step.
    """
    logw, mask = as_groups(logw.detach(), mask)
    if uniforms.shape != logw.shape:
        raise UserError(
            f"uniforms must have the shape of logw {list(logw.shape)}, got {list(uniforms.shape)}"
        )
    if bool(((uniforms < 0) | (uniforms >= 1))[mask].any()):
        raise UserError("uniforms must be in [0, 1)")
    groups, size = logw.shape
    rows = torch.arange(groups, device=logw.device)
    current = torch.full((groups,), -1, device=logw.device)
    occupancy = torch.zeros_like(logw)
    accepted = torch.zeros_like(mask)
    for k in range(size):
        proposal = logw[:, k]
        weight = torch.where(
            current >= 0, logw[rows, current.clamp(min=0)], proposal.new_tensor(float("-inf"))
        )
        alive = mask[:, k] & ~proposal.isneginf()
        # log u < log w_k - log w_current, written so that no -inf meets another.
        threshold = weight.masked_fill(weight.isneginf(), 0.0) + uniforms[:, k].to(logw.dtype).log()
        take = alive & (weight.isneginf() | (threshold < proposal))
        accepted[:, k] = take & (k > 0) & (mask[:, :k].any(1))
        current = torch.where(take, torch.full_like(current, k), current)
        visited = (current >= 0) & mask[:, k]
        occupancy[rows, current.clamp(min=0)] += visited.to(logw.dtype)
    states = occupancy.sum(1, keepdim=True).clamp(min=1)
    return Chain(occupancy / states, current, accepted)


def acceptance_rate(chain: Chain, mask: Tensor) -> Tensor:
    """Accepted share of the proposals, `[groups]`; 0 where there was none. Near 0 the chain stands still."""
    proposals = (drawn(mask) - 1).clamp(min=1)
    return chain.accepted.sum(1) / proposals
