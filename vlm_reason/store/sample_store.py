"""The append-only sample store: a folder of JSON-lines segments, one segment a writer.

    store = SampleStore("runs/x/samples")
    store.append(records)          # one write and one fsync a batch; records already there are skipped
    for record in store.records(): ...

A writer makes its own segment and holds a lock on it, so any number of processes may write to one folder. A
batch is on disk when `append` returns. A kill in the middle of it leaves at most one torn last line: readers
skip it and count it in `store.torn`; the next writer cuts it off. A damaged line anywhere else is an error:
nothing of ours makes one. Two records of one key are the same draw; readers yield the first.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from ..atomic import sync
from ..errors import UserError
from .record import SampleRecord

log = logging.getLogger(__name__)

_KEY_START = b'{"key": "'
_KEY_HEX = 32


class SampleStore:
    """Samples under `folder` (made when the first batch is written). Use as a context manager, or call
    `close`.

    torn: segments whose last line is incomplete, name -> bytes of it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"sample store {str(self.folder)!r} is a file; give a folder")
        self.torn: dict[str, int] = {}
        self._segment: int | None = None  # file descriptor of our own segment
        self._keys: set[str] = set()
        self.refresh()

    @classmethod
    def open(cls, folder: str | Path) -> SampleStore:
        """A store that must exist already; UserError otherwise. For readers, where a wrong path is a
        mistake."""
        if not any(Path(folder).glob("segment-*.jsonl")):
            raise UserError(f"no samples in {str(folder)!r}; draw some first (vlm-reason sample)")
        return cls(folder)

    # -------------------------------------------------------------------------------------------- reading

    def refresh(self) -> None:
        """See what other writers have appended since."""
        for path in self._segments():
            for number, line in self._lines(path):
                if line.startswith(_KEY_START):
                    self._keys.add(line[len(_KEY_START) : len(_KEY_START) + _KEY_HEX].decode())
                else:
                    self._keys.add(_parse(path, number, line).key)

    def has(self, key: str) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def records(self) -> Iterator[SampleRecord]:
        """Every sample once, as it is on disk now, in order of segment and line."""
        seen: set[str] = set()
        for path in self._segments():
            for number, line in self._lines(path):
                record = _parse(path, number, line)
                if record.key not in seen:
                    seen.add(record.key)
                    yield record

    def by_problem(self) -> dict[str, list[SampleRecord]]:
        """Samples of each problem, sorted by (weights, member, k, m); problems in order of first
        appearance."""
        groups: dict[str, list[SampleRecord]] = {}
        for record in self.records():
            groups.setdefault(record.problem_id, []).append(record)
        for group in groups.values():
            group.sort(key=lambda r: (r.weights, -1 if r.member is None else r.member, r.k, r.m, r.key))
        return groups

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("segment-*.jsonl"))

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    if path.name not in self.torn:
                        log.warning("%s: the last line is incomplete (a writer was stopped); ignored", path)
                    self.torn[path.name] = len(line)
                    return
                yield number, line

    # -------------------------------------------------------------------------------------------- writing

    def append(self, records: Iterable[SampleRecord]) -> int:
        """Write the records whose key is new, all in one write, then fsync. Returns how many were written.

        On an OSError (a full disk) the segment is cut back to where it was and the error raised: nothing of
        the batch is kept, and the store stays good."""
        fresh: dict[str, SampleRecord] = {}
        for record in records:
            if record.key not in self._keys:
                fresh.setdefault(record.key, record)
        if not fresh:
            return 0
        data = b"".join(_line(record) for record in fresh.values())
        segment = self._own_segment()
        start = os.fstat(segment).st_size
        try:
            _write_all(segment, data)
            os.fsync(segment)
        except BaseException:
            os.ftruncate(segment, start)
            raise
        self._keys.update(fresh)
        return len(fresh)

    def close(self) -> None:
        if self._segment is not None:
            os.close(self._segment)  # gives the lock back
            self._segment = None

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _own_segment(self) -> int:
        if self._segment is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._repair()
            name = f"segment-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
            self._segment = os.open(self.folder / name, flags, 0o666)
            fcntl.flock(self._segment, fcntl.LOCK_EX)
            sync(self.folder)  # the name of a new file is only durable once its folder is
        return self._segment

    def _repair(self) -> None:
        """Cut torn last lines off segments nobody is writing (their writer would hold the lock)."""
        for name in list(self.torn):
            segment = os.open(self.folder / name, os.O_RDWR)
            try:
                fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
                content = (self.folder / name).read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    os.ftruncate(segment, whole)
                    os.fsync(segment)
                    log.warning("%s: cut off %d bytes of an incomplete line", name, len(content) - whole)
                del self.torn[name]
            except BlockingIOError:
                pass  # being written at this moment: not torn after all
            finally:
                os.close(segment)


def _line(record: SampleRecord) -> bytes:
    text = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False)
    return (
        text.encode("utf-8", "surrogatepass") + b"\n"
    )  # half a surrogate pair may stand in a data set's JSON


def _parse(path: Path, number: int, line: bytes) -> SampleRecord:
    try:
        return SampleRecord.from_json(json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}, line {number}: damaged sample ({error}); move this segment away") from None
    except KeyError as error:
        raise UserError(
            f"{path}, line {number}: sample without field {error}; move this segment away"
        ) from None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
