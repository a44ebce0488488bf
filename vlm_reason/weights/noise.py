"""Counter-based Gaussian noise: what an element gets depends on its place in a global index, and on nothing else.

    eps_i = normal(seed, stream, step, draw, block)[i mod 65536],    block = i div 65536

One generator a block: how elements are grouped into tensors or cut into shards makes no difference, and a run that is
resumed draws what it would have drawn. Seeds of the blocks of one draw are all different. A CPU generator takes 32 bits
of seed, so over millions of draws a block's noise can come back at another time or place; that is harmless. CPU and
CUDA have different generators, so the same seed gives different noise on them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """64 bits, the lower 32 of which differ between any two blocks of a draw."""
        packed = struct.pack("<5Q", self.seed % 2**64, self.stream, self.step, self.draw, purpose)
        start = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        return (start & ~0xFFFFFFFF) | ((start + block) & 0xFFFFFFFF)

    def normal(self, block: int, stop: int, device: torch.device) -> Tensor:
        """The block's first `stop` standard normals, fp32."""
        size = -(-stop // _VECTOR) * _VECTOR if device.type == "cpu" else BLOCK
        generator = torch.Generator(device).manual_seed(self.block_seed(block))
        return torch.empty(size, device=device).normal_(generator=generator)[:stop]

    def bits(self, block: int, stop: int, device: torch.device) -> Tensor:
        """The block's first `stop` uniform integers below 2^16, int32, for stochastic rounding."""
        size = stop if device.type == "cpu" else BLOCK
        generator = torch.Generator(device).manual_seed(self.block_seed(block, ROUNDING))
        return torch.empty(size, dtype=torch.int32, device=device).random_(0, 1 << 16, generator=generator)[
            :stop
        ]


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


def drawn_ahead(
    draw: Draw, blocks: Sequence[Block], device: torch.device
) -> Iterator[tuple[Block, Callable[[Piece], Tensor]]]:
    """(block, piece -> its normals), block after block. With more than one thread, the next block's noise is drawn on
    the CPU while this one is worked on: the generator itself uses only one."""

    def noise(block: Block) -> Tensor:
        return draw.normal(block.number, block.stop, device)

    def of(normals: Tensor) -> Callable[[Piece], Tensor]:
        return lambda piece: normals[piece.offset : piece.offset + piece.hi - piece.lo]

    if device.type != "cpu" or torch.get_num_threads() == 1 or len(blocks) < 4:
        for block in blocks:
            yield block, of(noise(block))
        return
    ahead = 2
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: list[Future[Tensor]] = [pool.submit(noise, block) for block in blocks[:ahead]]
        for k, block in enumerate(blocks):
            normals = waiting.pop(0).result()
            if k + ahead < len(blocks):
                waiting.append(pool.submit(noise, blocks[k + ahead]))
            yield block, of(normals)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the fraction of the gap covered, so E[result] = values. `bits`:
    uniform integers below 2^16. Not for values within a factor 2^-8 of the largest float."""
    return (values.view(torch.int32) + bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def antithetic_sign(k: int) -> tuple[int, float]:
    """Draw k of a sequence of pairs: (number of the noise, its sign)."""
    return k // 2, 1.0 if k % 2 == 0 else -1.0
