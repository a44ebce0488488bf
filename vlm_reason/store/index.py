"""The columns of a segment, kept beside it: `segment-X.index` for `segment-X.jsonl`.

A cache and nothing more: it may be deleted at any time and is made again. It covers the first `size` bytes of its
segment, so it stays good while the segment grows. Before it is used it must prove that it belongs to these bytes: by
the segment's size, modification time and last block, or else by the hash of all the bytes it covers. One that is
damaged, of another version, or of other bytes is ignored. It is written beside and renamed into place, so a reader
sees a whole index whoever writes at the same time.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import write_atomically
from .columns import CODED, KEY_BYTES, ROW

log = logging.getLogger(__name__)

VERSION = 1
SMALLEST = 1 << 20  # bytes of a segment from which an index is worth a file
SETTLED = 1_000_000_000  # ns after which a modification time tells two versions of a file apart
_TAIL = 1 << 16
_BLOCK = 1 << 22
_ARRAYS = frozenset([*(ROW.names or ()), "choice_logps", "keys"])


@dataclass(frozen=True)
class Index:
    """What is known of the first `size` bytes of a segment; `columns` and `keys` are read when asked for."""

    path: Path
    size: int
    rows: int

    def keys(self) -> NDArray[np.uint8] | None:
        """[rows, 16], or None: the file is damaged after all."""
        arrays = self._read(["keys"])
        return None if arrays is None else arrays["keys"]

    def arrays(self) -> dict[str, Any] | None:
        """What `ColumnBuilder.arrays` gave, or None: the file is damaged after all."""
        arrays: dict[str, Any] | None = self._read([*_ARRAYS, "texts"])
        if arrays is None:
            return None
        texts = json.loads(arrays.pop("texts").tobytes())
        return {**arrays, **{name: texts[name] for name in CODED.values()}}

    def _read(self, names: list[str]) -> dict[str, Any] | None:
        arrays = _load(self.path, names)
        if arrays is None or any(
            len(arrays[name]) != self.rows for name in names if name not in ("texts", "choice_logps")
        ):
            return None
        return arrays


def index_path(segment: Path) -> Path:
    return segment.with_suffix(".index")


def find_index(segment: Path) -> Index | None:
    """The index of `segment` if there is one that proves to be its own; else None."""
    path = index_path(segment)
    arrays = _load(path, ["header"]) if path.exists() else None
    if arrays is None:
        return None
    try:
        header = json.loads(arrays["header"].tobytes())
        if header["version"] != VERSION or not _belongs(segment, header):
            log.info("%s is stale; it will be made again", path)
            return None
        return Index(path, int(header["size"]), int(header["rows"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(segment: Path, arrays: dict[str, Any], size: int, digest: str, mtime: int | None) -> None:
    """Keep `arrays` (of ColumnBuilder) for the first `size` bytes, whose blake2b is `digest`. `mtime`: modification
    time, ns, that belongs to exactly these bytes; None if that is not sure. A folder that cannot be written, or a full
    disk, only means that there is no index."""
    header = {
        "version": VERSION,
        "size": size,
        "rows": len(arrays["offset"]),
        "blake2b": digest,
        "mtime": mtime,
    }
    header["tail"] = _tail(segment, size)
    texts = {name: arrays[name] for name in CODED.values()}
    stored = {name: arrays[name] for name in _ARRAYS}
    buffer = io.BytesIO()
    np.savez(buffer, **stored, header=_bytes(header), texts=_bytes(texts))
    try:
        write_atomically(index_path(segment), buffer.getvalue())
    except OSError as error:
        log.info("no index beside %s (%s)", segment, error)


def settled(mtime: int) -> int | None:
    """`mtime` when it is old enough that a change from now on must have another, else None."""
    return mtime if time.time_ns() - mtime > SETTLED else None


def _belongs(segment: Path, header: dict[str, Any]) -> bool:
    stat, size = segment.stat(), header["size"]
    if stat.st_size < size or _tail(segment, size) != header["tail"]:
        return False
    if stat.st_size == size and stat.st_mtime_ns == header["mtime"]:
        return True
    return _digest(segment, size) == header["blake2b"]


def _digest(segment: Path, size: int) -> str:
    hashed = hashlib.blake2b()
    with segment.open("rb") as stream:
        while size and (block := stream.read(min(_BLOCK, size))):
            hashed.update(block)
            size -= len(block)
    return hashed.hexdigest()


def _tail(segment: Path, size: int) -> str:
    """Hash of the last block of the first `size` bytes."""
    with segment.open("rb") as stream:
        stream.seek(max(0, size - _TAIL))
        return hashlib.blake2b(stream.read(min(_TAIL, size))).hexdigest()


def _load(path: Path, names: list[str]) -> dict[str, NDArray[Any]] | None:
    """Arrays of an npz file, each with its checksum verified; None for a file that is damaged or incomplete."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        log.info("%s is damaged; it will be made again", path)
        return None


def _bytes(data: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def key_set(keys: NDArray[np.uint8]) -> set[bytes]:
    """The rows of [n, 16] as a set."""
    return set(np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").ravel().tolist())
