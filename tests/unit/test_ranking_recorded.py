"""Rankers on recorded samples of a real model (100 questions x 8, with rewards), against the published figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_reason.ranking import Ranked, candidates_from_records, compare_outcomes, lacking, rank
from vlm_reason.store import SampleRecord, SampleStore
from vlm_reason.store.importers import Reading, import_samples
from vlm_reason.tasks.answers import canonical, extract_answer


@pytest.fixture(scope="module")
def groups(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[SampleRecord]]:
    reading = Reading(lambda text: extract_answer(text, "math"), lambda answer: canonical(answer, "math"))
    with SampleStore(tmp_path_factory.mktemp("recorded")) as store:
        import_samples(shared_data / "recorded_math_rm8" / "test.jsonl", store, reading)
        return store.by_problem()


def compared(groups: dict[str, list[SampleRecord]], method: str) -> Ranked:
    rankings = {name: rank(candidates_from_records(own), method) for name, own in groups.items()}
    return compare_outcomes(method, groups, rankings)


def split_ties(groups: dict[str, list[SampleRecord]]) -> float:
    """Accuracy of the vote with the first place shared evenly among the classes that tie for it."""
    total = 0.0
    for own in groups.values():
        ranking = rank(candidates_from_records(own), "majority")
        right = {r.canonical for r in own if r.correct}
        top = [
            c for c, p in zip(ranking.classes, ranking.posterior, strict=True) if p == ranking.posterior[0]
        ]
        total += sum(c in right for c in top) / max(1, len(top))
    return total / len(groups)


def test_best_of_8_by_reward_and_votes(groups: dict[str, list[SampleRecord]]) -> None:
    """Best of 8 by reward is 0.94 and a right answer is among the 8 in 0.96; the vote is 0.925 with ties split evenly,
    and breaks them by name otherwise."""
    best, vote, weighted = (compared(groups, m) for m in ("best_of_n_reward", "majority", "weighted_vote"))
    assert best.accuracy.value == pytest.approx(0.94) and split_ties(groups) == pytest.approx(0.925)
    for ranked in (best, vote, weighted):
        counts = ranked.to_json()
        assert counts["coverage_failures"] == 4
        assert counts["selection_failures"] == 96 - round(100 * ranked.accuracy.value)
    assert weighted.accuracy.value >= vote.accuracy.value
    difference = best.minus(vote)
    assert difference.n == 100 and difference.wins - difference.losses == round(100 * difference.value)


def test_text_alone_has_no_likelihoods(groups: dict[str, list[SampleRecord]]) -> None:
    first = candidates_from_records(next(iter(groups.values())))
    assert lacking(first, "best_of_n_reward") == () and "logp_answer" in lacking(first, "mixture")
