from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm_reason.errors import UserError
from vlm_reason.store import Provenance, SampleRecord, SampleStore, records_of, sample_key
from vlm_reason.types import Completion, Problem, Trace, TraceGroup


def record(problem: str = "p", k: int = 0, **changes: object) -> SampleRecord:
    base = SampleRecord(
        key=sample_key(
            weights="w", engine="e", prompt_ids=[1, 2], parameters={"p": problem}, seed=k, k=k, m=1
        ),
        problem_id=problem,
        question="1 + 1?",
        reference="2",
        prompt_ids=(1, 2),
        trace_ids=(3, 4),
        trace_text="1 + 1 = 2 – so",
        trace_logps=(-0.1, -1 / 3),
        finish="stop",
        seed=k,
        temperature=1.0,
        top_p=1.0,
        proposal="reasoner/prior",
        saw_answer=False,
        weights="w",
        engine="e",
        k=k,
        m=1,
        answer_ids=(5,),
        answer_text="2",
        answer_logps=(-0.5,),
        answer_finish="stop",
        answer_seed=7,
        correct=True,
        score=1.0,
        parsed="2",
        failed=False,
        canonical="2",
    )
    return dataclasses.replace(base, **changes)


def test_key_changes_with_every_part_of_the_content_and_nothing_else() -> None:
    content = {"weights": "w", "engine": "e", "prompt_ids": (1, 2), "parameters": {"a": 1, "b": 2}, "seed": 1}
    base = sample_key(**content, k=0, m=0)
    assert len(base) == 32
    assert base == sample_key(**{**content, "parameters": {"b": 2, "a": 1}, "prompt_ids": [1, 2]}, k=0, m=0)
    changed = [
        sample_key(**{**content, **change}, k=0, m=0)
        for change in (
            {"weights": "v"},
            {"engine": "f"},
            {"prompt_ids": (12,)},
            {"parameters": {"a": 1, "b": 3}},
            {"seed": 2},
        )
    ]
    changed += [sample_key(**content, k=1, m=0), sample_key(**content, k=0, m=1)]
    assert len({base, *changed}) == 8


def test_round_trip_is_exact_and_keys_are_kept_once(tmp_path: Path) -> None:
    records = [record(k=k) for k in range(3)]
    with SampleStore(tmp_path / "s") as store:
        assert store.append(records) == 3
        assert store.append([records[1], record(k=3), record(k=3)]) == 1
        assert len(store) == 4 and store.has(records[0].key) and not store.has("0" * 32)
    again = SampleStore.open(tmp_path / "s")
    assert list(again.records()) == [record(k=k) for k in range(4)]
    assert again.append(records) == 0
    assert len(list((tmp_path / "s").iterdir())) == 1  # nothing new: no segment was made


def test_text_that_is_not_unicode_is_kept(tmp_path: Path) -> None:
    """JSON data may hold half a surrogate pair; it must not stop a run when its samples are written."""
    odd = record(question="\ud83d?", answer_text="\udc00")
    with SampleStore(tmp_path) as store:
        assert store.append([odd]) == 1
    assert list(SampleStore(tmp_path).records()) == [odd]


def test_an_unused_store_makes_no_folder_and_open_wants_samples(tmp_path: Path) -> None:
    SampleStore(tmp_path / "s").append([])
    assert not (tmp_path / "s").exists()
    with pytest.raises(UserError, match="no samples in"):
        SampleStore.open(tmp_path / "s")


def _write(folder: str, start: int) -> None:
    with SampleStore(folder) as store:
        for k in range(start, start + 40):
            store.append([record(k=k)])


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), start)) for start in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(r.k for r in SampleStore(tmp_path).records()) == list(range(60))
    assert len(list(tmp_path.glob("segment-*.jsonl"))) == 2


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_a_torn_last_line_is_skipped_reported_and_repaired_by_the_next_writer(
    tmp_path: Path, cut: int
) -> None:
    with SampleStore(tmp_path) as store:
        store.append([record(k=0), record(k=1)])
    segment = next(tmp_path.iterdir())
    segment.write_bytes(segment.read_bytes()[:-cut])
    store = SampleStore(tmp_path)
    assert [r.k for r in store.records()] == [0]
    assert list(store.torn) == [segment.name]
    assert store.append([record(k=1)]) == 1  # the torn sample is drawn and kept again
    assert store.torn == {} and segment.read_bytes().endswith(b"\n")
    assert [r.k for r in SampleStore(tmp_path).records()] == [0, 1]


def test_a_segment_being_written_is_not_repaired(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as writer:
        writer.append([record(k=0)])
        segment = next(tmp_path.iterdir())
        with segment.open("ab") as stream:
            stream.write(b'{"key": "half')
        before = segment.read_bytes()
        with SampleStore(tmp_path) as other:
            other.append([record(k=1)])
        assert segment.read_bytes() == before


def test_damage_inside_a_segment_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as store:
        store.append([record(k=0), record(k=1)])
    segment = next(tmp_path.iterdir())
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0][:50] + b"\n" + lines[1])
    with pytest.raises(UserError, match="line 1: damaged sample"):
        list(SampleStore(tmp_path).records())


def test_full_disk_keeps_nothing_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SampleStore(tmp_path) as store:
        store.append([record(k=0)])
        before = next(tmp_path.iterdir()).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                store.append([record(k=1)])
        assert next(tmp_path.iterdir()).read_bytes() == before
        assert store.append([record(k=1)]) == 1
    assert [r.k for r in SampleStore(tmp_path).records()] == [0, 1]


def test_fields_of_a_newer_version_survive(tmp_path: Path) -> None:
    data = {**record().to_json(), "entropy": [1.5], "new": "x"}
    read = SampleRecord.from_json(json.loads(json.dumps(data)))
    assert read.extra == {"entropy": [1.5], "new": "x"}
    assert read.to_json() == json.loads(json.dumps(read.to_json())) | {
        name: getattr(read, name)
        for name in ("prompt_ids", "trace_ids", "trace_logps", "answer_ids", "answer_logps")
    }
    with pytest.raises(KeyError, match="seed"):
        SampleRecord.from_json({name: value for name, value in data.items() if name != "seed"})


def test_a_log_probability_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        record(trace_logps=(-0.1, float("-inf")))
    with pytest.raises(ValueError, match="2 trace ids but 1"):
        record(trace_logps=(-0.1,))


def test_records_of_a_group_one_for_each_answer_and_one_for_a_cut_trace() -> None:
    def completion(ids: tuple[int, ...], finish: str, seed: int) -> Completion:
        return Completion(ids, tuple(-0.1 for _ in ids), f"text{ids}", finish, seed)  # type: ignore[arg-type]

    answers = (completion((8,), "stop", 21), completion((9,), "stop", 22))
    traces = (
        Trace("p", 0, "reasoner/prior", (1,), completion((2, 3), "stop", 11), 5, False, answers),
        Trace("p", 1, "posterior/hinted", (1, 4), completion((2,), "length", 12), 5, True),
    )
    group = TraceGroup(Problem("p", "q?", "a"), traces)

    def judge(problem: Problem, answer: Completion) -> tuple[SimpleNamespace, str]:
        text, right = answer.text, answer.text == "text(8,)"
        return SimpleNamespace(correct=right, score=float(right), parsed=text, failed=False), text.upper()

    records = records_of(group, Provenance("w", "e", 1.0), judge)
    assert [(r.k, r.m, r.correct, r.canonical) for r in records] == [
        (0, 1, True, "TEXT(8,)"),
        (0, 2, False, "TEXT(9,)"),
        (1, 0, None, None),
    ]
    assert [r.answer_seed for r in records] == [21, 22, None]
    assert records[2].saw_answer and not records[2].complete and not records[2].answered
    assert len({r.key for r in records}) == 3 and records[0].policy_version == 5
    assert records_of(group, Provenance("v", "e", 1.0))[0].key != records[0].key


def test_by_problem_sorts_within_a_problem(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as store:
        store.append([record("b", 1), record("a", 0), record("b", 0)])
    groups = SampleStore(tmp_path).by_problem()
    assert {name: [r.k for r in group] for name, group in groups.items()} == {"b": [0, 1], "a": [0]}
    assert list(groups) == ["b", "a"]
