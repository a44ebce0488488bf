"""The one JSON file of an evaluation: what was run, on what, at what cost, and every number with its interval.

    {"schema": 1, "kind": "suite", "suite", "config", "commit", "machine", "date", "model", "tasks", "rows", "cost",
     "requirements", "audit", "items"}

`rows` is a list of {task, metric, value, se, ci, n, n_dropped, method, flags}; `items` has each problem's outcome,
which `vlm-reason compare` pairs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..types import Estimate

SCHEMA = 1
KEYS = ("schema", "suite", "config", "commit", "machine", "date", "rows")
"""What every result of this project holds, in evals/results too."""


def row(task: str, metric: str, estimate: Estimate) -> dict[str, Any]:
    return {"task": task, "metric": metric, **estimate.to_json()}


def header(suite: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what was run, where and when."""
    return {
        "schema": SCHEMA,
        "kind": "suite",
        "suite": suite,
        "config": config,
        "commit": commit(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def commit() -> str | None:
    """Commit of the source that runs, with `+` for uncommitted changes; None outside a checkout of it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*asked, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        dirty = subprocess.run(
            [*asked, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> str:
    """Architecture, cores and GPUs, and nothing that names the machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "CPU"
    return f"{platform.machine()}, {cores} cores, {device}"


def read_result(path: str | Path) -> dict[str, Any]:
    """A result of `kind` suite. UserError for a file that is none, or of a newer schema."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no result file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{str(path)!r} is no result file ({' '.join(str(error).split())})") from None
    missing = [key for key in (*KEYS, "items") if not isinstance(data, dict) or key not in data]
    if missing:
        raise UserError(
            f"{str(path)!r} is no result of vlm-reason eval with a suite: it has no {missing[0]!r}"
        )
    if data["schema"] != SCHEMA:
        raise UserError(
            f"{str(path)!r} has schema {data['schema']!r}, and this version reads {SCHEMA}: use the version that "
            "wrote it, or evaluate again (the stored samples are kept)"
        )
    return data
