"""The append-only sample store: a folder of JSON-lines segments, one segment a writer.

    store = SampleStore("runs/x/samples")
    store.append(records)          # one write and one fsync a batch; records already there are skipped
    for record in store.records(): ...

A writer makes its own segment and holds a lock on it, so any number of processes may write to one folder. A
batch is on disk when `append` returns. A kill in the middle of it leaves at most one torn last line: readers
skip it and count it in `store.torn`; the next writer cuts it off. A damaged line anywhere else is an error:
nothing of ours makes one. Two records of one key are the same draw; readers yield the first.

    columns = store.columns()      # one numpy entry a record: what metrics read
    store.record(row)              # the whole record behind a row

A writer that closes, and a reader that had to parse, leave an index beside a segment (`index.py`): a cache that makes
the next opening fast.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..atomic import sync
from ..errors import UserError
from . import index
from .columns import ColumnBuilder, Columns, join, key_digest
from .record import SampleRecord

log = logging.getLogger(__name__)

_KEY_START = b'{"key": "'
_KEY_HEX = 32
_BUFFER = 1 << 20


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
        self._segment: _OwnSegment | None = None
        self._keys: set[bytes] = set()
        self._columns: Columns | None = None
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
            found = index.find_index(path)
            keys = None if found is None else found.keys()
            if found is not None and keys is not None:
                self._keys |= index.key_set(keys)
                start, rows = found.size, found.rows
            else:
                start, rows = 0, 0
            for number, _, line in self._lines(path, start, rows):
                self._keys.add(key_digest(_key(path, number, line)))

    def has(self, key: str) -> bool:
        return key_digest(key) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def records(self) -> Iterator[SampleRecord]:
        """Every sample once, as it is on disk now, in order of segment and line."""
        seen: set[str] = set()
        for path in self._segments():
            for number, _, line in self._lines(path):
                record = _parse(path, number, line)
                if record.key not in seen:
                    seen.add(record.key)
                    yield record

    def columns(self) -> Columns:
        """Every sample once, as it is on disk now, in the order of `records`; see `Columns`. What no index covers is
        parsed, about 50,000 samples a second, and an index is left for the next time."""
        paths = self._segments()
        parts = [part for path in paths for part in self._parts(path)]
        self._columns = join([arrays for _, arrays in parts], [path for path, _ in parts])
        return self._columns

    def record(self, row: int) -> SampleRecord:
        """The whole record of row `row` of the columns that `columns` gave last."""
        if self._columns is None:
            self.columns()
        assert self._columns is not None
        return self._columns.record(row)

    def _parts(self, path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The columns of a segment: those of its index, and those of the lines behind it."""
        found = index.find_index(path)
        arrays = None if found is None else found.arrays()
        covered = 0 if found is None or arrays is None else found.size
        stat = path.stat()
        if stat.st_size - covered >= max(
            index.SMALLEST, covered // 2
        ):  # much is new: read it all and leave an index
            arrays, covered = self._index(path, stat), stat.st_size
        if arrays is not None:
            yield path, arrays
        if stat.st_size > covered or arrays is None:
            builder = ColumnBuilder()
            rows = 0 if arrays is None else len(arrays["offset"])
            for number, offset, line in self._lines(path, covered, rows):
                _add(builder, path, number, offset, line)
            yield path, builder.arrays()

    def _index(self, path: Path, stat: os.stat_result) -> dict[str, Any]:
        """Parse a whole segment and write its index."""
        builder, hashed, size = ColumnBuilder(), hashlib.blake2b(), 0
        for number, offset, line in self._lines(path):
            _add(builder, path, number, offset, line)
            hashed.update(line)
            size += len(line)
        arrays = builder.arrays()
        same = size == stat.st_size == path.stat().st_size
        index.write_index(
            path, arrays, size, hashed.hexdigest(), index.settled(stat.st_mtime_ns) if same else None
        )
        return arrays

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

    def _lines(self, path: Path, start: int = 0, rows: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """(number, offset, line) of the whole lines from `start` on, before which `rows` lines stand."""
        with path.open("rb", buffering=_BUFFER) as stream:
            stream.seek(start)
            for number, line in enumerate(stream, start=rows + 1):
                if not line.endswith(b"\n"):
                    if path.name not in self.torn:
                        log.warning("%s: the last line is incomplete (a writer was stopped); ignored", path)
                    self.torn[path.name] = len(line)
                    return
                yield number, start, line
                start += len(line)

    # -------------------------------------------------------------------------------------------- writing

    def append(self, records: Iterable[SampleRecord]) -> int:
        """Write the records whose key is new, all in one write, then fsync. Returns how many were written.

        On an OSError (a full disk) the segment is cut back to where it was and the error raised: nothing of
        the batch is kept, and the store stays good."""
        fresh: dict[str, SampleRecord] = {}
        for record in records:
            if not self.has(record.key):
                fresh.setdefault(record.key, record)
        if not fresh:
            return 0
        objects = [record.to_json() for record in fresh.values()]
        self._own_segment().write(objects)
        self._keys.update(map(key_digest, fresh))
        return len(fresh)

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _own_segment(self) -> _OwnSegment:
        if self._segment is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._repair()
            self._segment = _OwnSegment(self.folder)
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


class _OwnSegment:
    """The segment this process writes, locked, and the columns of what it has written so far."""

    def __init__(self, folder: Path) -> None:
        name = f"segment-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
        self.path = folder / name
        self._descriptor = os.open(self.path, flags, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        sync(folder)  # the name of a new file is only durable once its folder is
        self._size = 0
        self._hashed = hashlib.blake2b()
        self._builder = ColumnBuilder()

    def write(self, objects: Sequence[dict[str, Any]]) -> None:
        """One write and one fsync, or nothing."""
        lines = [_line(data) for data in objects]
        content = b"".join(lines)
        try:
            _write_all(self._descriptor, content)
            os.fsync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._hashed.update(content)
        for data, line in zip(objects, lines, strict=True):
            self._builder.add(data, self._size, len(line))
            self._size += len(line)

    def close(self) -> None:
        """Leave an index, then give the lock back. Nobody else writes here, so the time of our last write is sure."""
        stat = os.fstat(self._descriptor)
        if stat.st_size == self._size >= index.SMALLEST:
            arrays, digest = self._builder.arrays(), self._hashed.hexdigest()
            index.write_index(self.path, arrays, self._size, digest, stat.st_mtime_ns)
        os.close(self._descriptor)


def _line(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return (
        text.encode("utf-8", "surrogatepass") + b"\n"
    )  # half a surrogate pair may stand in a data set's JSON


def _key(path: Path, number: int, line: bytes) -> str:
    """The key of a line, without parsing the rest where it has our form."""
    end = len(_KEY_START) + _KEY_HEX
    if line.startswith(_KEY_START) and line[end : end + 1] == b'"':
        return line[len(_KEY_START) : end].decode()
    return _parse(path, number, line).key


def _add(builder: ColumnBuilder, path: Path, number: int, offset: int, line: bytes) -> None:
    try:
        builder.add(json.loads(line), offset, len(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _parse(path, number, line)  # says what is wrong, if it is with the record
        raise UserError(f"{path}, line {number}: damaged sample ({error}); move this segment away") from None


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
