"""Stores -> Report: reads the systems, computes every figure once, and picks the problems the page shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...types import Estimate
from .. import metrics
from ..result import commit
from . import curves
from .figures import Figure, Header, Notice, Report, Task, plain
from .notices import of_comparison, of_problems, of_system
from .rationales import Place, item, places, whole
from .rows import adjusted, more, rows, skipped
from .system import Problems, System, data_hash, problems_of, read_systems
from .tokens import Decode, decoder_of

MOST_SYSTEMS = 6
ITEM_BYTES = 6_000_000
"""Of rationales in the page; what is beyond goes to the file beside it."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ReportConfig:
    """title: None is made of the systems' names. method: of ranking the rationales, one that needs no model.
    items: problems with their rationales in the page. target_risk: marked in the risk-coverage curve.
    tokenizer: a name or folder, for samples whose store does not say which model drew them."""

    title: str | None = None
    method: str = "majority"
    items: int = 200
    target_risk: float = 0.05
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target_risk < 1:
            raise UserError(f"target risk must be between 0 and 1, got {self.target_risk:g}")
        if self.items < 0:
            raise UserError(f"items must be >= 0, got {self.items}")


@dataclass(frozen=True)
class Built:
    """The report, and the problems that it does not show whole, for the file beside it."""

    report: Report
    left_out: tuple[Place, ...]
    systems: tuple[System, ...]


def build(
    stores: Sequence[str | Path],
    ood: Sequence[str | Path] = (),
    config: ReportConfig = ReportConfig(),
    progress: Progress = lambda stage: None,
) -> Built:
    """Every figure of these stores. ood: stores of the same systems on problems out of distribution, one for
    all systems or one for each, in order. UserError for stores that cannot be read, or too many of them."""
    progress("reading samples")
    systems = read_systems(stores)
    if len(systems) > MOST_SYSTEMS:
        names = ", ".join(system.name for system in systems)
        raise UserError(
            f"{len(systems)} systems in these stores ({names}); a report takes at most {MOST_SYSTEMS}"
        )
    outside = _outside(systems, ood)
    by_task = _tasks(systems)
    notices = [n for system in systems for n in of_system(system, len(systems) > 1)]
    tasks = []
    for name, problems in by_task.items():
        progress(f"metrics of {name}")
        figures = _figures(problems, outside, config.target_risk)
        table = rows(problems)
        tasks.append(Task(name, table, more(problems, table), skipped(problems), tuple(figures)))
        notices += _task_notices(systems, name, problems, len(by_task) > 1)
    progress("rationales")
    found = places(list(by_task.values()), config.method)
    shown, left_out = _items(found, systems, config)
    headers = tuple(_header(system) for system in systems)
    title = config.title or " and ".join(header.name for header in headers)
    report = Report(
        title,
        headers,
        tuple(notices),
        tuple(adjusted(tasks)),
        tuple(shown),
        config.method,
        _made(systems, config),
    )
    return Built(report, tuple(left_out), tuple(systems))


def _tasks(systems: Sequence[System]) -> dict[str, dict[int, Problems]]:
    """Task -> system -> problems. Where every system has a single task it is the same one, whatever its ids
    look like."""
    if len(systems) > 1 and all(len(s.tasks) == 1 for s in systems):
        name = next(iter(systems[0].tasks))
        return {name: {i: next(iter(s.tasks.values())) for i, s in enumerate(systems)}}
    names = dict.fromkeys(name for system in systems for name in system.tasks)
    return {name: {i: s.tasks[name] for i, s in enumerate(systems) if name in s.tasks} for name in names}


def _outside(systems: Sequence[System], ood: Sequence[str | Path]) -> dict[int, Problems]:
    """System -> its problems out of distribution."""
    if not ood:
        return {}
    found = read_systems(ood)
    if len(found) not in (1, len(systems)):
        raise UserError(
            f"{len(found)} systems out of distribution for {len(systems)} systems: give --ood one store for each"
        )
    made = {}
    for i, system in enumerate(found):
        if set(system.weights) != set(systems[i].weights):
            raise UserError(
                f"the samples in {system.folder!r} were drawn by other weights ({system.weights[0]}) than those in "
                f"{systems[i].folder!r} ({systems[i].weights[0]}): what tells them apart would not be the problems"
            )
        made[i] = problems_of(system.columns)
    return made


def _figures(
    problems: Mapping[int, Problems], outside: Mapping[int, Problems], target: float
) -> list[Figure]:
    """Calibration and selection first: what most readers come for."""
    pairs = list(problems.items())
    other = [(i, p, outside[i]) for i, p in pairs if i in outside]
    return [
        *(curves.reliability(p, i) for i, p in pairs),
        curves.risk_coverage(pairs, target),
        *(curves.repeats(p, i) for i, p in pairs),
        *(curves.entropy(p, i, outside.get(i)) for i, p in pairs),
        *(curves.conformal(p, i) for i, p in pairs),
        curves.roc(other),
        *_of_members(pairs, outside),
    ]


def _of_members(pairs: Sequence[tuple[int, Problems]], outside: Mapping[int, Problems]) -> list[Figure]:
    """Of the systems that have members; where none has, that is said once."""
    kept = [(i, p) for i, p in pairs if len(p.members) > 1]
    if not kept:
        _, p = pairs[0]
        return [
            replace(f, system=None)
            for f in (curves.mutual_information(p, 0, None), curves.member_variance(p, 0))
        ]
    return [
        figure
        for i, p in kept
        for figure in (curves.mutual_information(p, i, outside.get(i)), curves.member_variance(p, i))
    ]


def _task_notices(
    systems: Sequence[System], task: str, problems: Mapping[int, Problems], several: bool
) -> list[Notice]:
    notices: list[Notice] = []
    for i, p in problems.items():
        parts = [task] if several else []
        parts += [systems[i].name] if len(systems) > 1 else []
        notices += of_problems(", ".join(parts), p)
    if len(systems) > 1:
        notices += of_comparison([s.name for s in systems], task, problems)
    return notices


# ---------------------------------------------------------------------------------------------- the items


def _items(
    found: Sequence[Place], systems: Sequence[System], config: ReportConfig
) -> tuple[list[dict[str, Any]], list[Place]]:
    """The first so many problems as the page shows them, until they are too many bytes; and those not shown whole."""
    decoders: dict[int, Decode | None] = {}
    shown: list[dict[str, Any]] = []
    left_out: list[Place] = []
    size = 0
    for n, place in enumerate(found):
        if n >= config.items:
            left_out += found[n:]
            break
        if place.system not in decoders:
            decoders[place.system] = decoder_of(systems[place.system].folder, config.tokenizer)
        made = item(place, config.method, decoders[place.system])
        size += len(json.dumps(plain(made), ensure_ascii=False).encode("utf-8", "replace"))
        if size > ITEM_BYTES:
            left_out += found[n:]
            break
        shown.append(made)
        if not whole(made):
            left_out.append(place)
    return shown, left_out


# --------------------------------------------------------------------------------------------- the header


def _header(system: System) -> Header:
    c = system.columns
    everything = list(system.tasks.values())
    samples = sum(len(p.columns) for p in everything)
    facts = [
        (
            "problems",
            f"{system.problems:,}" + (f" of {len(everything)} tasks" if len(everything) > 1 else ""),
        ),
        (
            "samples",
            f"{samples:,} ({_range([p.fewest for p in everything], [p.most for p in everything])} a problem)",
        ),
        (
            "sampling",
            f"{_values(c.temperature, 'temperature {}')}, {_values(c.top_p, 'top-p {}')}, {_proposal(system)}",
        ),
        ("unreadable", _percent(c.unparsed.sum(), c.answered.sum())),
        ("unfinished", _percent((c.finish != 0).sum(), len(c))),
        ("cost", _cost(system)),
        ("model", _model(system)),
        ("engine", ", ".join(dict.fromkeys(c.engines[i] for i in np.unique(c.engine)))),
        ("data", data_hash(system)),
        ("store", system.folder),
    ]
    return Header(system.name, _accuracy(everything), system.problems, samples, tuple(facts))


def _accuracy(parts: Sequence[Problems]) -> Estimate:
    """Of all samples of all tasks."""
    right = np.concatenate([p.items.right for p in parts])
    sizes = np.concatenate([p.items.n for p in parts])
    return metrics.accuracy(right, np.repeat(np.arange(len(sizes)), sizes))


def _range(low: Sequence[int], high: Sequence[int]) -> str:
    return f"{min(low)}" if min(low) == max(high) else f"{min(low)} to {max(high)}"


def _values(values: Any, form: str) -> str:
    found = np.unique(values)
    return form.format(", ".join(f"{v:g}" for v in found[:4]))


def _proposal(system: System) -> str:
    return system.columns.proposals[int(system.columns.proposal[0])]


def _percent(part: int, of: int) -> str:
    return f"{part / of:.1%} ({part:,} of {of:,})" if of else "–"


def _cost(system: System) -> str:
    if system.columns.text_only.any():
        return "unknown (imported as text)"
    tokens = sum(
        int(p.columns.trace_tokens.sum() + p.items.rows.answer_tokens.sum()) for p in system.tasks.values()
    )
    return f"{tokens:,} tokens sampled"


def _model(system: System) -> str:
    versions = np.unique(system.columns.policy_version)
    members = next(iter(system.tasks.values())).members
    text = f"{len(members)} members of a posterior" if len(members) > 1 else f"weights {system.weights[0]}"
    steps = ", ".join(str(v) for v in versions[:4])
    return text + (f", after {steps} optimiser steps" if versions.max(initial=0) > 0 else "")


def _made(systems: Sequence[System], config: ReportConfig) -> str:
    today = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    source = commit()
    return (
        f"{today} · vlm-reason {version('vlm-reason')}{f' at {source[:12]}' if source else ''} · "
        f"answers by {config.method} · {sum(s.problems for s in systems):,} problems"
    )
