"""Stands in for pycosat where it cannot be compiled: imports, and refuses to solve."""

from __future__ import annotations

from typing import Any, NoReturn

_REASON = (
    "pycosat was not compiled on this machine, so reasoning-gym's zebra_puzzles cannot be generated: "
    "install a C compiler and Python's headers, delete .venv and run scripts/setup.sh"
)


def solve(clauses: Any, **options: Any) -> NoReturn:
    raise RuntimeError(_REASON)


def itersolve(clauses: Any, **options: Any) -> NoReturn:
    raise RuntimeError(_REASON)
