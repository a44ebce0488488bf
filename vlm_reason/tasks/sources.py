"""Where problems come from: reasoning-gym generators, JSONL files, Hugging Face data sets.

    load_problems(TaskSpec("reasoning_gym", "chain_sum", size=64, seed=7, options={"max_terms": 3}))
    load_problems(TaskSpec("jsonl", "data/gsm8k/test.jsonl", limit=200))
    load_problems(TaskSpec("hub", "openai/gsm8k", split="train", options={"config": "main", "answer_marker": "####"}))

Everything is deterministic: the same spec gives the same problems in the same order.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..compat.hub import hub_answers, hub_offline
from ..errors import UserError, nearest
from ..types import Problem
from .gym import load_gym
from .rows import Row, RowFormat, read_rows

logger = logging.getLogger(__name__)

Kind = Literal["reasoning_gym", "jsonl", "hub"]
ROW_OPTIONS = ("answer_marker", "shuffle", "config")


@dataclass(frozen=True)
class TaskSpec:
    """A set of problems, by description.

    kind     reasoning_gym, jsonl or hub
    name     generator name; path of a .jsonl file (or of a folder holding `<split>.jsonl`); data set id on the hub
    split    hub split, or the file inside a jsonl folder
    size     how many problems a generator makes (reasoning_gym only)
    seed     generator seed; for files, the seed of `shuffle`
    limit    keep the first `limit` problems, after shuffling
    fields   our column -> the data set's column, e.g. {"question": "problem"} (jsonl and hub)
    options  reasoning_gym: the generator's own options, and allow_quarantined;
             jsonl and hub: answer_marker (text between rationale and answer), shuffle (bool); hub: config (its name)
    """

    kind: Kind
    name: str
    split: str = "train"
    size: int | None = None
    seed: int = 0
    limit: int | None = None
    fields: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"task kind {self.kind!r} is unknown{nearest(self.kind, get_args(Kind))}")
        for name, value in (("size", self.size), ("limit", self.limit)):
            if value is not None and value < 1:
                raise UserError(f"task {self.name!r}: {name} must be >= 1, got {value}")
        if self.kind == "reasoning_gym" and self.size is None and self.limit is None:
            raise UserError(f"task {self.name!r}: say how many problems to generate (size)")
        if self.kind != "reasoning_gym":
            if self.size is not None:
                raise UserError(
                    f"task {self.name!r}: size is for generators; use limit for a {self.kind} task"
                )
            for option in self.options:
                if option not in ROW_OPTIONS:
                    raise UserError(
                        f"task {self.name!r}: unknown option {option!r}{nearest(option, ROW_OPTIONS)}"
                    )


def load_problems(spec: TaskSpec) -> list[Problem]:
    """All problems of `spec`, in a fixed order, with unique ids (a repeated id gets `#2`, `#3`, and is logged).

    Raises UserError: unknown or quarantined generator, file absent or empty, a line that is not JSON, a row without
    question or answer (all with file:line), hub out of reach, data set, split or column unknown.
    """
    if spec.kind == "reasoning_gym":
        options = dict(spec.options)
        allowed = bool(options.pop("allow_quarantined", False))
        size = min(n for n in (spec.size, spec.limit) if n is not None)
        return load_gym(spec.name, size, spec.seed, options, allowed)
    fmt = RowFormat(spec.fields, spec.options.get("answer_marker"))
    if spec.kind == "jsonl":
        path = _jsonl_path(spec)
        problems = read_rows(_jsonl_rows(path), path.stem, fmt)
    else:
        problems = read_rows(_hub_rows(spec), f"{spec.name}/{spec.split}", fmt)
    problems = _unique_ids(problems, spec.name)
    if spec.options.get("shuffle", False):
        random.Random(spec.seed).shuffle(problems)
    return problems[: spec.limit]


def held_out(problems: Sequence[Problem], training: Sequence[Problem]) -> list[Problem]:
    """The problems that are not asked in `training`, each once. Same question, context and choices: same problem.

    Needed for generators. Most of reasoning-gym draws problem i from seed + i, so seed 8 is seed 7 shifted by one: take
    seeds far apart. Small problems (2 terms of 1 digit) repeat even then.
    """
    seen = {_asked(p) for p in training}
    kept = []
    for problem in problems:
        if _asked(problem) not in seen:
            seen.add(_asked(problem))
            kept.append(problem)
    return kept


def _asked(problem: Problem) -> tuple[str, str, tuple[str, ...]]:
    return (
        problem.question,
        str(problem.metadata.get("context", "")),
        tuple(problem.metadata.get("choices", ())),
    )


def _unique_ids(problems: list[Problem], name: str) -> list[Problem]:
    """Ids key seeds and the sample store, so two problems may not share one."""
    repeated = {i for i, n in Counter(p.id for p in problems).items() if n > 1}
    if not repeated:
        return problems
    first = next(p.id for p in problems if p.id in repeated)
    logger.warning(
        "%s: %d ids occur more than once (first: %r); later ones get #2, #3", name, len(repeated), first
    )
    taken = {p.id for p in problems}
    visits: Counter[str] = Counter()
    unique = []
    for problem in problems:
        visits[problem.id] += 1
        if visits[problem.id] > 1:
            while (new_id := f"{problem.id}#{visits[problem.id]}") in taken:
                visits[problem.id] += 1
            taken.add(new_id)
            problem = replace(problem, id=new_id)
        unique.append(problem)
    return unique


def _jsonl_path(spec: TaskSpec) -> Path:
    path = Path(spec.name).expanduser()
    if path.is_dir():
        found = sorted(p.stem for p in path.glob("*.jsonl"))
        if spec.split not in found:
            raise UserError(
                f"folder {str(path)!r} has no {spec.split}.jsonl; splits there: {', '.join(found) or 'none'}"
            )
        return path / f"{spec.split}.jsonl"
    if not path.is_file():
        raise UserError(f"data file {str(path)!r} does not exist; paths are relative to the current folder")
    return path


def _jsonl_rows(path: Path) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # not splitlines: U+2028 may stand inside a text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path} is empty: no rows; give a file with one JSON object a line")
    return rows


def _hub_rows(spec: TaskSpec) -> Iterator[tuple[str, Row]]:
    import datasets

    config = spec.options.get("config")
    named = f"data set {spec.name!r} (split {spec.split!r}{f', config {config!r}' if config else ''})"
    try:
        with hub_offline(not hub_answers()):
            rows: Iterable[Row] = datasets.load_dataset(spec.name, config, split=spec.split)
    except ValueError as error:
        # `datasets` reports an unknown split or a missing config name as ValueError, listing what exists.
        raise UserError(f"{named}: {_one_line(error)}") from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {named} from the Hugging Face hub: {_one_line(error)}. Check the name and the network, or "
            "use a local source: kind jsonl with a file, or kind reasoning_gym (needs no network)"
        ) from error
    return ((f"{spec.name}[{spec.split}]:{index}", row) for index, row in enumerate(rows))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
