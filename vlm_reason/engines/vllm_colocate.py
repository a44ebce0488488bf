"""vLLM in the training process: weights are handed over as tensors, adapters as folders.

With several training processes each has an engine of its own and samples its own share (data parallelism); with
tensor_parallel_size T, T neighbouring processes hold one engine between them, and all of them submit the requests of
all: vLLM's external-launcher mode, in which equal inputs keep the schedulers in step. `generate` is then collective,
also for a process without requests. Training and evaluation do not call it equally often in every process, so
`check_engine` refuses T > 1 for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..compat.vllm import InProcess, Output, Settings
from ..errors import UserError
from .vllm import Call


class Colocated:
    """The `Backend` around `vllm.LLM`."""

    def __init__(self, settings: Settings) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        parallel = settings.tensor_parallel_size
        if world % parallel:
            raise UserError(
                f"engine.tensor_parallel_size {parallel} in mode colocate spreads an engine over that many training "
                f"processes, and there are {world}: launch a multiple of {parallel} (accelerate launch "
                "--num_processes), or use mode server"
            )
        self._group = _group_of_neighbours(parallel) if parallel > 1 else None
        self._engine = InProcess(replace(settings, external_launcher=world > 1))
        self.context = self._engine.max_model_len
        self._numbers: dict[str, tuple[int, str]] = {}  # served name -> vLLM's id, folder
        self._last = 0

    def generate(self, calls: Sequence[Call], progress: str | None) -> list[Output]:
        mine, everyone = _gathered(calls, self._group)
        bar = None if progress is None else partial(_bar, progress)
        adapters = [None if c.adapter is None else (c.adapter, *self._numbers[c.adapter]) for c in everyone]
        outputs = self._engine.generate(
            [c.prompt_ids for c in everyone], [c.parameters() for c in everyone], adapters, bar
        )
        return outputs[mine]

    def serve_adapters(self, folders: Mapping[str, Path]) -> None:
        for name in [name for name in self._numbers if name not in folders]:
            self._engine.drop_adapter(self._numbers.pop(name)[0])
        for name, folder in folders.items():
            if name not in self._numbers:
                self._last += (
                    1  # a number is never used twice: vLLM takes an adapter of a known number as loaded
                )
                self._engine.load_adapter(name, self._last, folder)
                self._numbers[name] = (self._last, str(folder))

    def load_weights(self, served: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._engine.load_weights(tensors)

    def begin_version(self, version: int) -> None:
        self._engine.forget_prompts()  # what is cached may not depend on how long this process has been running

    def close(self) -> None:
        del self._engine


def _gathered(calls: Sequence[Call], group: dist.ProcessGroup | None) -> tuple[slice, list[Call]]:
    """(where this process's calls are, the calls of all processes that share its engine)."""
    if group is None:
        return slice(0, len(calls)), list(calls)
    parts: list[list[Call]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(parts, list(calls), group=group)
    start = sum(len(part) for part in parts[: dist.get_rank(group)])
    return slice(start, start + len(calls)), [call for part in parts for call in part]


def _group_of_neighbours(size: int) -> dist.ProcessGroup:
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
    return groups[rank // size]


def _bar(label: str, items: Any = None, *, total: int | None = None, **ours_to_choose: Any) -> Any:
    if items is not None:  # vLLM has a bar for taking the prompts in, too
        return items
    return tqdm(total=total, desc=label, unit="seq", file=sys.stderr, leave=False, mininterval=0.5)


def cache_bytes_on_cpu(
    config: Any, dtype: torch.dtype, sequences: int, context: int, share: float | None
) -> int:
    """Bytes for keys and values: what `sequences` of `context` tokens need at most, within the memory there is.

    per token = 2 layers kv_heads head_dim bytes
    limit     = share of all memory, less the weights; by default a quarter of what is free now
    """
    import psutil

    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * width * dtype.itemsize
    memory = psutil.virtual_memory()
    limit = int(memory.available / 4 if share is None else memory.total * share)
    if limit < token * context:
        raise UserError(
            f"one text of {context} tokens needs {token * context >> 20} MB of keys and values, and the engine may "
            f"take {limit >> 20} MB: lower engine.max_model_len, or raise engine.memory (a share of all memory)"
        )
    return min(limit, token * sequences * context)
