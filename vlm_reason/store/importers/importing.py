"""From a file of samples into a store: all of it or, if a line is wrong, nothing.

The file is read twice. The first time every line is checked; the second time records are appended in batches. A key
is a hash of the sample itself, so the same file again adds nothing, and a call that was killed is finished by repeating
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from ..record import SampleRecord
from ..sample_store import SampleStore
from . import lm_eval, recorded
from .source import BadSample, Reading, Source

BATCH = 2000
FORMATS: Mapping[str, Callable[[Mapping[str, Any], Source], list[SampleRecord]]] = {
    "lm-eval": lm_eval.records_of_line,
    "recorded": recorded.records_of_line,
}


@dataclass(frozen=True)
class Imported:
    """system: the name the samples stand under (`weights` of the records). samples: in the file; new: not in the store
    before. unparsed: without a readable answer (wrong, whatever the file says). failed: the file has no usable verdict
    or number for them (wrong too)."""

    format: str
    system: str
    problems: int
    samples: int
    new: int
    unparsed: int
    failed: int


def import_samples(
    file: str | Path,
    store: SampleStore,
    reading: Reading,
    *,
    format: str | None = None,
    system: str | None = None,
    member: int | None = None,
    filter: str | None = None,
    metric: str | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Imported:
    """Append the samples in `file`. format: a name of FORMATS, None to tell it from the first line. system: the name of
    the model; default the file's name and a hash of its content, so that a file that changed is another system.
    filter, metric: which of those in an lm-eval file. progress wraps the lines, as tqdm does.

    UserError, and nothing appended, for a line that cannot be read, and where the store has other samples of this
    system under the same problem and number.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no file {str(path)!r} to import")
    chosen = format or _format_of(path)
    if chosen not in FORMATS:
        raise UserError(f"unknown format {chosen!r}{nearest(chosen, FORMATS)}")
    content = _digest(path)
    source = Source(path, content, system or f"{path.stem}@{content[:8]}", member, reading, filter, metric)
    if chosen == "lm-eval":
        source = lm_eval.with_filter(source, (data for _, data in _objects(path)))
    counts = _check(_records(path, source, chosen, progress), source, store)
    new, records = 0, _records(path, source, chosen, iter)
    while batch := list(islice(records, BATCH)):
        new += store.append(batch)
    return Imported(chosen, source.system, counts[0], counts[1], new, counts[2], counts[3])


def _check(records: Iterable[SampleRecord], source: Source, store: SampleStore) -> tuple[int, int, int, int]:
    """(problems, samples, unparsed, failed) of the file. UserError for a sample number that is taken."""
    taken = _numbers(store, source)
    mine: dict[tuple[str, int], str] = {}
    unparsed = failed = 0
    for record in records:
        place = (record.problem_id, record.k)
        if mine.get(place) == record.key:
            continue  # the same line twice
        if place in mine or (place in taken and not store.has(record.key)):
            raise UserError(
                f"{source.path}: there is another sample {record.k} of problem {record.problem_id!r} under "
                f"{source.system!r} already; give these samples a name of their own with --system"
            )
        mine[place] = record.key
        unparsed += record.canonical is None
        failed += bool(record.failed)
    return len({problem for problem, _ in mine}), len(mine), unparsed, failed


def _numbers(store: SampleStore, source: Source) -> set[tuple[str, int]]:
    """(problem, k) of what the store has of this system and member already."""
    columns = store.columns()
    if source.system not in columns.weight_names:
        return set()
    member = -1 if source.member is None else source.member
    mine = columns.where(
        (columns.weights == columns.weight_names.index(source.system)) & (columns.member == member)
    )
    places = zip(mine.problem.tolist(), mine.k.tolist(), strict=True)
    return {(columns.problems[problem], k) for problem, k in places}


def _records(
    path: Path, source: Source, chosen: str, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> Iterator[SampleRecord]:
    for number, data in progress(_objects(path)):
        try:
            yield from FORMATS[chosen](data, source)
        except (BadSample, KeyError, ValueError, TypeError, IndexError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: {what} (read as {chosen})") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(data, dict):
                raise UserError(f"{path}, line {number}: {type(data).__name__} instead of a JSON object")
            yield number, data


def _format_of(path: Path) -> str:
    first = next(_objects(path), None)
    if first is None:
        raise UserError(f"{path}: no samples in it")
    if "samples" in first[1]:
        return "recorded"
    if "resps" in first[1]:
        return "lm-eval"
    raise UserError(f"{path}: neither lm-eval (`resps`) nor recorded samples (`samples`); give --format")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
