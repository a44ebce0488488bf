"""Metrics of many samples take seconds. The slow test is the whole million; the others fewer."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vlm_reason.evaluation import metrics


def votes(items: int, samples: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    share = np.cumsum(generator.dirichlet(np.full(samples, 0.3), items), axis=1)
    return (generator.random((items, samples, 1)) > share[:, None, :]).sum(axis=2)


def run(total: int, only: tuple[str, ...] = ()) -> dict[str, float]:
    """Seconds of every metric (or of those named) on `total` samples, or on total / 8 items of 8 samples."""
    generator = np.random.default_rng(1)
    x = generator.random(total)
    y = (generator.random(total) < x).astype(float)
    items = total // 8
    codes, gold = votes(items, 8), np.zeros(items, dtype=np.int64)
    right, score = (codes == 0).astype(float), generator.random((items, 8))
    vectors = generator.dirichlet(np.ones(4), items)
    labels = generator.integers(0, 4, items)
    logps = np.log(score)
    ids = [f"problem {i}" for i in range(items)]
    by_member = [[row[:4], row[4:]] for row in codes]
    calls = {
        "accuracy": lambda: metrics.accuracy(y, np.repeat(np.arange(items), 8)[: len(y)]),
        "pass_at_k": lambda: metrics.pass_at_k(right.sum(axis=1), np.full(items, 8), 4),
        "maj_at_k": lambda: metrics.maj_at_k(codes, gold, 4),
        "maj_at_k weighted": lambda: metrics.maj_at_k(codes, gold, 4, score),
        "best_of_k": lambda: metrics.best_of_k(score, right, 4),
        "vote_fraction": lambda: metrics.vote_fraction(codes),
        "nll": lambda: metrics.nll(vectors, labels),
        "brier": lambda: metrics.brier(vectors, labels),
        "ece": lambda: metrics.ece(x, y),
        "ece mass": lambda: metrics.ece(x, y, scheme="mass"),
        "mce": lambda: metrics.mce(x, y),
        "classwise_ece": lambda: metrics.classwise_ece(vectors, labels),
        "aurc": lambda: metrics.aurc(x, 1 - y),
        "prr": lambda: metrics.prr(x, 1 - y),
        "coverage_at_risk": lambda: metrics.coverage_at_risk(x, 1 - y, 0.3),
        "auroc": lambda: metrics.auroc(x, y),
        "aupr": lambda: metrics.aupr(x, y),
        "fpr_at_95": lambda: metrics.fpr_at_95(x, y),
        "mutual_information": lambda: metrics.mutual_information(np.stack([vectors, vectors[::-1]])),
        "answer_mutual_information": lambda: metrics.answer_mutual_information(by_member),
        "semantic_entropy": lambda: metrics.semantic_entropy(codes),
        "predictive_entropy": lambda: metrics.predictive_entropy(logps),
        "conformal": lambda: metrics.conformal(vectors[:1000], labels[:1000], vectors[1000:], labels[1000:]),
        "compare": lambda: metrics.compare(right[:, 0], right[:, 1], ids, ids),
        "compare means": lambda: metrics.compare(score[:, 0], score[:, 1], ids, ids),
    }
    seconds = {}
    for name, call in calls.items():
        if only and name not in only:
            continue
        begin = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - begin
    return seconds


def test_forty_thousand_samples() -> None:
    seconds = run(
        40_000,
        ("maj_at_k", "maj_at_k weighted", "best_of_k", "answer_mutual_information", "ece", "aurc", "compare"),
    )
    assert max(seconds.values()) < 10, seconds  # each takes a fraction of a second on an idle core


@pytest.mark.slow
def test_a_million_samples() -> None:
    seconds = run(1_000_000)
    print({name: round(s, 2) for name, s in seconds.items()})
    assert sum(seconds.values()) < 60, seconds
    assert seconds["maj_at_k"] < 10


def test_equal_patterns_are_worked_out_once(monkeypatch) -> None:
    from vlm_reason.evaluation.metrics import majority

    seen = []
    exact = majority._exact

    def counted(count, *rest):
        seen.append(len(count))
        return exact(count, *rest)

    monkeypatch.setattr(majority, "_exact", counted)
    metrics.maj_at_k(votes(20_000, 8), np.zeros(20_000, dtype=np.int64), 4)
    assert len(seen) == 1 and seen[0] < 100  # partitions of 8 with one part marked as right
