"""The rows of a task's table: each metric of each system, and its difference from the first system on the same
problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...stats import holm
from .. import metrics
from ..items import Array
from . import differences
from .curves import semantic_entropies
from .figures import Difference, Row, Task
from .system import Problems


@dataclass(frozen=True)
class Metric:
    """A row of the table. key: name in `Summary.estimates`, {k} being the number of samples. direction: 1
    higher is better, -1 lower. items: its value on every problem, whose mean it is; statistic: of two
    arrays over problems, (confidence, right) unless `of` gives others, where it is no mean. Without either, a
    difference has no interval and none is shown."""

    key: str
    label: str
    note: str
    family: str
    direction: int
    items: Callable[[Problems, int], Array] | None = None
    statistic: Callable[[Array, Array], float] | None = None
    digits: int = 3
    of: Callable[[Problems], tuple[Array, Array]] | None = None

    def arrays(self, p: Problems) -> tuple[Array, Array]:
        return _chosen(p) if self.of is None else self.of(p)


def rows(problems: Mapping[int, Problems]) -> tuple[Row, ...]:
    """Rows of one task, system by system inside each metric. problems: number of a system -> its problems. k is the
    fewest draws that a problem of any system has."""
    k = min(p.fewest for p in problems.values())
    made = []
    for metric in METRICS:
        for system, p in problems.items():
            name = metric.key.format(k=k)
            if name in p.summary.estimates and _wanted(metric, p, k):
                made.append(_row(metric, system, p, problems.get(0), k))
    return tuple(made)


def more(problems: Mapping[int, Problems], shown: Sequence[Row]) -> tuple[Row, ...]:
    """Every metric of the summaries that is no row yet, under its own name."""
    there = {row.key for row in shown}
    names = dict.fromkeys(
        name for p in problems.values() for name in p.summary.estimates if name not in there
    )
    return tuple(
        Row(name, name, "", "more", 0, 3, system, p.summary[name])
        for name in names
        for system, p in problems.items()
        if name in p.summary.estimates
    )


def skipped(problems: Mapping[int, Problems]) -> dict[str, str]:
    return {name: why for p in problems.values() for name, why in p.summary.skipped.items()}


def _wanted(metric: Metric, p: Problems, k: int) -> bool:
    """Of one sample, the vote, any and all are that sample; the vote of all samples is maj@k where all problems
    have k."""
    if metric.key == "answer_accuracy":
        return p.summary.decision is not None and (p.summary.decision.kind != "votes" or p.most > k)
    return k > 1 or "{k}" not in metric.key


def _row(metric: Metric, system: int, p: Problems, first: Problems | None, k: int) -> Row:
    name = metric.key.format(k=k)
    difference = None
    if system and first is not None and name in first.summary.estimates and first.same_problems(p):
        difference = _difference(metric, p, first, k)
    label = metric.label.format(k=k)
    if metric.key == "best_of@{k}":
        label += f" by {p.summary.scored_by}"
    return Row(
        name, label, metric.note.format(k=k), metric.family, metric.direction, metric.digits, system, p.summary[name],
        difference,
    )  # fmt: skip


def _difference(metric: Metric, p: Problems, first: Problems, k: int) -> Difference | None:
    if metric.items is not None:
        return differences.by_item(metric.items(p, k), metric.items(first, k), p.ids, first.ids)
    if metric.statistic is None:
        return None
    order = {name: i for i, name in enumerate(p.ids)}
    same = [order[name] for name in first.ids]
    one, two = metric.arrays(p)
    return differences.by_resampling(metric.statistic, (one[same], two[same]), metric.arrays(first))


def adjusted(tasks: Sequence[Task]) -> list[Task]:
    """p of each metric adjusted by Holm over the tasks, where there are several."""
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for t, task in enumerate(tasks):
        for r, row in enumerate(task.rows):
            if row.difference is not None and np.isfinite(row.difference.p):
                groups.setdefault((row.key, row.system), []).append((t, r))
    made = [list(task.rows) for task in tasks]
    for places in groups.values():
        values = [made[t][r].difference for t, r in places]
        found = holm([d.p for d in values if d is not None])
        for (t, r), d, p in zip(places, values, found, strict=True):
            if d is not None and len(places) > 1:
                method = f"{d.method}, Holm over {len(places)} tasks"
                made[t][r] = replace(made[t][r], difference=replace(d, p=p, method=method))
    return [replace(task, rows=tuple(own)) for task, own in zip(tasks, made, strict=True)]


# ----------------------------------------------------------------------------------- values of the problems


def _accuracy(p: Problems, k: int) -> Array:
    return p.items.accuracy


def _answer(p: Problems, k: int) -> Array:
    return p.right.astype(float)


def _pass(p: Problems, k: int) -> Array:
    pairs = zip(p.items.n.tolist(), p.items.hits.tolist(), strict=True)
    return np.array([metrics.pass_at_k_of_item(n, c, k) for n, c in pairs])


def _pass_hat(p: Problems, k: int) -> Array:
    pairs = zip(p.items.n.tolist(), p.items.hits.tolist(), strict=True)
    return np.array([metrics.pass_hat_k_of_item(n, c, k) for n, c in pairs])


def _maj(p: Problems, k: int) -> Array:
    pairs = zip(p.answers, p.correct, strict=True)
    if p.most == k:
        return np.array([_vote(a, c) for a, c in pairs])
    return np.array([metrics.maj_at_k_judged([a], [c], k).value for a, c in pairs])


def _vote(answers: NDArray[np.int64], correct: NDArray[np.bool_]) -> float:
    """Rightness of the winner of all samples, a tie split evenly; 0 where nothing could be read."""
    codes, votes = np.unique(answers[answers >= 0], return_counts=True)
    winners = codes[votes == votes.max(initial=0)]
    return float(np.mean([correct[answers == w].mean() for w in winners])) if len(winners) else 0.0


def _brier(p: Problems, k: int) -> Array:
    return (p.confidence - p.right) ** 2


def _entropy(p: Problems, k: int) -> Array:
    return semantic_entropies(p)


def _information(p: Problems, k: int) -> Array:
    return metrics.answer_disagreement(p.by_member()).miller_madow


def _unparsed(p: Problems) -> tuple[Array, Array]:
    """[n] answers that could not be read, and answers given: the row is the ratio of their sums, for a problem
    whose rationales were all cut has no share of its own."""
    answered = p.items.rows.answered
    codes = p.items.rows.problem
    order = {int(c): i for i, c in enumerate(p.columns.problem[p.items.start[:-1]])}
    item = np.array([order[c] for c in codes[answered].tolist()], dtype=np.int64)
    unread = np.bincount(item, weights=p.items.rows.unparsed[answered], minlength=len(p))
    return unread.astype(float), np.bincount(item, minlength=len(p)).astype(float)


def _chosen(p: Problems) -> tuple[Array, Array]:
    return p.confidence, p.right.astype(float)


def _truncated(p: Problems, k: int) -> Array:
    return p.items.mean((~p.columns.complete).astype(float))


def _length(p: Problems, k: int) -> Array:
    return p.items.mean(p.columns.trace_tokens.astype(float))


METRICS: Sequence[Metric] = (
    Metric("accuracy", "accuracy of a sample", "share of right answers among all samples", "right", 1, _accuracy),
    Metric("answer_accuracy", "accuracy of the answer", "is the answer that the system settles on right", "right", 1,
           _answer),
    Metric("maj@{k}", "maj@{k}", "is the answer that wins the vote of {k} samples right", "right", 1, _maj),
    Metric("pass@{k}", "pass@{k}", "is any of {k} samples right", "right", 1, _pass),
    Metric("pass^{k}", "pass^{k}", "are all of {k} samples right", "right", 1, _pass_hat),
    Metric("best_of@{k}", "best-of-{k}", "is the sample of {k} that scores highest right", "right", 1),
    Metric("ece", "ECE", "expected calibration error of the confidence, 15 bins of equal width", "calibration", -1,
           None, differences.ece),
    Metric("mce", "MCE", "largest calibration error of a bin", "calibration", -1),
    Metric("brier", "Brier score", "mean squared error of the confidence, in [0, 1]", "calibration", -1, _brier),
    Metric("auroc", "AUROC of confidence", "chance that a right answer is surer than a wrong one", "selection", 1,
           None, differences.auroc),
    Metric("aurc", "AURC", "area under the risk-coverage curve", "selection", -1, None, differences.aurc),
    Metric("prr", "PRR", "prediction rejection ratio: 1 is the best order of certainty there is, 0 a random one",
           "selection", 1, None, differences.prr),
    Metric("semantic_entropy", "semantic entropy", "nats, over canonical answers", "uncertainty", 0, _entropy),
    Metric("mutual_information_corrected", "mutual information", "nats, between members, Miller-Madow corrected",
           "uncertainty", 0, _information),
    Metric("unparsed", "unreadable answers", "share of given answers that could not be read; they count as wrong",
           "health", -1, None, differences.ratio, of=_unparsed),
    Metric("truncated", "unfinished rationales", "share of rationales that never closed; they count as wrong",
           "health", -1, _truncated),
    Metric("trace_tokens", "tokens of a rationale", "mean length", "health", 0, _length, digits=1),
)  # fmt: skip
