"""Peak memory of a piece of work above what the process holds before it.

On Linux: the kernel's high-water mark of resident memory, reset just before (`/proc/self/clear_refs`), minus the
resident memory at that moment, with freed memory handed back first. It counts what the process really took, allocator
and libraries included, so run each variant in a process of its own: freed memory is reused silently.
"""

from __future__ import annotations

import ctypes
import gc
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


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
