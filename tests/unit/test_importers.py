"""Recorded samples and lm-eval's logs become records: the numbers in the file are the numbers in the store."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm_reason.cli import import_
from vlm_reason.cli.main import main
from vlm_reason.errors import UserError
from vlm_reason.store import SampleRecord, SampleStore
from vlm_reason.store.importers import FORMATS, Imported, Reading, import_samples, importing
from vlm_reason.tasks.answers import canonical, extract_answer

READING = Reading(lambda text: extract_answer(text, "math"), lambda answer: canonical(answer, "math"))


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def take(file: Path, folder: Path, **options: Any) -> Imported:
    with SampleStore(folder) as store:
        return import_samples(file, store, READING, **options)


def records(folder: Path) -> list[SampleRecord]:
    return list(SampleStore.open(folder).records())


ROW = {
    "id": "p7",
    "question": "1 + 1?",
    "answer": "2",
    "level": "easy",
    "samples": [
        {"text": "so 2", "pred": "2.0", "correct": True, "reward": 1.5},
        {"text": "hm", "pred": "", "correct": True, "finish": "length", "note": "cut"},
        {"text": "I think \\boxed{3}"},
    ],
}


def test_a_recorded_row(tmp_path: Path) -> None:
    done = take(jsonl(tmp_path / "r.jsonl", [ROW]), tmp_path / "s", system="mine", member=2)
    assert (done.format, done.system, done.problems, done.samples, done.new, done.unparsed) == (
        "recorded", "mine", 1, 3, 3, 1,
    )  # fmt: skip
    first, cut, read = records(tmp_path / "s")
    assert (first.problem_id, first.question, first.reference, first.k, first.m) == (
        "p7",
        "1 + 1?",
        "2",
        0,
        1,
    )
    assert (first.trace_text, first.answer_text, first.canonical) == ("so 2", "2.0", "2")
    assert (first.correct, first.score, first.reward, first.weights, first.member) == (
        True,
        1.0,
        1.5,
        "mine",
        2,
    )
    assert first.text_only and first.trace_ids == () and first.extra == {"level": "easy"}
    # nothing was read: wrong, although the file says right
    assert (cut.correct, cut.canonical, cut.finish, cut.extra["note"]) == (False, None, "length", "cut")
    assert (read.canonical, read.correct, read.reward) == ("3", False, None)  # read and judged here


def test_the_same_file_again_adds_nothing_and_a_changed_one_is_another_system(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "r.jsonl", [ROW])
    assert (take(file, tmp_path / "s").new, take(file, tmp_path / "s").new) == (3, 0)
    jsonl(file, [{**ROW, "answer": "3"}])
    assert take(file, tmp_path / "s").new == 3
    assert len({r.weights for r in records(tmp_path / "s")}) == 2


def test_another_sample_in_the_same_place_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    take(jsonl(tmp_path / "a.jsonl", [ROW]), tmp_path / "s", system="mine")
    other = jsonl(
        tmp_path / "b.jsonl", [{**ROW, "id": "new"}, {**ROW, "samples": [{"text": "8", "pred": "8"}]}]
    )
    with pytest.raises(UserError, match=r"another sample 0 of problem 'p7' under 'mine' already"):
        take(other, tmp_path / "s", system="mine")
    assert len(records(tmp_path / "s")) == 3
    assert take(other, tmp_path / "s", system="mine", member=1).new == 4  # another member is another place
    twice = jsonl(tmp_path / "c.jsonl", [ROW, ROW, {**ROW, "answer": "5"}])
    with pytest.raises(UserError, match="another sample 0"):
        take(twice, tmp_path / "t", system="mine")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "answer": "2", "samples": [{"pred": "2"}]}', "line 2: no field 'text'"),
        ('{"id": 1, "answer": "2", "samples": {"text": "2"}}', "line 2: `samples` is dict"),
        ('{"answer": "2", "samples": []}', "line 2: neither `id` nor `question`"),
        ('{"id": 1, "answer": "2", "samples": [{"text": "2", "correct": "yes"}]}', "`correct` is 'yes'"),
        ('{"id": 1, "answer": "2", "samples": [{"text": "2", "reward": NaN}]}', "`reward` is nan"),
        ('{"id": 1, "answer": "2", "samples": [{"text": "2", "finish": "eof"}]}', "`finish` is 'eof'"),
        ('{"id": 1, "answer": "2", "samples": []}', "line 2: `samples` of '1' is empty"),
        ('{"id": 1, "answer": "2", "samples": ["2"]}', "line 2: a sample is str, expected an object"),
        ('{"id": 1, "answer": "2", "samples": [{"text": null}]}', "line 2: `text` is None, expected a text"),
        ('{"id": 1, "answer": "2", "samples": [{"text": "2", "pred": ["2"]}]}', "`pred` is ['2'], expected"),
        ('{"id": {"a": 1}, "answer": "2", "samples": [{"text": "2"}]}', "line 2: `id` is {'a': 1}"),
        ('{"id": 1, "answer": null, "samples": [{"text": "2"}]}', "line 2: `answer` is None"),
        ('{"id": 1, "answer"', "line 2: no JSON"),
        ("[1]", "line 2: list instead of a JSON object"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_imported(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        take(file, tmp_path / "s")
    assert message in str(error.value) and not (tmp_path / "s").exists()


def test_numbers_stand_for_their_text_and_a_whole_pair_of_surrogates_for_its_character(
    tmp_path: Path,
) -> None:
    line = r'{"id": 7, "question": "\ud83d\ude00", "answer": 2, "samples": [{"text": 2}, {"text": "x", "pred": 3}]}'
    file = tmp_path / "r.jsonl"
    file.write_text(line + "\n")
    take(file, tmp_path / "s")
    first, second = records(tmp_path / "s")
    assert (first.problem_id, first.question, first.reference, first.trace_text) == (
        "7",
        "\U0001f600",
        "2",
        "2",
    )
    assert (second.canonical, second.correct) == ("3", False)


def test_what_is_no_file_of_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        take(tmp_path / "none.jsonl", tmp_path / "s")
    with pytest.raises(UserError, match="no samples in it"):
        take(jsonl(tmp_path / "empty.jsonl", []), tmp_path / "s")
    with pytest.raises(UserError, match="neither lm-eval"):
        take(jsonl(tmp_path / "x.jsonl", [{"a": 1}]), tmp_path / "s")
    with pytest.raises(UserError, match="unknown format 'lmeval'; did you mean 'lm-eval'"):
        take(jsonl(tmp_path / "x.jsonl", [ROW]), tmp_path / "s", format="lmeval")


def test_a_killed_import_is_finished_by_repeating_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**ROW, "id": str(i)} for i in range(9)]
    file = jsonl(tmp_path / "r.jsonl", rows)
    monkeypatch.setattr(importing, "BATCH", 4)
    calls = 0
    real = SampleStore.append

    def killed(store: SampleStore, batch: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(store, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleStore, "append", killed)
        take(file, tmp_path / "s")
    assert len(records(tmp_path / "s")) == 12
    assert take(file, tmp_path / "s").new == 15
    take(file, tmp_path / "whole")
    assert records(tmp_path / "s") == records(tmp_path / "whole")


# ---- lm-eval ----


def choice_line(
    doc_id: int, logps: Sequence[Any], target: Any, texts: Sequence[str] = (" a", " b", " c"), **more: Any
) -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": {"question": f"q{doc_id}"},
        "target": target,
        "arguments": {
            f"gen_args_{i}": {"arg_0": f"q{doc_id}\nAnswer:", "arg_1": text}
            for i, (text, _) in enumerate(zip(texts, logps, strict=False))
        },
        "resps": [[[str(value), "False"]] for value in logps],
        "filtered_resps": [[str(value), "False"] for value in logps],
        "filter": "none",
        "metrics": [name for name in more if name.startswith("acc")],
        "doc_hash": "0123456789abcdef",
        **more,
    }


def text_line(
    doc_id: int, texts: Sequence[str], filtered: Any, target: str, *, filter: str = "strict", **metrics: Any
) -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": {},
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": {"do_sample": True, "temperature": 0.7}}},
        "resps": [list(texts)],
        "filtered_resps": [filtered],
        "filter": filter,
        "metrics": list(metrics),
        "doc_hash": "0123456789abcdef",
        **metrics,
    }


NAME = "samples_toy_task_2026-01-02T03-04-05.678901.jsonl"


def test_multiple_choice_keeps_every_log_likelihood_with_variable_k(tmp_path: Path) -> None:
    lines = [
        choice_line(0, [-3.5, -1.25, -2.0], "1", acc=1.0),
        choice_line(1, [-0.5, -0.75], 1, acc=0.0),  # numbers in place of strings, two options
        choice_line(2, [-4.0, -3.0, -2.0], "c", acc=1.0),
        choice_line(3, [-4.0, -3.0, -2.0], "C"),
        choice_line(4, [-1.0, -3.0, -2.0], "[0, 2]", acc=1.0),
    ]
    done = take(jsonl(tmp_path / NAME, lines), tmp_path / "s", system="m")
    assert (done.format, done.problems, done.samples, done.failed) == ("lm-eval", 5, 5, 0)
    got = records(tmp_path / "s")
    assert [r.problem_id for r in got] == [f"toy_task/{i}/01234567" for i in range(5)]
    assert [r.canonical for r in got] == ["B", "A", "C", "C", "A"]
    assert [r.correct for r in got] == [True, False, True, True, True]
    assert [r.answer_text for r in got] == ["b", "a", "c", "c", "a"]
    assert got[0].extra["choice_logps"] == [-3.5, -1.25, -2.0] and got[1].extra["choice_logps"] == [
        -0.5,
        -0.75,
    ]
    assert [r.extra["choice_gold"] for r in got] == [1, 1, 2, 2, None]
    columns = SampleStore.open(tmp_path / "s").columns()
    assert columns.choice_start.tolist() == [0, 3, 5, 8, 11, 14] and columns.choice_gold.tolist() == [
        1,
        1,
        2,
        2,
        -1,
    ]


def test_a_target_that_could_be_an_index_or_an_option(tmp_path: Path) -> None:
    """Options "1" and "2", target "1": the index, unless the verdict says that the option was meant."""
    texts = (" 1", " 2")
    lines = [
        choice_line(0, [-2.0, -1.0], "1", texts, acc=1.0),
        choice_line(1, [-1.0, -2.0], "1", texts, acc=1.0),
    ]
    take(jsonl(tmp_path / NAME, lines), tmp_path / "s")
    assert [r.extra["choice_gold"] for r in records(tmp_path / "s")] == [1, 0]


@pytest.mark.parametrize("value", ["nan", "-inf", math.nan])
def test_an_option_without_a_number_is_never_a_class(tmp_path: Path, value: Any) -> None:
    """lm-eval's argmax of NaN is option 0; here it is no answer: wrong, and counted."""
    file = jsonl(tmp_path / NAME, [choice_line(0, [value, -1.0, -2.0], "0", acc=1.0)])
    done = take(file, tmp_path / "s")
    (record,) = records(tmp_path / "s")
    assert (done.failed, done.unparsed) == (1, 1)
    assert (record.canonical, record.correct, record.failed) == (None, False, True)
    assert "choice_logps" not in record.extra


def test_one_text_has_the_verdict_of_the_file(tmp_path: Path) -> None:
    lines = [
        text_line(0, ["it is 18.0"], "18.0", "#### 18", exact_match=1.0),
        text_line(1, ["it is 3"], "3", "4", exact_match=0.0),
        text_line(2, ["no idea"], "[invalid]", "4", exact_match=0.0),
    ]
    done = take(jsonl(tmp_path / NAME, lines), tmp_path / "s")
    got = records(tmp_path / "s")
    assert [r.canonical for r in got] == ["18", "3", None] and [r.correct for r in got] == [
        True,
        False,
        False,
    ]
    assert got[0].trace_text == "it is 18.0" and got[0].temperature == 0.7 and done.unparsed == 1
    assert got[0].extra["metrics"] == {"exact_match": 1.0} and got[0].extra["prompt"] == "Q"


def test_repeats_stay_samples_of_their_own(tmp_path: Path) -> None:
    """Equal texts too; each is judged by itself, whatever the filter made of all of them."""
    lines = [text_line(0, ["is \\boxed{4}", "is \\boxed{5}", "is \\boxed{4}"], "4", "4", exact_match=1.0)]
    done = take(jsonl(tmp_path / NAME, lines), tmp_path / "s")
    got = records(tmp_path / "s")
    assert done.new == 3 and [r.k for r in got] == [0, 1, 2]
    assert [r.canonical for r in got] == ["4", "5", "4"] and [r.correct for r in got] == [True, False, True]


def test_several_filters_or_metrics_want_a_choice(tmp_path: Path) -> None:
    lines = [
        text_line(0, ["18 x"], "18", "18", filter="strict", exact_match=1.0, f1=0.5),
        text_line(0, ["18 x"], "x", "18", filter="loose", exact_match=0.0, f1=0.25),
    ]
    file = jsonl(tmp_path / NAME, lines)
    with pytest.raises(UserError, match="has the filters loose, strict; choose one with --filter"):
        take(file, tmp_path / "s")
    with pytest.raises(UserError, match="no filter 'strct'; did you mean 'strict'"):
        take(file, tmp_path / "s", filter="strct")
    take(file, tmp_path / "s", filter="strict")
    assert [r.correct for r in records(tmp_path / "s")] == [True]
    take(file, tmp_path / "t", filter="strict", metric="f1")
    assert [(r.correct, r.score) for r in records(tmp_path / "t")] == [(False, 0.5)]
    with pytest.raises(UserError, match="several metrics"):
        take(jsonl(tmp_path / "y.jsonl", [text_line(0, ["1"], "1", "1", bleu=0.5, f1=1.0)]), tmp_path / "u")


def test_a_line_of_an_old_version(tmp_path: Path) -> None:
    """Arguments as lists, no list of metrics, no filter, no hash of the document."""
    line = text_line(4, ["so 18"], "18", "18", exact_match=1.0)
    line = {k: v for k, v in line.items() if k not in ("metrics", "filter", "doc_hash")}
    line["arguments"] = [["Q", {"until": ["."]}]]
    take(jsonl(tmp_path / "model_gsm8k.jsonl", [line]), tmp_path / "s")
    (record,) = records(tmp_path / "s")
    assert (record.problem_id, record.correct, record.temperature) == ("model_gsm8k/4", True, 0.0)


@pytest.mark.parametrize("value", [math.nan, 2.0, -1])
def test_a_metric_that_is_no_verdict(tmp_path: Path, value: float) -> None:
    for line in (
        text_line(0, ["1"], "1", "1", exact_match=value),
        choice_line(0, [-1.0, -2.0], "0", acc=value),
    ):
        with pytest.raises(UserError, match=r"no verdict in \[0, 1\]"):
            take(jsonl(tmp_path / NAME, [line]), tmp_path / "s")


def test_a_rolling_likelihood_is_no_answer(tmp_path: Path) -> None:
    line = {"doc_id": 0, "target": "", "arguments": {"gen_args_0": {"arg_0": "text"}}, "resps": [["-3.5"]]}
    with pytest.raises(UserError, match="the log-likelihood of a whole text is no answer"):
        take(jsonl(tmp_path / NAME, [line]), tmp_path / "s")


def test_the_peer_itself(tmp_path: Path) -> None:
    """lm-eval's own tracker writes the file; accuracy in the store is what lm-eval printed."""
    pytest.importorskip("lm_eval")
    from lm_eval.loggers import EvaluationTracker

    sample = {
        "doc_id": 3, "doc": {"question": "q"}, "target": 1,
        "arguments": [("q", " yes"), ("q", " no")], "resps": [[(-2.0, False)], [(-1.5, False)]],
        "filtered_resps": [(-2.0, False), (-1.5, False)], "filter": "none", "metrics": ["acc"],
        "doc_hash": "ab" * 32, "prompt_hash": "c", "target_hash": "d", "acc": 1.0,
    }  # fmt: skip
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.model_name_sanitized = "toy"
    tracker.date_id = "2026-01-02T03-04-05.678901"
    tracker.save_results_samples("yes_no", [sample])
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    take(file, tmp_path / "s")
    (record,) = records(tmp_path / "s")
    assert (record.problem_id, record.canonical, record.correct) == ("yes_no/3/abababab", "B", True)
    assert record.extra["choice_logps"] == [-2.0, -1.5] and record.extra["choice_gold"] == 1


# ---- the command ----


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, store = jsonl(tmp_path / "r.jsonl", [ROW]), str(tmp_path / "s")
    assert main(["import", str(file), "-o", store, "--system", "m", "--json", "--quiet"]) == 0
    counts = {"problems": 1, "samples": 3, "new": 3, "unparsed": 1, "failed": 0}
    one = {"file": str(file), "format": "recorded", "system": "m", **counts}
    assert json.loads(capfd.readouterr().out) == {"store": store, **counts, "files": [one]}
    more = [str(jsonl(tmp_path / f"{i}.jsonl", [{**ROW, "id": str(i)}])) for i in range(2)]
    assert main(["import", *more, str(file), "-o", store, "--system", "m", "--json", "--quiet"]) == 0
    assert [one["new"] for one in json.loads(capfd.readouterr().out)["files"]] == [3, 3, 0]
    assert main(["import", str(file), "-o", store, "--system", "m", "--quiet"]) == 0
    assert "new" in capfd.readouterr().out
    assert main(["import", str(tmp_path / "none"), "-o", store]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert main(["import", str(file), "-o", store, "--member", "-1"]) == 2
    assert tuple(FORMATS) == import_.FORMATS
