"""Counter-based Gaussian noise: what an element gets depends on its place in a global index, and on nothing else.

    eps_i = normal(seed, stream, step, draw, block)[i mod 65536],    block = i div 65536

One generator a block: how elements are grouped into tensors or cut into shards makes no difference, and a run that is
resumed draws what it would have drawn.

On the CPU: Philox bits, 16 to a number, look up one of 65,536 equally likely quantiles of the normal law, scaled to
variance 1 (fourth moment 2.9992, none beyond 4.33). It takes a third of the time of torch's generator, which
alone takes as long as a whole AdamW step. On CUDA: torch's generator. The same seed gives different noise on the two.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

BLOCK = 65_536
TRAINING, REQUESTED, POSTERIOR, ROUNDING = range(4)
"""Streams: the draws a gradient is taken at, those asked for by seed, those of a saved posterior, rounding bits."""
_VECTOR = (
    16  # torch's CPU kernel makes normals 16 at a time; a whole number of them is a prefix of a longer fill
)


@dataclass(frozen=True)
class Draw:
    """One perturbation of all weights."""

    seed: int
    stream: int
    step: int = 0
    draw: int = 0

    def block_seed(self, block: int, purpose: int = 0) -> int:
        """64 bits, the lower 32 of which, all that torch's CPU generator takes, differ between blocks of a draw."""
        start = self._hash(purpose)
        return (start & ~0xFFFFFFFF) | ((start + block) & 0xFFFFFFFF)

    def _hash(self, purpose: int = 0) -> int:
        packed = struct.pack("<5Q", self.seed % 2**64, self.stream, self.step, self.draw, purpose)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")

    def normal(self, block: int, stop: int, device: torch.device) -> Tensor:
        """The block's first `stop` standard normals, fp32."""
        if device.type != "cpu":
            generator = torch.Generator(device).manual_seed(self.block_seed(block))
            return torch.empty(BLOCK, device=device).normal_(generator=generator)[:stop]
        words = np.random.Philox(key=[self._hash(), block]).random_raw(-(-stop // 4))
        places = words.astype("<u8", copy=False).view("<u2")[:stop].astype(np.int64)
        return _quantiles().index_select(0, torch.from_numpy(places))

    def bits(self, block: int, stop: int, device: torch.device) -> Tensor:
        """The block's first `stop` uniform integers below 2^16, int32, for stochastic rounding."""
        size = stop if device.type == "cpu" else BLOCK
        generator = torch.Generator(device).manual_seed(self.block_seed(block, ROUNDING))
        return torch.empty(size, dtype=torch.int32, device=device).random_(0, 1 << 16, generator=generator)[
            :stop
        ]


@cache
def _quantiles() -> Tensor:
    """Of the middles of 65,536 equal parts of probability, fp32 [65536]; their mean square is 1."""
    middle = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values = torch.special.ndtri(middle)
    return (values / values.square().mean().sqrt()).float()


@dataclass(frozen=True)
class Piece:
    """Elements [lo, hi) of tensor number `tensor`; the first has place `offset` in its block."""

    tensor: int
    lo: int
    hi: int
    offset: int


@dataclass(frozen=True)
class Block:
    number: int
    stop: int
    pieces: tuple[Piece, ...]


def cut_into_blocks(spans: Sequence[tuple[int, int]]) -> list[Block]:
    """spans: (global index of the first element, number of elements) of each tensor. Blocks in rising order; `stop` is
    how much of a block's noise its pieces need."""
    pieces: dict[int, list[Piece]] = {}
    for tensor, (start, size) in enumerate(spans):
        lo = 0
        while lo < size:
            block, offset = divmod(start + lo, BLOCK)
            hi = min(size, lo + BLOCK - offset)
            pieces.setdefault(block, []).append(Piece(tensor, lo, hi, offset))
            lo = hi
    return [
        Block(number, max(p.offset + p.hi - p.lo for p in own), tuple(own))
        for number, own in sorted(pieces.items())
    ]


def for_each_block(blocks: Sequence[Block], device: torch.device, work: Callable[[Block], None]) -> None:
    """work(block) for all of them, without gradients. On the CPU each of torch's threads takes whole blocks, with a
    single thread inside: splitting every small operation over the threads costs more than it gains."""
    threads = torch.get_num_threads()

    @torch.no_grad()
    def run(block: Block) -> None:
        work(block)

    if device.type != "cpu" or threads == 1 or len(blocks) < 4:
        for block in blocks:
            run(block)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(run, blocks):
                pass
    finally:
        torch.set_num_threads(threads)


def normals(shapes: Sequence[tuple[int, ...]], draw: Draw, device: torch.device) -> list[Tensor]:
    """White noise of these shapes, one behind the other in the global index, fp32."""
    found = [torch.empty(shape, device=device) for shape in shapes]
    spans, at = [], 0
    for tensor in found:
        spans.append((at, tensor.numel()))
        at += tensor.numel()

    def fill(block: Block) -> None:
        noise = draw.normal(block.number, block.stop, device)
        for piece in block.pieces:
            target = found[piece.tensor].view(-1)[piece.lo : piece.hi]
            target.copy_(noise[piece.offset : piece.offset + piece.hi - piece.lo])

    for_each_block(cut_into_blocks(spans), device, fill)
    return found


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the fraction of the gap covered, so E[result] = values. `bits`:
    uniform integers below 2^16. Not for values within a factor 2^-8 of the largest float."""
    return (values.view(torch.int32) + bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def check_draws(n: int) -> int:
    """n. UserError below 1."""
    if n < 1:
        raise UserError(f"the number of draws must be at least 1, got {n}")
    return n


def signed_draws(n: int, antithetic: bool) -> list[tuple[int, float]]:
    """(number of the noise, its sign) of n draws; antithetic: in opposite pairs. UserError below 1."""
    return [antithetic_sign(k) if antithetic else (k, 1.0) for k in range(check_draws(n))]


def antithetic_sign(k: int) -> tuple[int, float]:
    """Draw k of a sequence of pairs: (number of the noise, its sign)."""
    return k // 2, 1.0 if k % 2 == 0 else -1.0
