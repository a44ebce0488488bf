"""Where a parameter lies in the global index of weights, also when this process holds only a part of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UserError


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that is here; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size_of_whole(tensor: Tensor) -> int:
    return tensor.numel()  # a DTensor's is that of the whole


def global_start(tensor: Any) -> int:
    """Place of the first local element in the flattened whole. UserError for a layout that is not contiguous in it."""
    if not hasattr(tensor, "to_local"):
        return 0
    start, cuts = 0, 0
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        cuts += 1
        if not placement.is_shard(0) or cuts > 1:
            raise UserError(
                f"IVON: a DTensor with placements {tuple(tensor.placements)}; it may be sharded once, "
                "along its first dimension, and replicated otherwise"
            )
        rows = tensor.shape[0]
        each = -(-rows // tensor.device_mesh.size(dimension))
        first = min(rows, each * tensor.device_mesh.get_local_rank(dimension))
        start = first * (tensor.numel() // max(rows, 1))
    return start


def check_index(group: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """Give the group its `start`: as it says, or behind the groups before it. UserError where two overlap."""
    spans = [(g["start"], g["start"] + sum(size_of_whole(p) for p in g["params"])) for g in before]
    start = group.setdefault("start", max((end for _, end in spans), default=0))
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise UserError(f"IVON: start of a group must be a whole number >= 0, got {start!r}")
    end = start + sum(size_of_whole(p) for p in group["params"])
    for lo, hi in spans:
        if start < hi and lo < end:
            raise UserError(
                f"IVON: two groups overlap in the global index, [{lo}, {hi}) and [{start}, {end}): "
                "they would share noise"
            )
