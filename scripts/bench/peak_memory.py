"""What the benchmarks share: the line they print, and the peak memory of a piece of work.

Memory is counted above what the process holds before the work.

On Linux: the kernel's high-water mark of resident memory, reset just before (`/proc/self/clear_refs`), minus the
resident memory at that moment, with freed memory handed back first. It counts what the process really took, allocator
and libraries included, so run each variant in a process of its own: freed memory is reused silently.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_above(work: Callable[[], Any]) -> int:
    """Bytes. OSError where /proc/self/clear_refs cannot be written (not Linux, or not allowed)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def peak_in_a_process_of_its_own(variant: str, *more: str) -> int:
    """What the calling script prints when it is run again, with its own arguments, `--memory-of VARIANT` and `more`."""
    argv = [sys.executable, sys.argv[0], *sys.argv[1:], "--memory-of", variant, *more]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {variant} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.strip().splitlines()[-1])


def report(
    bench: str, row: str, value: float, bar: float | None, detail: dict[str, Any], at_least: bool = False
) -> None:
    """One JSON line: a ratio, and whether it keeps to `bar` (at most, or `at_least`)."""
    ok = bar is None or (value >= bar if at_least else value <= bar)
    result = {"bench": bench, "row": row, "value": round(value, 3), "unit": "ratio", "bar": bar, "ok": ok}
    print(json.dumps({**result, "detail": detail}), flush=True)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
