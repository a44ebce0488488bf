"""Problem sources: determinism, the quarantine, every data format, every refusal."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from vlm_reason.errors import UserError
from vlm_reason.tasks.gym import QUARANTINED
from vlm_reason.tasks.sources import TaskSpec, held_out, load_problems
from vlm_reason.types import Problem

TWO_OR_THREE = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def load(path: str, **spec: Any) -> list[Problem]:
    return load_problems(TaskSpec("jsonl", path, **spec))


# ---- reasoning-gym ----


def test_generator_is_a_function_of_name_seed_and_index() -> None:
    few = load_problems(TaskSpec("reasoning_gym", "chain_sum", size=5, seed=7, options=TWO_OR_THREE))
    many = load_problems(TaskSpec("reasoning_gym", "chain_sum", size=40, seed=7, options=TWO_OR_THREE))
    assert many[:5] == few
    assert [p.id for p in few] == [f"chain_sum/7/{i}" for i in range(5)]
    assert few[1].question == "State the final answer to the following arithmetic problem: 58 + 26 ="
    assert few[1].answer == "84"
    assert few[1].metadata["entry"]["metadata"]["expression"] == "58 + 26"
    assert load_problems(TaskSpec("reasoning_gym", "chain_sum", size=5, seed=8, options=TWO_OR_THREE)) != few
    assert (
        load_problems(TaskSpec("reasoning_gym", "chain_sum", size=9, limit=2, seed=7, options=TWO_OR_THREE))
        == few[:2]
    )


@pytest.mark.parametrize("name", sorted(QUARANTINED))
def test_quarantined_generators_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match="quarantined: .*; choose another"):
        load_problems(TaskSpec("reasoning_gym", name, size=1))


def test_quarantine_can_be_lifted_but_a_missing_reference_stays_an_error() -> None:
    spec = TaskSpec("reasoning_gym", "game_of_life_halting", size=2, options={"allow_quarantined": True})
    assert [p.id for p in load_problems(spec)] == ["game_of_life_halting/0/0", "game_of_life_halting/0/1"]
    with pytest.raises(UserError, match="no reference answer at seed 0, index 0"):
        load_problems(TaskSpec("reasoning_gym", "graph_color", size=2, options={"allow_quarantined": True}))


@pytest.mark.slow
def test_reproducibility_is_why_generators_are_quarantined() -> None:
    """Same seed, two processes with different hash salts: the trusted ones agree, the quarantined ones do not."""
    script = (
        "import hashlib, sys, reasoning_gym as rg\n"
        "for n in sys.argv[1:]:\n"
        "    d = rg.create_dataset(n, size=12, seed=3)\n"
        "    made = repr([(d[i]['question'], d[i]['answer']) for i in range(12)])\n"
        "    print(n, hashlib.md5(made.encode()).hexdigest())\n"
    )
    salted = [n for n, why in QUARANTINED.items() if "another process" in why]
    names = [*salted, "chain_sum", "basic_arithmetic", "gcd", "letter_counting"]
    first, second = (
        subprocess.run(
            [sys.executable, "-c", script, *names],
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-len(names) :]
        for salt in ("1", "2")
    )
    assert [n for n, a, b in zip(names, first, second, strict=True) if a != b] == salted


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "chian_sum", "size": 1},
            "unknown reasoning-gym generator 'chian_sum'; did you mean 'chain_sum'",
        ),
        (
            {"name": "chain_sum", "size": 1, "options": {"max_term": 2}},
            "no option 'max_term'; did you mean 'max_terms'",
        ),
        ({"name": "chain_sum", "size": 1, "options": {"min_terms": 5, "max_terms": 2}}, "refuses options"),
        ({"name": "chain_sum", "size": 1, "options": {"seed": 2}}, "set seed on the task itself"),
        ({"name": "chain_sum", "size": 0}, "size must be >= 1, got 0"),
        ({"name": "chain_sum", "size": 3, "limit": 0}, "limit must be >= 1, got 0"),
        ({"name": "chain_sum"}, "say how many problems"),
    ],
)
def test_bad_generator_specs(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_problems(TaskSpec("reasoning_gym", **spec))


def test_held_out_shares_no_question() -> None:
    """Neighbouring seeds are one stream shifted by one, so seed 2 is no test set for seed 1."""
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

    def make(seed: int) -> list[Problem]:
        return load_problems(TaskSpec("reasoning_gym", "chain_sum", size=60, seed=seed, options=small))

    training = make(1)
    assert [p.question for p in make(2)][:-1] == [p.question for p in training][1:]
    assert len(held_out(make(2), training)) <= 1
    fresh = make(100_001)
    kept = held_out(fresh, training)
    assert 0 < len(kept) < len(fresh)
    assert not {p.question for p in kept} & {p.question for p in training}
    assert len({p.question for p in kept}) == len(kept)


def test_held_out_tells_problems_apart_by_their_choices() -> None:
    a, b = (
        Problem(i, "Which?", "A", metadata={"choices": c}) for i, c in (("a", ("x", "y")), ("b", ("x", "z")))
    )
    assert held_out([a, b, a], [a]) == [b]


# ---- JSONL formats ----


def test_generation_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "Q1", "answer": 18, "rationale": "R", "level": 3},
        {"question": "Q2", "answer": "x\u2028y"},
    ]
    first, second = load(write(tmp_path / "t.jsonl", rows))
    assert (first.id, first.answer, dict(first.metadata)) == ("a", "18", {"rationale": "R", "level": 3})
    assert (second.id, second.answer) == ("t/1", "x\u2028y")


def test_multiple_choice_rows_keep_repeated_choices_and_any_count(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "Q", "choices": ["x", "y", "x"], "label": 2, "answer": "C"},
        {"id": "b", "question": "Q", "choices": ["false", "true"], "label": 1, "answer": "true"},
        {"id": "c", "question": "Q", "choices": ["p", "q", "r", "s", "t"], "label": 4, "answer": "answer5"},
        {"id": "d", "question": "Q", "choices": ["p", "q"], "answer": "q"},
        {"id": "e", "question": "Q", "choices": ["A", "B", "C"], "answer": "(b)"},
        {"id": "f", "question": "Q", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answer": "2"},
    ]
    problems = load(write(tmp_path / "t.jsonl", rows))
    assert [p.answer for p in problems] == ["C", "B", "E", "B", "B", "B"]
    assert problems[0].metadata["choices"] == ("x", "y", "x")
    assert [p.metadata["answer_text"] for p in problems] == ["x", "true", "t", "q", "B", "q"]


def test_classification_rows_carry_all_label_names_in_label_order(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "T1", "label": 1, "label_name": "pos"},
        {"id": "b", "text": "T2", "label": 0, "label_name": "neg"},
        {"id": "c", "text": "T3", "label": 2, "label_name": "mixed"},
    ]
    problems = load(write(tmp_path / "t.jsonl", rows), limit=1)
    assert [(p.question, p.answer, p.metadata["labels"]) for p in problems] == [
        ("T1", "pos", ("neg", "pos", "mixed"))
    ]


def test_repeated_ids_survive_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": i, "question": f"Q{n}", "answer": "1"} for n, i in enumerate(["a", "a", "a#2", "a", "b"])]
    with caplog.at_level(logging.WARNING):
        problems = load(write(tmp_path / "t.jsonl", rows))
    assert [p.id for p in problems] == ["a", "a#3", "a#2", "a#4", "b"]
    assert [p.question for p in problems] == [f"Q{n}" for n in range(5)]
    assert "1 ids occur more than once (first: 'a')" in caplog.text


def test_fields_and_answer_marker(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", [{"problem": "Q", "solution": "3 + 4 = 7\n#### 7", "answer": "ignored"}]
    )
    (problem,) = load(
        path, fields={"question": "problem", "answer": "solution"}, options={"answer_marker": "####"}
    )
    assert (problem.question, problem.answer, problem.metadata["rationale"]) == ("Q", "7", "3 + 4 = 7")


def test_shuffle_is_seeded_and_precedes_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"id": str(i), "question": "Q", "answer": "1"} for i in range(50)])
    a = [p.id for p in load(path, options={"shuffle": True}, seed=3)]
    assert sorted(a, key=int) == [str(i) for i in range(50)]
    assert a != sorted(a, key=int)
    assert [p.id for p in load(path, options={"shuffle": True}, seed=3, limit=5)] == a[:5]
    assert [p.id for p in load(path, options={"shuffle": True}, seed=4)] != a


def test_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [{"question": "Q", "answer": "1"}])
    assert load(str(tmp_path), split="test")[0].id == "test/0"
    with pytest.raises(UserError, match=r"has no train\.jsonl; splits there: test"):
        load(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q"}', r"t\.jsonl:2: no answer"),
        ('{"question": "Q", "answer": "  "}', r"t\.jsonl:2: no answer"),
        ('{"question": "Q", "answer": null}', r"t\.jsonl:2: no answer"),
        ('{"question": "Q", "answer": ["1"]}', r"t\.jsonl:2: answer must be a text"),
        ('{"answer": "1"}', r"t\.jsonl:2: no question"),
        ('{"text": "a film"}', r"t\.jsonl:2: no answer \(the row has no label\)"),
        ('{"question": "Q", "answer": }', r"t\.jsonl:2: not JSON \(Expecting value at column 29\)"),
        ('["Q", "1"]', r"t\.jsonl:2: a row must be a JSON object, got list"),
        ('{"text": "T", "label": null}', r"t\.jsonl:2: no answer \(the row has no label\)"),
        ('{"question": "Q", "choices": ["a", "b"]}', r"t\.jsonl:2: no answer \(give label"),
        (
            '{"question": "Q", "choices": ["a", "b"], "label": 2}',
            r"t\.jsonl:2: label must be .* 0 to 1, got 2",
        ),
        ('{"question": "Q", "choices": ["a", "b"], "label": 0, "answer": "b"}', r"contradicts label 0"),
        ('{"question": "Q", "choices": ["a", "a"], "answer": "a"}', r"names no single choice"),
        ('{"question": "Q", "choices": "ab", "label": 0}', r"choices must be a list"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "Q", "answer": "1"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        load(str(path))


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty", "is empty"), ("absent", "does not exist"), ("binary", "is not UTF-8")):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / f"{name}.jsonl"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fields": {"qestion": "q"}}, "unknown name 'qestion'; did you mean 'question'"),
        ({"fields": {"answer": "anwser"}}, r"no column 'anwser'; did you mean 'answer'"),
        ({"options": {"shufle": True}}, "unknown option 'shufle'; did you mean 'shuffle'"),
        ({"options": {"answer_marker": "####"}}, r"t\.jsonl:1: no answer behind the marker '####'"),
        ({"size": 3}, "use limit for a jsonl task"),
    ],
)
def test_bad_file_specs(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "t.jsonl", [{"question": "Q", "answer": "1"}])
    with pytest.raises(UserError, match=message):
        load(path, **spec)


def test_hub_out_of_reach_names_the_local_alternatives() -> None:
    with pytest.raises(UserError, match="cannot load data set 'no-such/set'.*kind jsonl.*kind reasoning_gym"):
        load_problems(TaskSpec("hub", "no-such/set"))


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="did you mean 'jsonl'"):
        TaskSpec("json", "x")  # type: ignore[arg-type]


# ---- the real files ----


def test_every_shared_file_loads_whole(shared_data: Path) -> None:
    """Counts as the sets state them; repeated and 3-to-5 choices included; every answer is one of its choices."""
    manifest_counts = {
        "gsm8k/test": 1319, "svamp/test": 1000, "commonsenseqa/validation": 1221, "arc_challenge/test": 1172,
        "arc_easy/test": 2376, "openbookqa/test": 500, "boolq_closed/test": 3270, "sst2/dev": 872, "trec/test": 500,
        "recorded_math_rm8/test": 100, "bbh/word_sorting": 250,
    }  # fmt: skip
    loaded = {name: load(str(shared_data / f"{name}.jsonl")) for name in manifest_counts}
    assert {name: len(problems) for name, problems in loaded.items()} == manifest_counts
    for problems in loaded.values():
        assert len({p.id for p in problems}) == len(problems)
        for p in problems:
            if "choices" in p.metadata:
                assert p.answer == "ABCDE"[p.metadata["label"]]
    assert {len(p.metadata["choices"]) for p in loaded["arc_easy/test"]} == {3, 4, 5}
    repeated = [
        p
        for p in loaded["commonsenseqa/validation"]
        if len(set(p.metadata["choices"])) < len(p.metadata["choices"])
    ]
    assert len(repeated) == 24
    assert loaded["trec/test"][0].metadata["labels"] == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
