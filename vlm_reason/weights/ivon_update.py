"""IVON's arithmetic, piece by piece and in place: one pass over what the gradients say, one that writes the next draw.

State is kept as s = h + delta, the precision in units of lambda (sigma^2 = 1 / (lambda s)); in it the update is

    u = (1 - beta2) (lambda n g - 1 + delta / s)      "price"; with lambda g^2 / s in place of lambda n g for "gradsq"
    s <- s (1 + u + u^2 / 2)
    mu <- beta1 mu + (1 - beta1) g
    m <- m - lr kappa clip((mu / (1 - beta1^t) + delta m) / s, -xi, xi)
    value <- m + eps / sqrt(lambda s)

which is what `ivon` states of h: u is its w / (h + delta). 1 + u + u^2 / 2 >= 1/2, so s stays positive whatever comes.
Pieces are 65,536 weights at most, so that the five tensors worked on and one more stay in the cache between passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise import Block, Draw, Piece, cut_into_blocks, for_each_block, round_stochastically
from .shards import global_start, local, size_of_whole

Group = dict[str, Any]
STATE = ("mean", "precision", "momentum")
SUMS = ("grad_sum", "curvature_sum")


class Flat:
    """One parameter's tensors, local and one-dimensional. `value` may be a copy: `write_back` puts it in its place."""

    def __init__(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        self.state = state
        self._place = local(parameter.detach())
        self.value = self._place.contiguous().view(-1)
        self.kept = {k: local(state[k]).view(-1) for k in (*STATE, *SUMS) if k in state}
        gradient = parameter.grad
        self.gradient = None if gradient is None else local(gradient.detach()).reshape(-1)

    def write_back(self) -> None:
        if self.value.data_ptr() != self._place.data_ptr():
            self._place.copy_(self.value.view(self._place.shape))


@dataclass
class Part:
    """A piece of one parameter: views, fp32 but for value and gradient. `normals`: eps of the draw to be written.
    `old_normals`: eps of the one the gradient was taken at, only where the parameter is coarser than fp32."""

    flat: Flat
    piece: Piece
    block: Block
    normals: Tensor
    old_normals: Tensor | None

    def __post_init__(self) -> None:
        lo, hi = self.piece.lo, self.piece.hi
        self.value = self.flat.value[lo:hi]
        self.mean, self.precision, self.momentum = (self.flat.kept[k][lo:hi] for k in STATE)

    def gradient(self) -> Tensor | None:
        whole = self.flat.gradient
        return None if whole is None else whole[self.piece.lo : self.piece.hi].float()

    def sums(self) -> list[Tensor]:
        """Running means over mc_samples of g, and of n g or g^2."""
        return [self.flat.kept[k][self.piece.lo : self.piece.hi] for k in SUMS]


def for_each_part(
    group: Group,
    state: Mapping[Tensor, dict[str, Any]],
    now: Draw | None,
    draw: Draw,
    work: Callable[[Part], None],
) -> None:
    """work(part) for all of the group's weights. `now`: the draw the gradients were taken at, if they are looked at."""
    starts = _starts(group)
    kinds = dict.fromkeys((local(p).device, p.dtype) for p in group["params"])
    for device, dtype in kinds:
        chosen = [n for n, p in enumerate(group["params"]) if (local(p).device, p.dtype) == (device, dtype)]
        flats = [Flat(group["params"][n], state[group["params"][n]]) for n in chosen]
        blocks = cut_into_blocks(
            [(starts[n], flat.value.numel()) for n, flat in zip(chosen, flats, strict=True)]
        )
        again = now if dtype != torch.float32 else None

        def work_on(
            block: Block,
            flats: list[Flat] = flats,
            device: torch.device = device,
            again: Draw | None = again,
        ) -> None:
            new = draw.normal(block.number, block.stop, device)
            old = None if again is None else again.normal(block.number, block.stop, device)
            for piece in block.pieces:
                place = slice(piece.offset, piece.offset + piece.hi - piece.lo)
                work(Part(flats[piece.tensor], piece, block, new[place], None if old is None else old[place]))

        for_each_block(blocks, device, work_on)
        for flat in flats:
            flat.write_back()


def _starts(group: Group) -> list[int]:
    """Global index of the first local element of each parameter."""
    starts, at = [], group["start"]
    for p in group["params"]:
        starts.append(at + global_start(p))
        at += size_of_whole(p)
    return starts


def take_in(part: Part, group: Group, last: bool) -> None:
    """The gradient into the running sums, or into q if this is the last draw of an update."""
    samples, gradient = group["mc_samples"], part.gradient()
    if samples == 1:
        if gradient is not None:
            _update(part, group, gradient, *_factors(part, group, gradient))
        return
    grad_sum, curvature_sum = part.sums()
    if gradient is not None:
        grad_sum.add_(gradient, alpha=1 / samples)
        curvature_sum.addcmul_(*_factors(part, group, gradient), value=1 / samples)
    if last and part.flat.state.get("seen", False):
        _update(part, group, grad_sum, curvature_sum, torch.ones((), device=grad_sum.device))
        grad_sum.zero_()
        curvature_sum.zero_()


def _factors(part: Part, group: Group, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(n, g) for "price", (g, g) for "gradsq"."""
    if group["hess_approx"] == "gradsq":
        return gradient, gradient
    if part.old_normals is None:
        return part.value - part.mean, gradient
    # the weights carry rounding noise too; sigma eps alone gives an unbiased estimate
    return part.precision.rsqrt().mul_(part.old_normals).mul_(group["ess"] ** -0.5), gradient


def _update(part: Part, group: Group, gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """mu, s, m from the mean of g and that of n g (or g^2), which is left * right."""
    mean, precision, momentum = part.mean, part.precision, part.momentum
    delta, rate = float(group["weight_decay"]), 1 - group["beta2"]

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=mean.device)

    if group["hess_approx"] == "price":
        u = torch.addcmul(number(-rate), left, right, value=rate * group["ess"])
        if delta:
            u.addcdiv_(number(1.0), precision, value=rate * delta)
    else:
        u = torch.addcmul(number(rate * delta), left, right, value=rate * group["ess"])
        u.div_(precision).sub_(rate)
    u.addcmul_(u, u, value=0.5)
    precision.addcmul_(precision, u)

    momentum.lerp_(gradient, 1 - group["beta1"])
    debias = 1 - group["beta1"] ** float(part.flat.state["step"])
    if delta:
        move = torch.add(momentum, mean, alpha=delta * debias, out=u).div_(precision)
    else:
        move = torch.div(momentum, precision, out=u)
    radius = float(group["clip_radius"]) * debias
    if radius != math.inf:
        move.clamp_(-radius, radius)
    kappa = group["hess_init"] + delta if group["rescale_lr"] else 1.0
    mean.add_(move, alpha=-float(group["lr"]) * kappa / debias)


def write_draw(part: Part, group: Group, draw: Draw) -> None:
    """value = m + sigma eps."""
    value, scale = part.value, group["ess"] ** -0.5
    root = part.precision.rsqrt()
    if value.dtype == torch.float32:
        torch.addcmul(part.mean, root, part.normals, value=scale, out=value)
        return
    sample = torch.addcmul(part.mean, root, part.normals, value=scale)
    if value.dtype == torch.bfloat16:
        bits = draw.bits(part.block.number, part.block.stop, value.device)
        piece = part.piece
        sample = round_stochastically(sample, bits[piece.offset : piece.offset + piece.hi - piece.lo])
    value.copy_(sample)
