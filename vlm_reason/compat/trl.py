"""TRL's fused log-probability kernel, for CUDA.

`trl.kernels.ChunkedLogProbFunction` tiles [N, V] over tokens and vocabulary and folds every tile into a running
log-sum-exp in Triton; its backward recomputes the tiles. Off CUDA its torch form holds tiles of 4096 x 32768, so there
`scoring/head.py` has its own.
"""

from __future__ import annotations

from torch import Tensor

TILE = 32768
"""Vocabulary columns of a tile, as TRL's trainers call it."""


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """log softmax(softcap(scale (hidden W^T + b)) / temperature)[targets] [N] fp32. hidden [N, H], weight [V, H]."""
    from trl.kernels import ChunkedLogProbFunction  # on first use: importing TRL takes seconds

    return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, temperature, TILE, softcap, scale, ())[
        0
    ]
