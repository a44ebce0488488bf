"""Check untrusted answers in another process, with a time limit that holds.

Symbolic checkers and some reasoning-gym scorers evaluate what the model wrote; `9**9**9` or a deeply nested root keeps
them busy for ever, and a limit inside the same process does not interrupt them. Here the check runs in `worker_main.py`
(started as a script of its own: no fork of a process with threads, no import of the caller's main module). It gives up
by itself at `timeout`; if it does not, it is killed a second later and the next call starts a fresh one.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GRACE = 1.0
_STARTUP = 120.0


@dataclass(frozen=True)
class Reply:
    """`value` of the check, or why there is none: `error` (an exception's text), `timed_out`."""

    value: float | None
    error: str | None = None
    timed_out: bool = False


class CheckWorker:
    """One worker process for one kind of check (`math` or `gym`), started on first use, restarted after a kill.

    Safe to call from several threads (one check at a time) and after a fork (the child starts its own).
    """

    def __init__(self, kind: str, timeout: float = 5.0) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}")
        self.kind = kind
        self.timeout = timeout
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = -1
        self._lock = threading.Lock()

    def __call__(self, payload: Any) -> Reply:
        """Run one check. Never raises for what the check does; a worker that dies is reported as an error."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            frame = pickle.dumps(payload)
            try:
                process.stdin.write(struct.pack("<I", len(frame)) + frame)
                process.stdin.flush()
            except OSError as error:
                self.close()
                return Reply(None, error=f"worker is gone: {error}")
            return self._read(self.timeout + _GRACE)

    def close(self) -> None:
        """Kill the process, if this process started one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # unsent bytes for a process that is gone
                    pass

    def __del__(self) -> None:
        if self._process is not None:
            self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        script = Path(__file__).with_name("worker_main.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # -P keeps this folder off sys.path, where its modules could hide others of the same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), self.kind, str(self.timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._owner = os.getpid()
        self.starts += 1
        ready = self._read(_STARTUP)
        if ready.error or ready.timed_out:
            self.close()
            raise RuntimeError(f"the {self.kind} checker could not be started: {ready.error or 'no answer'}")
        return self._process

    def _read(self, limit: float) -> Reply:
        """One line of JSON, or a kill at `limit` seconds."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + limit
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.close()
                return Reply(None, timed_out=True)
            chunk = os.read(descriptor, 65536)
            if not chunk:
                self.close()
                return Reply(None, error="the checker died (out of memory, or killed)")
            line += chunk
        return Reply(**json.loads(line))
