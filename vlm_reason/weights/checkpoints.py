"""Checkpoints of a training stage: `folder/checkpoint-N`, complete ones only, the newest kept.

transformers writes optimizer.pt, scheduler.pt, trainer_state.json and the random states; ours beside them are
trained.safetensors (what is trained, as it stands between two steps), callbacks.pt and identity.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from ..atomic import sync
from ..engines.processes import rank, world
from ..errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)$")
_TRAINED, _CALLBACKS, _IDENTITY = "trained.safetensors", "callbacks.pt", "identity.json"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.rsplit("-", 1)[1])

    @staticmethod
    def write(
        folder: Path, trained: Sequence[nn.Parameter], stateful: Sequence[Any], identity: Mapping[str, Any]
    ) -> None:
        """Rank 0's part of a checkpoint beside what transformers writes."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n:05d}": p.detach().cpu().contiguous() for n, p in enumerate(trained)}
        save_file(tensors, folder / _TRAINED)
        torch.save([c.state_dict() for c in stateful], folder / _CALLBACKS)
        (folder / _IDENTITY).write_text(json.dumps(identity))

    def load(self, trained: Sequence[nn.Parameter], stateful: Sequence[Any]) -> None:
        tensors = load_file(self.folder / _TRAINED)
        with torch.no_grad():
            for n, p in enumerate(trained):
                p.copy_(tensors[f"{n:05d}"])
        states = torch.load(self.folder / _CALLBACKS, map_location="cpu", weights_only=True)
        for callback, state in zip(stateful, states, strict=True):
            callback.load_state_dict(state)

    def optimizer_state(self) -> dict[str, Any]:
        return torch.load(self.folder / "optimizer.pt", map_location="cpu", weights_only=True)

    def losses(self) -> list[float]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in history if "loss" in row]


def latest(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The complete checkpoint of the highest step; what a killed save left is removed by rank 0. UserError when it is
    of another run than `identity` says."""
    if not folder.is_dir():
        return None
    if rank() == 0:
        for leftover in folder.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    found = [Checkpoint(p) for p in folder.iterdir() if _NAME.search(p.name) and (p / _IDENTITY).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda c: c.step)
    try:
        before = json.loads((newest.folder / _IDENTITY).read_text())
    except ValueError as error:
        raise UserError(f"{newest.folder} cannot be read ({error}): delete it") from error
    now = json.loads(json.dumps(identity))
    different = sorted(k for k in now if before.get(k) != now[k])
    if different:
        key = different[0]
        raise UserError(
            f"{newest.folder} was made with {key} = {before.get(key)!r}, this run has {now[key]!r}: choose another "
            "output_dir, or delete that folder to start over"
        )
    return newest


@contextmanager
def saved_atomically(folder: Path, step: int) -> Iterator[Path]:
    """Inside, `checkpoint-<step>` is to be written below the folder given; then it gets its place in `folder`, and
    older ones go. After an error nothing of it is left. Collective."""
    staging, name = folder / f".saving-{step}", f"checkpoint-{step}"
    try:
        yield staging
        _wait()  # for the random states of every process
        if rank() == 0:
            for path in (staging / name).rglob("*"):
                if path.is_file():
                    sync(path)
            shutil.rmtree(folder / name, ignore_errors=True)
            os.rename(staging / name, folder / name)
    finally:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
    if rank() == 0:
        for path in folder.iterdir():
            if _NAME.search(path.name) and path.name != name:
                shutil.rmtree(path, ignore_errors=True)
    _wait()


def _wait() -> None:
    if world() > 1:
        dist.barrier()
