"""Flipout by sequence: every row of a batch through a draw of its own, at the price of one draw and signs.

    A_r = M + (sigma * E) * (t_r s_r^T)        E [r, n] standard normal, one for the batch; t_r, s_r signs of row r
    y_r = W x_r + scaling B [ M x_r + t_r * ((sigma * E)(s_r * x_r)) ]

Each A_r is a draw of N(M, diag sigma^2), and those of two rows are uncorrelated, so the gradient of a mean over rows
is less noisy than with one draw for all (Wen et al. 2018, arXiv 1803.04386). All tokens of a row share its signs: a row
is one function of its tokens, as it is when a draw generates text.

E depends on (seed, step, draw) and on the place of a weight; the signs on those and on the name of the example. How a
step's examples are cut into batches or spread over processes changes nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from ..compat.peft import Update, lora_updates
from ..errors import UserError
from .noise import TRAINING, Draw, normals


@dataclass(frozen=True)
class RowNoise:
    """By name of layer: normals E [r, n]; signs of the inputs s [R, n] and of the outputs t [R, r], int8."""

    normals: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def row_noise(
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[str],
    seed: int,
    step: int = 0,
    draw: int = 0,
    device: torch.device | str = "cpu",
) -> RowNoise:
    """shapes: (r, n) of A by name of layer, in a fixed order. rows: names of the examples of a batch."""
    device = torch.device(device)
    total = sum(r + n for r, n in shapes.values())
    signs = torch.from_numpy(np.stack([_signs(seed, step, draw, row, total) for row in rows])).to(device)
    cut = iter(signs.split([size for shape in shapes.values() for size in shape], dim=1))
    outputs, inputs = {}, {}
    for name in shapes:
        outputs[name], inputs[name] = next(cut), next(cut)
    white = normals(list(shapes.values()), Draw(seed, TRAINING, step, draw), device)
    return RowNoise(dict(zip(shapes, white, strict=True)), inputs, outputs)


def _signs(seed: int, step: int, draw: int, row: str, count: int) -> np.ndarray:
    """+1 or -1, int8 [count]."""
    packed = struct.pack("<3Q", seed % 2**64, step, draw) + row.encode()
    low, high = struct.unpack("<2Q", hashlib.blake2b(packed, digest_size=16).digest())
    words = np.random.Philox(key=[low, high]).random_raw(-(-count // 64)).astype("<u8", copy=False)
    bits = np.unpackbits(words.view(np.uint8))[:count].view(np.int8)
    return (2 * bits - 1).astype(np.int8)


@contextmanager
def flipout(
    model: PeftModel, sigma: Mapping[str, Tensor], noise: RowNoise, adapter: str = "default"
) -> Iterator[None]:
    """Inside, row r of a batch goes through A_r. sigma: by name of layer, [r, n], may need a gradient; so may the
    adapter's own tensors. Layers that `sigma` does not name are left to PEFT. LoRA dropout applies as in PEFT.

    UserError for a layer that sigma names and that is no plain LoRA linear layer; inside, for a batch that has not as
    many rows as the noise.
    """
    used: set[str] = set()

    def make(name: str, layer: Any) -> Update | None:
        if name not in sigma:
            return None
        used.add(name)
        return _noisy(
            layer, adapter, sigma[name] * noise.normals[name], noise.inputs[name], noise.outputs[name]
        )

    with lora_updates(model, adapter, make):
        if left := sorted(sigma.keys() - used):
            raise UserError(f"flipout: only plain LoRA linear layers have rows of noise, not {left[0]!r}")
        yield


def _noisy(layer: Any, adapter: str, perturbation: Tensor, s: Tensor, t: Tensor) -> Update:
    down, up, dropout = (
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.lora_dropout[adapter],
    )
    scaling = float(layer.scaling[adapter])

    def update(x: Tensor) -> Tensor:
        if len(x) != len(s):
            raise UserError(f"flipout: a layer was given {len(x)} rows, its noise has {len(s)}")
        x = dropout(x.to(down.dtype))
        shape = (len(x), *[1] * (x.ndim - 2), -1)
        flipped = F.linear(x * s.to(x.dtype).view(shape), perturbation.to(x.dtype)) * t.to(x.dtype).view(
            shape
        )
        return F.linear(F.linear(x, down) + flipped, up) * scaling

    return update
