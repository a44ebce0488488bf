"""The process behind `worker.CheckWorker`. Run as a script: `python -P worker_main.py math|gym TIMEOUT`.

Reads length-prefixed pickles from its parent, writes one line of JSON for each. Imports nothing of this package, so it
starts in about a second.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

_MEMORY = (
    4 << 30
)  # bytes of address space: an answer such as 10**10**9 fails here and not on the whole machine


class _TooLate(BaseException):
    """Not an Exception: checkers catch those broadly."""


def _raise_too_late(signum: int, frame: Any) -> None:
    raise _TooLate


def math_check() -> Callable[[Any], float]:
    """(gold, answer) -> 1.0 if math-verify finds them equal. The library raises instead of answering False."""
    import sympy
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        parsed = parse("\\boxed{" + text + "}", parsing_timeout=None, raise_on_error=True)
        if not parsed:
            raise ValueError(f"math-verify cannot read {text[:80]!r}")
        return list(parsed)

    def tiny(expression: Any) -> bool:
        """Below the precision of the numeric comparison, where 1/2004! and 1/2006! look the same."""
        number = isinstance(expression, sympy.Expr) and not expression.free_symbols
        return bool(number and expression != 0 and abs(expression.evalf(20)) < 1e-9)

    def check(payload: tuple[str, str]) -> float:
        gold, answer = (read(text) for text in payload)  # the order matters to `verify`: gold first
        if tiny(gold[0]) and isinstance(answer[0], sympy.Expr):
            return float(sympy.simplify(gold[0] / answer[0] - 1) == 0) if answer[0] != 0 else 0.0
        return float(verify(gold, answer, timeout_seconds=None, raise_on_error=True))

    return check


def gym_check() -> Callable[[Any], float]:
    """(generator, options, entry, answer) -> the generator's own score in [0, 1]."""
    import reasoning_gym

    scorers: dict[str, Any] = {}

    def check(payload: tuple[str, dict[str, Any], dict[str, Any], str]) -> float:
        name, options, entry, answer = payload
        key = f"{name} {sorted(options.items())!r}"
        if key not in scorers:
            scorers[key] = reasoning_gym.create_dataset(name, size=1, seed=0, **options)
        return float(scorers[key].score_answer(answer, entry))

    return check


def serve(check: Callable[[Any], float], timeout: float, requests: Any, replies: Any) -> None:
    def reply(value: float | None, error: str | None = None, timed_out: bool = False) -> None:
        line = json.dumps({"value": value, "error": error, "timed_out": timed_out})
        replies.write(line.encode() + b"\n")
        replies.flush()

    signal.signal(signal.SIGALRM, _raise_too_late)
    reply(None)  # ready
    while header := requests.read(4):
        payload = pickle.loads(requests.read(struct.unpack("<I", header)[0]))
        # SIGPROF keeps its default action: the kernel ends this process even inside C code, so that one whose parent
        # has gone does not compute for ever.
        signal.setitimer(signal.ITIMER_PROF, timeout + 5)
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout)
            value = check(payload)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except _TooLate:
            reply(None, timed_out=True)
        except (Exception, RecursionError, MemoryError) as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(None, error=f"{type(error).__name__}: {error}"[:300])
        else:
            reply(value)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    kind, timeout = sys.argv[1], float(sys.argv[2])
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's; this process ends when its input does
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print must not reach the replies
    try:
        check = {"math": math_check, "gym": gym_check}[kind]()
    except ImportError as error:
        replies.write(json.dumps({"value": None, "error": str(error), "timed_out": False}).encode() + b"\n")
        replies.flush()
        return
    serve(check, timeout, sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
