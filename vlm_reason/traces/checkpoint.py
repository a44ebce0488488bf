"""The part of a checkpoint that transformers does not write: the window in hand, the presets' state, the chains.

A checkpoint is written to a folder whose name no reader looks for and renamed when it is whole, so
`latest_checkpoint` never meets half of one. Numbers go through JSON: a float's shortest repr reads back as
the same bits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..atomic import sync, write_atomically
from ..errors import UserError
from ..types import Problem
from .ahead import Drawn, drawn_from_json, drawn_to_json
from .distributed import Ranks
from .parallel import Parallel
from .recipe import State
from .replay import ChainMemory
from .rows import Row
from .window import Window

STATE_FILE = "trace_state.json"
TENSOR_FILE = "trace_state.safetensors"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass
class TraceState:
    """What a run carries from step to step beside weights and optimiser: the window in hand, each phase's preset state,
    the chains, the tokens spent, and the next window if it is drawn already."""

    window: Window | None
    presets: list[State]
    chains: ChainMemory
    tokens_used: int = 0
    ahead: Drawn | None = None


def save_trace_state(folder: str | Path, state: TraceState, identity: dict[str, Any]) -> None:
    """Write the trace state into `folder` (a checkpoint still under its temporary name). `identity` names the run
    (recipe, seed, sizes): resuming under another one is refused."""
    tensors = {
        f"{i}.{k}": v for i, own in enumerate(state.presets) for k, v in own.items() if torch.is_tensor(v)
    }
    body = {
        "format": FORMAT,
        "identity": identity,
        "window": None if state.window is None else _window_to_json(state.window),
        "presets": [{k: v for k, v in own.items() if not torch.is_tensor(v)} for own in state.presets],
        "chains": state.chains.to_json(),
        "tokens_used": state.tokens_used,
        "ahead": None if state.ahead is None else drawn_to_json(state.ahead),
    }
    folder = Path(folder)
    (folder / STATE_FILE).write_text(json.dumps(body))
    save_file(tensors, folder / TENSOR_FILE)


def load_trace_state(
    folder: str | Path, identity: dict[str, Any], problems: Sequence[Problem] = ()
) -> TraceState:
    """Read back what `save_trace_state` wrote; `problems` are those of the run. UserError when it belongs to another
    run."""
    folder = Path(folder)
    try:
        body = json.loads((folder / STATE_FILE).read_text())
        tensors = load_file(folder / TENSOR_FILE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({error}); delete it to resume from an earlier one"
        ) from error
    different = sorted(k for k in identity if body["identity"].get(k) != identity[k])
    if different:
        key = different[0]
        raise UserError(
            f"checkpoint {folder} was made with {key} = {body['identity'].get(key)!r}, "
            f"this run has {identity[key]!r}: choose another output_dir, or resume with the settings it was "
            "started with"
        )
    presets: list[State] = [dict(own) for own in body["presets"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        presets[int(index)][key] = value
    window = None if body["window"] is None else _window_from_json(body["window"])
    ahead = None if body.get("ahead") is None else drawn_from_json(body["ahead"], problems)
    return TraceState(window, presets, ChainMemory.from_json(body["chains"]), body["tokens_used"], ahead)


def save_optimizer(parallel: Parallel, scheduler: Any, folder: Path, ranks: Ranks) -> None:
    """A sharded optimiser's state, whole, in the files and the form of one process. Collective; rank 0 writes."""
    state = parallel.read_state()
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "optimizer.pt")
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def load_optimizer(parallel: Parallel, scheduler: Any, folder: Path) -> None:
    """Each process takes its part of what `save_optimizer`, or one process, wrote."""
    state = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    parallel.write_state(state)
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def _window_to_json(window: Window) -> dict[str, Any]:
    return {
        "index": window.index,
        "phase": window.phase,
        "rows": [[asdict(row) for row in group] for group in window.rows],
        "counts": list(window.counts),
        "metrics": window.metrics,
    }


def _window_from_json(body: dict[str, Any]) -> Window:
    return Window(
        body["index"],
        body["phase"],
        tuple(tuple(_row_from_json(row) for row in group) for group in body["rows"]),
        tuple(body["counts"]),
        body["metrics"],
    )


def _row_from_json(row: dict[str, Any]) -> Row:
    def values(key: str) -> tuple | None:
        return None if row[key] is None else tuple(row[key])

    return Row(
        row["adapter"],
        tuple(row["context"]),
        tuple(row["target"]),
        tuple(row["weight"]),
        values("old"),
        values("ref"),
    )


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Leftovers of a killed save are removed."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return None
    for leftover in output_dir.glob(".saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _NAME.search(path.name)) and (path / STATE_FILE).is_file()
    ]
    return max(found)[1] if found else None


def publish(temporary: Path, final: Path) -> None:
    """Flush every file of `temporary` to disk and give it its final name in one step."""
    for path in temporary.rglob("*"):
        if path.is_file():
            sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`: the resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the torn last line of a killed run
            continue
    write_atomically(path, "".join(line + "\n" for line in kept))
