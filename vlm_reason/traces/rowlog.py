"""metrics.jsonl: one row an optimiser step, written by rank 0.

What processes know only of their own share (the loss, the padded tokens they ran) is summed over them, once a logging
step: rows wait for it on the device. One process writes each row at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Ranks


class RowLog:
    """Rows of `path`, in order. `add` one a step, `flush` before anything reads them: a log, a checkpoint, the end."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path, self._ranks = path, ranks
        self._rows: list[dict[str, Any]] = []
        self._shares: list[Tensor] = []

    def add(self, row: dict[str, Any], loss: Tensor, forwarded: int) -> None:
        """`loss` and `forwarded` are this process's share; `row` must have the keys, which `flush` fills."""
        self._rows.append(row)
        self._shares.append(
            torch.stack([loss.double(), torch.full_like(loss, forwarded, dtype=torch.float64)])
        )

    def flush(self) -> None:
        if not self._rows:
            return
        shares = torch.stack(self._shares)
        if self._ranks.size > 1:
            dist.all_reduce(shares)
        for row, (loss, forwarded) in zip(self._rows, shares.tolist(), strict=True):
            row["loss"], row["tokens/forwarded"] = loss, int(forwarded)
            row["useful_tokens"] = row["useful_tokens"] / forwarded if forwarded else None
        if self._ranks.main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as stream:
                # in one piece: whoever follows the file, or a kill, does not meet half a row
                stream.write("".join(json.dumps(row) + "\n" for row in self._rows))
        self._rows, self._shares = [], []
