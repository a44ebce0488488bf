"""What a report reads: one system (a model, an adapter, or the M members of a posterior) on one task, as per-problem
arrays.

A store may hold several systems (other weights, another proposal) and several tasks. Members of one posterior
are one system. The task of a problem is the folder of its store in a suite's results, or else what is left of
its id without its numbers: `chain_sum/1000000/7` is of `chain_sum`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...store import Columns, SampleStore
from ...store.columns import concatenated
from ..comparing import problem_hash
from ..items import Array, Bool, Items
from ..summary import Summary, summary

MOST_TASKS = 40
_NUMBERS = re.compile(r"(?:[/_#:.\-]?\d+)+$")


@dataclass(frozen=True)
class Problems:
    """One system on one task: its `Summary`, and what plots and rationales read of it. A draw is a trace with
    the first answer behind it; lists have an entry a problem, in the order of `ids`."""

    summary: Summary

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def items(self) -> Items:
        return self.summary.items

    @property
    def ids(self) -> tuple[str, ...]:
        return self.items.ids

    @property
    def columns(self) -> Columns:
        """Of the draws; problem i has the rows start[i] : start[i + 1]."""
        return self.items.draws

    @property
    def fewest(self) -> int:
        """Draws of the problem that has the fewest."""
        return int(self.items.n.min(initial=1 << 30)) if len(self) else 0

    @property
    def most(self) -> int:
        return int(self.items.n.max(initial=0))

    @property
    def members(self) -> tuple[int, ...]:
        return self.items.members

    @property
    def answers(self) -> list[NDArray[np.int64]]:
        """Codes of the canonical answers, -1 for one that was not given or could not be read."""
        return self.items.answers

    @cached_property
    def correct(self) -> list[Bool]:
        """Parallel to answers."""
        return [own.astype(bool) for own in self.items.split(self.columns.correct)]

    @property
    def sure(self) -> bool:
        """Is there a confidence at all?"""
        return self.summary.decision is not None

    @property
    def confidence(self) -> Array:
        """[n] of the answer the system settles on."""
        assert self.summary.decision is not None
        return self.summary.decision.confidence

    @cached_property
    def right(self) -> Bool:
        """[n] is that answer right? With no decision: the first draw's."""
        if self.summary.decision is None:
            return self.columns.correct[self.items.start[:-1]].astype(bool)
        return self.summary.decision.correct.astype(bool)

    @cached_property
    def chosen(self) -> list[str | None]:
        """The answer it settles on, None where nothing could be read."""
        decision, first = self.summary.decision, self.columns.canonical[self.items.start[:-1]]
        codes = decision.answer if decision is not None and decision.kind != "choices" else first
        return [self.columns.answers[code] if code >= 0 else None for code in codes.tolist()]

    @cached_property
    def sampled(self) -> Bool:
        """[n] was any draw right?"""
        return self.items.hits > 0

    @cached_property
    def asked(self) -> dict[str, str]:
        """Problem -> hash of its question and reference answer."""
        starts = self.items.start[:-1].tolist()
        records = (self.columns.record(row) for row in starts)
        return {
            name: problem_hash(r.question, r.reference) for name, r in zip(self.ids, records, strict=True)
        }

    def same_problems(self, other: Problems) -> bool:
        return set(self.ids) == set(other.ids) and self.asked == other.asked

    def by_member(self) -> list[list[list[int | None]]]:
        """answers[problem][member]: codes, None for one that could not be read, in the order of `members`."""
        member = self.items.split(self.columns.member)
        return [
            [[code if code >= 0 else None for code in own[of == m].tolist()] for m in self.members]
            for own, of in zip(self.answers, member, strict=True)
        ]


@dataclass(frozen=True)
class System:
    """columns: of all tasks. tasks: name -> its problems. `left_out`: samples that saw the answer and so predict
    nothing."""

    name: str
    folder: str
    weights: tuple[str, ...]
    columns: Columns
    tasks: dict[str, Problems]
    left_out: int = 0
    torn: int = 0

    @property
    def problems(self) -> int:
        return sum(map(len, self.tasks.values()))


def read_systems(folders: Sequence[str | Path]) -> list[System]:
    """The systems in these stores, in this order, with names that differ. UserError for a folder without
    samples, and for samples without a verdict."""
    systems: list[System] = []
    for folder in folders:
        found: list[System] = []
        for task, path in _stores(Path(folder)):
            with SampleStore.open(path) as store:
                columns, torn = store.columns(), len(store.torn)
            for system in _systems_of(columns, str(folder), task, torn):
                same = next((i for i, before in enumerate(found) if _elsewhere(before, system)), None)
                if same is None:
                    found.append(system)
                else:
                    found[same] = _joined(found[same], system)
        systems += found
    return _distinct(systems)


def _stores(folder: Path) -> list[tuple[str | None, Path]]:
    """(task, store): the folder itself, or those a suite left under it: FOLDER/TASK or FOLDER/TASK/samples."""
    if _is_store(folder):
        return [(None, folder)]
    if _is_store(folder / "samples"):
        return [(None, folder / "samples")]
    below = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    found: list[tuple[str | None, Path]] = []
    for path in below:
        store = next((p for p in (path, path / "samples") if _is_store(p)), None)
        if store is not None:
            found.append((path.name, store))
    if not found:
        raise UserError(f"no samples in {str(folder)!r}; draw some first (vlm-reason sample), or import some")
    return found


def _is_store(folder: Path) -> bool:
    return any(folder.glob("segment-*.jsonl"))


def _systems_of(columns: Columns, folder: str, task: str | None, torn: int) -> list[System]:
    """One system for each model and law in the columns; the members of a posterior are one."""
    fair = columns.where(~columns.saw_answer)
    if len(columns) == 0:
        raise UserError(f"no samples in {folder!r}; draw some first (vlm-reason sample), or import some")
    if len(fair) == 0:
        raise UserError(
            f"all {len(columns)} samples of {folder!r} saw the answer; sample from the prior prompt"
        )
    made = []
    for rows in _by_law(fair):
        own = fair.where(rows)
        weights = tuple(fair.weight_names[i] for i in dict.fromkeys(own.weights.tolist()))
        proposal, temperature = fair.proposals[int(own.proposal[0])], float(own.temperature[0])
        top_p = float(own.top_p[0])
        name = f"{weights[0]} {proposal}, temperature {temperature:g}"
        name += f", top-p {top_p:g}" if top_p != 1 else ""
        made.append(System(name, folder, weights, own, _tasks(own, task)))
    return [replace(made[0], left_out=len(columns) - len(fair), torn=torn), *made[1:]]


def _by_law(columns: Columns) -> list[NDArray[np.int64]]:
    """Rows of each model under one law: equal weights (or members of a posterior), proposal, temperature and top-p."""
    model = np.where(columns.member >= 0, -1, columns.weights)
    laws = np.stack([model, columns.proposal, columns.temperature, columns.top_p], axis=1)
    _, first, group = np.unique(laws, axis=0, return_index=True, return_inverse=True)
    return [np.flatnonzero(group.ravel() == g) for g in np.argsort(first)]


def _tasks(columns: Columns, task: str | None) -> dict[str, Problems]:
    if task is not None:
        return {task: problems_of(columns)}
    names = [_NUMBERS.sub("", name) or "all problems" for name in columns.problems]
    used = dict.fromkeys(names[code] for code in columns.problem.tolist())
    if len(used) > MOST_TASKS:
        return {"all problems": problems_of(columns)}
    of = np.array([list(used).index(name) if name in used else -1 for name in names])[columns.problem]
    return {name: problems_of(columns.where(of == i)) for i, name in enumerate(used)}


def problems_of(columns: Columns) -> Problems:
    """The metrics are those of `summary`; k of the curves are 1, 2, 4, ... and the fewest draws of a problem."""
    fewest = _fewest_draws(columns)
    return Problems(summary(columns, ks=sizes(fewest)))


def _fewest_draws(columns: Columns) -> int:
    """Draws of the problem that has the fewest, before they are grouped."""
    keys = np.stack([columns.problem, columns.weights, columns.member, columns.k], axis=1)
    both = np.concatenate([keys, columns.seed[:, None]], axis=1)
    draws = np.unique(both, axis=0)
    return int(np.unique(draws[:, 0], return_counts=True)[1].min(initial=1 << 30)) if len(draws) else 0


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


def _elsewhere(a: System, b: System) -> bool:
    """Is b the same system on other tasks, in another store of the same suite?"""
    return a.name == b.name and a.tasks.keys().isdisjoint(b.tasks)


def _joined(a: System, b: System) -> System:
    """One system, with the tasks and the samples of both."""
    return replace(
        a,
        weights=tuple(dict.fromkeys((*a.weights, *b.weights))),
        columns=concatenated(a.columns, b.columns),
        tasks={**a.tasks, **b.tasks},
        left_out=a.left_out + b.left_out,
        torn=a.torn + b.torn,
    )


def _distinct(systems: Sequence[System]) -> list[System]:
    """Names for people: the folder where that is enough, its weights and proposal behind it where not."""
    labels = [_label(system.folder) for system in systems]
    named: list[System] = []
    for i, (system, label) in enumerate(zip(systems, labels, strict=True)):
        if labels.count(label) > 1:
            label = f"{label} ({system.name})"
        if any(other.name == label for other in named):
            label = f"{label} #{i + 1}"
        named.append(replace(system, name=label))
    return named


def _label(folder: str) -> str:
    """`runs/x/samples` is told by `x`."""
    parts = [p for p in Path(folder).resolve().parts if p not in ("/", "samples")]
    return parts[-1] if parts else folder


def data_hash(system: System) -> str:
    """12 hex digits of what was asked: ids, questions and reference answers, in order of id."""
    digest = hashlib.blake2b(digest_size=6)
    for name, asked in sorted(pair for p in system.tasks.values() for pair in p.asked.items()):
        digest.update(f"{name}\0{asked}\0".encode("utf-8", "replace"))
    return digest.hexdigest()
