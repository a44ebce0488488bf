"""A report on disk: one HTML file, and beside it the problems it does not show whole, as JSON lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...atomic import write_atomically
from ...errors import UserError
from .building import Built, Progress
from .page import html
from .rationales import line


@dataclass(frozen=True)
class Written:
    path: str
    bytes: int
    rest: str | None
    rest_problems: int


def write(built: Built, path: str | Path, progress: Progress = lambda stage: None) -> Written:
    """Each file whole or not at all: first the JSON lines, then the page that names them. A file of JSON lines
    that an earlier report left and this one has no use for is removed, for it would tell of other samples."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give a file such as {str(path / 'report.html')!r}")
    rest = path.with_name(f"{path.stem}.problems.jsonl")
    if built.left_out:
        progress(f"{len(built.left_out):,} problems to the file beside the page")
        _write_lines(built, rest)
    page = html(built.report, rest.name if built.left_out else None).encode("utf-8", "replace")
    write_atomically(path, page)
    if not built.left_out:
        rest.unlink(missing_ok=True)
    return Written(str(path), len(page), str(rest) if built.left_out else None, len(built.left_out))


def _write_lines(built: Built, path: Path) -> None:
    """One problem at a time: a store may be larger than memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    names = [system.name for system in built.systems]
    tasks = [task.name for task in built.report.tasks]
    try:
        with part.open("w", encoding="ascii") as stream:
            for place in built.left_out:
                stream.write(line(place, built.report.method, names[place.system], tasks[place.task]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
