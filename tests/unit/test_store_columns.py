"""Columns and the index beside a segment: the same numbers with and without it, and never from a wrong one."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from vlm_reason.errors import UserError
from vlm_reason.store import Columns, SampleRecord, SampleStore, columns_of, index, sample_key
from vlm_reason.store.columns import concatenated, first_of_each


def record(problem: str = "p", k: int = 0, **changes: object) -> SampleRecord:
    base = SampleRecord(
        key=sample_key(weights="w", engine="e", prompt_ids=[1], parameters={"p": problem}, seed=k, k=k, m=1),
        problem_id=problem,
        question="1 + 1?",
        reference="2",
        prompt_ids=(1, 2),
        trace_ids=(3, 4),
        trace_text="so",
        trace_logps=(-0.25, -0.5),
        finish="stop",
        seed=k,
        temperature=0.5,
        top_p=0.9,
        proposal="reasoner/prior",
        saw_answer=False,
        weights="w",
        engine="e",
        k=k,
        m=1,
        answer_ids=(5,),
        answer_text="2",
        answer_logps=(-0.125,),
        answer_finish="stop",
        answer_seed=7,
        correct=True,
        score=1.0,
        parsed="2",
        failed=False,
        canonical="2",
    )
    return dataclasses.replace(base, **changes)


CUT = {"m": 0, "finish": "length", "answer_ids": (), "answer_logps": (), "answer_finish": None}
NO_VERDICT = {"correct": None, "score": None, "parsed": None, "failed": None, "canonical": None}


def variety() -> list[SampleRecord]:
    return [
        record("a", 0, member=0, reward=-1.5),
        record("a", 1, member=1, canonical="3", correct=False, score=0.0, failed=True),
        record("b", 2, **CUT, **NO_VERDICT),
        record("b", 3, canonical=None, correct=False, score=0.0, parsed=None, weights="v"),
        record(
            "\ud83d", 4, text_only=True, trace_ids=(), trace_logps=(), answer_ids=(), answer_logps=(),
            extra={"choice_logps": [-1.0, -2.0, -0.5], "choice_gold": 2},
        ),
        record("a", 5, extra={"choice_logps": [-3.0, -4.0], "choice_gold": None}),
    ]  # fmt: skip


def same(a: Columns, b: Columns) -> bool:
    """Equal in everything but where the records stand."""
    where = {"segment", "offset", "length", "files"}
    return all(
        np.array_equal(x, getattr(b, name), equal_nan=x.dtype.kind == "f")
        if isinstance(x, np.ndarray)
        else x == getattr(b, name)
        for name, x in vars(a).items()
        if name not in where
    )


def fill(folder: Path, records: list[SampleRecord]) -> Path:
    """A closed segment with these records."""
    before = set(folder.glob("segment-*.jsonl"))
    with SampleStore(folder) as store:
        assert store.append(records) == len(records)
    (made,) = set(folder.glob("segment-*.jsonl")) - before
    return made


@pytest.fixture
def small_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment gets an index, however small, and a modification time settles at once."""
    monkeypatch.setattr(index, "SMALLEST", 1)
    monkeypatch.setattr(index, "SETTLED", 0)


def test_columns_say_what_the_records_say(tmp_path: Path) -> None:
    fill(tmp_path, variety())
    store = SampleStore.open(tmp_path)
    c = store.columns()
    assert c.problems == ("a", "b", "\ud83d") and c.problem.tolist() == [0, 0, 1, 1, 2, 0]
    assert c.answers == ("2", "3") and c.canonical.tolist() == [0, 1, -1, -1, 0, 0]
    assert c.weight_names == ("w", "v") and c.weights.tolist() == [0, 0, 0, 1, 0, 0]
    assert c.member.tolist() == [0, 1, -1, -1, -1, -1] and c.k.tolist() == [0, 1, 2, 3, 4, 5]
    assert c.complete.tolist() == [True, True, False, True, True, True]
    assert c.answered.tolist() == [True, True, False, True, True, True]
    assert c.unparsed.tolist() == [False, False, False, True, False, False]
    assert c.correct.tolist() == [True, False, False, False, True, True]
    assert c.judged.tolist() == [True, True, False, True, True, True] and c.failed.sum() == 1
    assert c.trace_tokens.tolist() == [2, 2, 2, 2, -1, 2] and c.answer_tokens.tolist() == [1, 1, 0, 1, -1, 1]
    assert c.trace_logp[0] == -0.75 and c.answer_logp[0] == -0.125
    assert math.isnan(c.answer_logp[2]) and math.isnan(c.trace_logp[4]) and math.isnan(c.score[2])
    assert c.reward[0] == -1.5 and np.isnan(c.reward[1:]).all()
    assert c.choice_start.tolist() == [0, 0, 0, 0, 0, 3, 5] and c.choice_gold.tolist() == [-1] * 4 + [2, -1]
    assert c.choice_logps.tolist() == [-1.0, -2.0, -0.5, -3.0, -4.0]
    assert [c.record(row) for row in range(len(c))] == variety() == [store.record(row) for row in range(6)]
    assert same(c, columns_of(variety()))


def test_where_takes_rows_with_their_choices() -> None:
    c = columns_of(variety())
    kept = c.where(np.array([5, 0, 4]))
    assert kept.k.tolist() == [5, 0, 4] and kept.choice_start.tolist() == [0, 2, 2, 5]
    assert kept.choice_logps.tolist() == [-3.0, -4.0, -1.0, -2.0, -0.5]
    assert same(c.where(c.k < 2), columns_of(variety()[:2]).where(np.ones(2, bool))) is False  # codes stay
    assert c.where(c.k < 2).problem.tolist() == [0, 0] and len(c.where(c.k < 0)) == 0


def test_no_records_are_empty_columns(tmp_path: Path) -> None:
    for empty in (columns_of([]), SampleStore(tmp_path / "none").columns()):
        assert len(empty) == 0 and empty.problems == () and empty.choice_start.tolist() == [0]


def test_first_of_each_key_in_order() -> None:
    keys = np.array([[2] * 16, [1] * 16, [2] * 16, [0] * 8 + [2] * 8, [1] * 16], np.uint8)
    assert first_of_each(keys).tolist() == [0, 1, 3]


def test_two_writers_of_one_sample_are_one_row(tmp_path: Path) -> None:
    """Two writers that draw the same sample at the same time each keep it; readers see it once."""
    first, second = SampleStore(tmp_path), SampleStore(tmp_path)
    first.append(variety()[:4])
    second.append(variety()[2:])
    first.close()
    second.close()
    assert len(list(tmp_path.glob("segment-*.jsonl"))) == 2
    store = SampleStore.open(tmp_path)
    columns = store.columns()
    assert [columns.record(row) for row in range(len(columns))] == list(store.records())
    assert len(columns) == len(store) == 6


@pytest.mark.usefixtures("small_indexes")
def test_the_index_gives_what_parsing_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = fill(tmp_path, variety())
    assert index.find_index(segment) is not None
    parsed = columns_of(variety())
    with monkeypatch.context() as patch:  # nothing is parsed any more
        patch.setattr("vlm_reason.store.sample_store._parse", None)
        patch.setattr("vlm_reason.store.sample_store._add", None)
        store = SampleStore.open(tmp_path)
        assert same(store.columns(), parsed) and len(store) == 6
        assert all(store.has(r.key) for r in variety()) and not store.has("0" * 32)
    assert store.record(4) == variety()[4]
    index.index_path(segment).unlink()
    assert same(SampleStore.open(tmp_path).columns(), parsed)
    assert index.find_index(segment) is not None  # a reader that had to parse leaves one


def _read_columns(folder: str) -> None:
    for _ in range(5):
        assert same(SampleStore.open(folder).columns(), columns_of(variety()))
        for path in Path(folder).glob("*.index"):
            path.unlink(missing_ok=True)


@pytest.mark.usefixtures("small_indexes")
def test_readers_at_once_make_and_lose_indexes(tmp_path: Path) -> None:
    fill(tmp_path, variety())
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_read_columns, args=(str(tmp_path),)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert not [
        path for path in tmp_path.iterdir() if path.name.startswith(".")
    ]  # no half-written file stays


@pytest.mark.usefixtures("small_indexes")
@pytest.mark.parametrize("cut", [0, 1, 100, -1, -30])
def test_a_damaged_index_is_made_again(tmp_path: Path, cut: int) -> None:
    """Cut short (cut >= 0 bytes left) or with a byte flipped (at -cut from the end of the middle)."""
    segment = fill(tmp_path, variety())
    path = index.index_path(segment)
    good = path.read_bytes()
    if cut >= 0:
        path.write_bytes(good[:cut])
    else:
        broken = bytearray(good)
        for at in range(len(good) // 4, len(good), len(good) // 4):
            broken[at + cut] ^= 0xFF
        path.write_bytes(bytes(broken))
    store = SampleStore.open(tmp_path)
    assert len(store) == 6 and same(store.columns(), columns_of(variety()))
    assert same(SampleStore.open(tmp_path).columns(), columns_of(variety()))


@pytest.mark.usefixtures("small_indexes")
def test_an_index_of_other_bytes_is_not_trusted(tmp_path: Path) -> None:
    """The same size, and even the same time: the content decides."""
    segment = fill(tmp_path, variety())
    stat = segment.stat()
    other = segment.read_bytes().replace(b'"canonical": "2"', b'"canonical": "7"')
    segment.write_bytes(other)
    assert SampleStore.open(tmp_path).columns().answers[0] == "7"
    segment.write_bytes(other.replace(b'"canonical": "7"', b'"canonical": "8"'))
    os.utime(segment, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert SampleStore.open(tmp_path).columns().answers[0] == "8"


@pytest.mark.usefixtures("small_indexes")
def test_an_index_of_another_version_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = fill(tmp_path, variety())
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    assert index.find_index(segment) is None
    assert same(SampleStore.open(tmp_path).columns(), columns_of(variety()))
    assert index.find_index(segment) is not None


@pytest.mark.usefixtures("small_indexes")
def test_an_index_covers_the_beginning_of_a_segment_that_grew(tmp_path: Path) -> None:
    records = variety()
    with SampleStore(tmp_path) as writer:
        writer.append(records[:4])
        assert len(SampleStore(tmp_path).columns()) == 4  # leaves an index while the writer goes on
        (segment,) = tmp_path.glob("segment-*.jsonl")
        found = index.find_index(segment)
        assert found is not None and found.rows == 4
        writer.append(records[4:])
        reader = SampleStore(tmp_path)
        assert len(reader) == 6 and same(reader.columns(), columns_of(records))
    assert [reader.record(row) for row in range(6)] == records


@pytest.mark.usefixtures("small_indexes")
def test_a_copied_store_keeps_its_index(tmp_path: Path) -> None:
    """A copy has new times: the hash of the content proves it."""
    segment = fill(tmp_path, variety())
    os.utime(segment, ns=(time.time_ns(), time.time_ns()))
    assert index.find_index(segment) is not None


@pytest.mark.usefixtures("small_indexes")
def test_a_row_that_is_no_longer_there_is_not_misread(tmp_path: Path) -> None:
    segment = fill(tmp_path, variety())
    store = SampleStore.open(tmp_path)
    columns = store.columns()
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[1].replace(b'"k": 1', b'"k": 9').ljust(len(lines[0]) - 1)[: len(lines[0]) - 1])
    with pytest.raises(UserError, match="open the store again"):
        columns.record(0)


@pytest.mark.usefixtures("small_indexes")
def test_no_index_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "write_atomically", full)
    fill(tmp_path, variety())
    assert same(SampleStore.open(tmp_path).columns(), columns_of(variety()))
    assert list(tmp_path.glob("*.index")) == []


def test_a_small_segment_gets_no_index(tmp_path: Path) -> None:
    fill(tmp_path, variety())
    SampleStore.open(tmp_path).columns()
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_is_named_by_columns_too(tmp_path: Path) -> None:
    segment = fill(tmp_path, variety())
    text = segment.read_text(errors="surrogatepass")
    segment.write_text(text.replace("-0.25", "NaN", 1), errors="surrogatepass")
    with pytest.raises(UserError, match="line 1: damaged sample"):
        SampleStore.open(tmp_path).columns()


def test_a_verdict_is_true_false_or_absent(tmp_path: Path) -> None:
    segment = fill(tmp_path, [record("a", 0)])
    segment.write_text(segment.read_text().replace('"correct": true', '"correct": "no"'))
    with pytest.raises(UserError, match=r"line 1: damaged sample .*`correct` is 'no'"):
        SampleStore.open(tmp_path).columns()


def test_a_text_only_sample_has_no_ids_and_a_reward_is_finite() -> None:
    with pytest.raises(ValueError, match="text-only sample with 2 trace ids"):
        record(text_only=True)
    with pytest.raises(ValueError, match="reward nan is not finite"):
        record(reward=math.nan)


def test_concatenated_rows_keep_their_texts_choices_and_files(tmp_path: Path) -> None:
    """Problems stay apart although both stores have a `p`; an answer of both has one code."""
    parts = []
    for name, answers in (("one", ("2", "3")), ("two", ("3", "4", "2"))):
        with SampleStore(tmp_path / name) as store:
            for k, answer in enumerate(answers):
                extra = {"choice_logps": [-1.0 * k, -2.0], "choice_gold": 1} if k else {}
                store.append([record(k=k, canonical=answer, question=name, extra=extra)])
            parts.append(store.columns())
    a, b = parts
    both = concatenated(a, b)
    assert len(both) == 5 and both.problems == ("p", "p") and both.problem.tolist() == [0, 0, 1, 1, 1]
    assert [both.answers[c] for c in both.canonical] == ["2", "3", "3", "4", "2"]
    assert len(both.answers) == 3 and both.weight_names == ("w",)
    assert np.diff(both.choice_start).tolist() == [0, 2, 0, 2, 2] and both.choice_gold.tolist() == [
        -1,
        1,
        -1,
        1,
        1,
    ]
    assert both.choice_logps.tolist() == [-1, -2, -1, -2, -2, -2]
    assert [(r.question, r.k) for r in map(both.record, range(5))] == [
        ("one", 0), ("one", 1), ("two", 0), ("two", 1), ("two", 2),
    ]  # fmt: skip
    for name, value in vars(concatenated(a, b.where(np.arange(0)))).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, getattr(a, name), equal_nan=value.dtype.kind == "f"), name
            assert value.dtype == getattr(a, name).dtype, name
