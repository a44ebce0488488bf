"""A key-value cache for decoding: room to grow, rows that leave, a prompt that is shared.

transformers' dynamic cache concatenates at every step, which copies the whole cache for each new token. Here a layer
owns a buffer with spare room and hands out a view of the used part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import UserError

ROOM = 64
"""Positions a buffer grows by: one copy of the cache every 64 tokens."""


class RoomyLayer(DynamicLayer):
    """Keys and values [B, KV, L, D] as views of buffers [B, KV, L + room, D]."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: tuple[Tensor, Tensor] | None = None
        assert self.keys is not None and self.values is not None
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < needed:
            self._buffers = (
                _with_room(self.keys, key_states, used),
                _with_room(self.values, value_states, used),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:needed] = new
        self.keys, self.values = (buffer[:, :, :needed] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._buffers = None


def _with_room(old: Tensor, new: Tensor, used: int) -> Tensor:
    buffer = new.new_empty(*new.shape[:2], used + new.shape[-2] + ROOM, new.shape[-1])
    if used:
        buffer[:, :, :used] = old
    return buffer


def new_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache whose rows can be selected. Sliding-window layers keep transformers' own; recurrent state
    (linear attention, state-space layers) is refused."""
    cache = DynamicCache(config=config)
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise UserError(
            f"the hf engine cannot sample from {config.model_type!r}: its recurrent state cannot drop finished rows; "
            "use the vllm engine"
        )
    return Cache(layers=[RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers])


def shares_prefixes(cache: Cache) -> bool:
    """Padding between a shared prefix and ragged suffixes is harmless only where attention sees the whole past:
    a sliding window counts cache slots, not positions."""
    return not any(cache.is_sliding)


def select(cache: Cache, rows: list[int], device: torch.device) -> None:
    """Keep `rows` of the batch, in that order; a row may be repeated."""
    cache.batch_select_indices(torch.tensor(rows, device=device))
