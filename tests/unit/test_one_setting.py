"""Draws under two settings, of two posteriors or of two laws in one store are refused by what reads all of it, and the
one that is asked for by its settings is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.suite_parts import record
from tests.unit.test_evaluation import JUDGE, PROBLEMS, Builder, World
from tests.unit.test_summary import cut, members, of, sample
from vlm_reason.errors import UserError
from vlm_reason.evaluation import EvalConfig, sample_into, stored, summarise
from vlm_reason.evaluation.comparing import read_outcomes
from vlm_reason.ranking import candidates_from_records
from vlm_reason.store import Provenance, SampleRecord, SampleStore, check_one_setting

TWICE = "holds trace 0 of problem 'a' twice, drawn under different settings .caps, prompt, engine, temperature.: use an"

READERS = {
    "records": check_one_setting,
    "summarise": summarise,
    "summary": of,
    "candidates": candidates_from_records,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_one_trace_under_two_settings_is_refused(read: Any) -> None:
    closed, other = sample("a", 0), dataclasses.replace(sample("a", 0, "8"), key="other")
    for records in ([closed, other], [cut("a", 0), other], [other, cut("a", 0)]):
        with pytest.raises(UserError, match=TWICE):
            read([sample("a", 1), *records])
    read([sample("a", 0, "7"), sample("a", 0, "8", m=2), cut("a", 1), sample("a", 0, seed=1)])


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("top_p", 0.9)])
def test_two_laws_are_refused_where_their_seeds_are_the_same_too(name: str, value: float) -> None:
    records = [sample("a", 0), dataclasses.replace(sample("a", 0, **{name: value}), key="other")]
    with pytest.raises(UserError, match=f"problem 'a' has samples at {name} 1.0 and {value}"):
        of([sample("b", 0), *records])
    with pytest.raises(UserError, match=f"come from several {name}: {value}, 1.0"):
        candidates_from_records(records)
    of([sample("b", 0), sample("a", 0, **{name: value})])  # each problem has one


def test_one_of_two_settings_is_found_by_its_settings(tmp_path: Path) -> None:
    short, long = (Provenance("w", "e", 1.0, parameters={"max_trace_tokens": n}) for n in (64, 128))
    config = EvalConfig(traces=4, temperature=1.0)
    with SampleStore(tmp_path) as store:
        for world, source in ((World(0.5), short), (World(), long)):
            sample_into(store, world, Builder(), PROBLEMS[:30], JUDGE, config, source)
        alone = {
            source.parameters["max_trace_tokens"]: stored(store, Builder(), PROBLEMS[:30], config, source)
            for source in (short, long)
        }
        assert len(store) == len(alone[64]) + len(alone[128])
        assert sample_into(store, World(), Builder(), PROBLEMS[:30], JUDGE, config, long) == 0
    values = [summarise(alone[n]).accuracy.value for n in (64, 128)]
    assert 0 < values[0] < values[1]
    with pytest.raises(UserError, match="drawn under different settings"):
        summarise(list(SampleStore.open(tmp_path).records()))


# ---- members


def test_traces_of_members_without_seeds_of_their_own_are_traces_of_their_own() -> None:
    records = [*members({0: "88", 1: "7"})]
    assert {r.seed for r in records} == {0}
    done = summarise(records, members=True)
    assert done.accuracy.value == pytest.approx(1 / 3) and done.accuracy.n == 3
    assert done.pass_at[2].value == pytest.approx(2 / 3)  # of the three pairs, two hold the right one


def of_member(member: int | None, weights: str, k: int = 0, **changes: Any) -> SampleRecord:
    made = record(0, k, True, "base/prior", weights, "1")
    return dataclasses.replace(
        made, key=f"{member} {weights} {k} {changes}".ljust(32), member=member, **changes
    )


MIXED = {
    "one number, two posteriors": (
        [of_member(0, "a"), of_member(0, "b", 1)],
        r"member 0 of a; member 0 of b",
    ),
    "a model beside members": ([of_member(None, "a"), of_member(0, "b")], r"\(a; member 0 of b\)"),
    "two models": ([of_member(None, "a"), of_member(None, "b")], r"\(a; b\)"),
    "two top_p": (
        [of_member(None, "a"), of_member(None, "a", 1, top_p=0.9)],
        "temperature 1, top_p 0.9; base/prior at temperature 1, top_p 1",
    ),
}


@pytest.mark.parametrize(("records", "said"), MIXED.values(), ids=MIXED)
def test_several_systems_are_not_compared_as_one(
    tmp_path: Path, records: list[SampleRecord], said: str
) -> None:
    with SampleStore(tmp_path / "s") as store:
        store.append(records)
    for metric in ("accuracy", "answer_accuracy"):
        with pytest.raises(UserError, match=f"holds samples of several systems.*{said}"):
            read_outcomes(str(tmp_path / "s"), metric)  # type: ignore[arg-type]
    if "top_p" not in said:
        with pytest.raises(UserError, match="records of 2 models"):
            summarise(records, members=True)


def test_the_members_of_one_posterior_are_one_system(tmp_path: Path) -> None:
    with SampleStore(tmp_path / "s") as store:
        store.append([of_member(0, "a"), of_member(1, "b"), of_member(1, "b", 1)])
    assert read_outcomes(str(tmp_path / "s")).values == {"samples": {"p0": 1.0}}
