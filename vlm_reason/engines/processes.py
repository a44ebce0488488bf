"""The training processes around this one, as far as engines know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import UserError
from .base import EngineLost

Result = TypeVar("Result")


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def check_one_gpu(visible: int) -> None:
    """UserError for one process that sees several GPUs: transformers would wrap the model in `nn.DataParallel`."""
    if visible > 1:
        raise UserError(
            f"one process trains on one GPU, and {visible} are visible: start one process a GPU, as in accelerate "
            f"launch --config_file configs/accelerate/ddp.yaml --num_processes {visible} scripts/train.py --config "
            "CONFIG, or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def together(work: Callable[[], Result]) -> list[Result]:
    """`work` done in every process; what each of them returned, by rank. What it returns is pickled.

    When it fails in one process, it fails in all of them at once instead of leaving the others to wait: with the same
    UserError or EngineLost, or with a RuntimeError that names the rank.
    """
    if world() == 1:
        return [work()]
    own: Exception | None = None
    outcome: tuple[type[Exception] | None, Any]
    try:
        outcome = (None, work())
    except Exception as error:
        own = error
        kind = next((k for k in (EngineLost, UserError) if isinstance(error, k)), RuntimeError)
        text = f"rank {rank()} failed: {type(error).__name__}: {error}"
        outcome = (kind, text if kind is RuntimeError else str(error))
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, outcome)
    for failed, value in gathered:
        if failed is not None:
            raise failed(value) from own
    return [value for _, value in gathered]
