"""A store that is filled again: what is there stays, in whatever company a batch is drawn; a budget counts a prefix of
the problems; and verdicts of another verifier are not passed on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.suite_parts import save_model, suite_data
from tests.unit.test_evaluation import JUDGE, PROBLEMS, TRACES, Builder, World
from vlm_reason.config import from_dict
from vlm_reason.engines.base import SampleRequest
from vlm_reason.errors import UserError
from vlm_reason.evaluation import EvalConfig, sample_into, summarise
from vlm_reason.evaluation.running import VERIFIER
from vlm_reason.evaluation.suite import SuiteConfig
from vlm_reason.evaluation.suite_run import run_suite
from vlm_reason.store import Provenance, SampleRecord, SampleStore
from vlm_reason.types import Completion

SOURCE = Provenance("w", "e", 1.0)


class Turned(World):
    """The same world in other company: what was cut closes now, and what closed is the other trace or is cut."""

    def _one(self, request: SampleRequest, u: float) -> Completion:
        found = super()._one(request, u)
        if request.stop != Builder.trace_stop:
            return found
        name = {"good": "bad", "bad": "cut", "cut": "good"}[found.text]
        ids = TRACES[name]
        return Completion(ids, (-2.0,) * len(ids), name, "length" if name == "cut" else "stop", request.seed)


def fill(folder: Path, world: World, config: EvalConfig, problems: int = 20) -> int:
    with SampleStore(folder) as store:
        return sample_into(store, world, Builder(), PROBLEMS[:problems], JUDGE, config, SOURCE)


def records(folder: Path) -> dict[tuple[str, int, int], SampleRecord]:
    return {(r.problem_id, r.k, r.m): r for r in SampleStore.open(folder).records()}


def traces(records: Sequence[SampleRecord]) -> dict[tuple[str, int], set[tuple[int, ...]]]:
    found: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for r in records:
        found.setdefault((r.problem_id, r.k), set()).add(r.trace_ids)
    return found


@pytest.mark.parametrize("answers", [1, 2])
def test_a_trace_that_comes_out_otherwise_does_not_join_the_stored_one(tmp_path: Path, answers: int) -> None:
    config = EvalConfig(traces=4, answers=answers, temperature=1.0)
    fill(tmp_path, World(), config)
    before = records(tmp_path)
    assert {name for name, *_ in before} and any(m == 0 for *_, m in before)
    more = dataclasses.replace(config, traces=6)
    new = fill(tmp_path, Turned(), more)
    after = records(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + new
    assert {k for _, k, _ in after.keys() - before.keys()} == {4, 5}
    assert all(len(ids) == 1 for ids in traces(list(after.values())).values())
    assert summarise(list(after.values())).accuracy.n == 20 * 6
    assert fill(tmp_path, World(), more) == 0  # whole: nothing is drawn


def test_further_answers_are_of_the_trace_that_is_stored(tmp_path: Path) -> None:
    two, four = (EvalConfig(traces=3, answers=m, temperature=1.0) for m in (2, 4))
    fill(tmp_path, World(), two)
    before = records(tmp_path)
    assert fill(tmp_path, Turned(), four) == 0  # every trace came out another one
    assert records(tmp_path) == before
    closed = {(name, k) for name, k, m in before if m == 1}
    assert fill(tmp_path, World(), four) == 2 * len(closed) > 0
    assert {m for *_, m in records(tmp_path)} == {0, 1, 2, 3, 4}


# ---- suites


@pytest.fixture
def data(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    model = save_model(tiny_llama, tiny_tokenizer, tmp_path / "model")
    return suite_data(tmp_path / "suite", model)


def suite(data: dict[str, Any], **keys: Any) -> SuiteConfig:
    return from_dict(SuiteConfig, {**data, **keys})


def test_a_budget_counts_the_problems_up_to_the_first_it_did_not_reach(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """Ten problems of which every other one is too long; the budget holds for some of the others."""
    rows = []
    for i in range(5):
        rows.append({"id": f"long{i}", "question": "1+" * 300 + "1", "answer": "301"})
        rows.append({"id": f"p{i}", "question": f"{i}+{i}", "answer": str(2 * i)})
    (tmp_path / "suite" / "low.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"low": data["tasks"]["low"]}
    whole = run_suite(suite(data, tasks=tasks, long_prompts="wrong", output_dir=str(tmp_path / "whole")))
    assert whole["tasks"]["low"]["problems"] == 10 and len(whole["tasks"]["low"]["too_long"]) == 5
    assert whole["tasks"]["low"]["left_out"] == 0
    budget = {"tokens": 2 * 4 * (12 + 4)}
    result = run_suite(suite(data, tasks=tasks, long_prompts="wrong", budget=budget))
    report, drawn = result["tasks"]["low"], result["tasks"]["low"]["samples"] // 4
    assert 2 <= drawn < 5 and report["left_out_why"] == "budget.tokens"
    assert report["too_long"] == [f"long{i}" for i in range(drawn + 1)]
    assert report["problems"] == 2 * drawn + 1 and report["left_out"] == 10 - report["problems"]
    [row] = [r for r in result["rows"] if r["metric"] == "accuracy"]
    right = sum(whole["items"]["low"][f"p{i}"]["correct"] for i in range(drawn))
    assert row["value"] == pytest.approx(right / (2 * drawn + 1))
    assert f"too_long={drawn + 1}" in row["flags"] and set(result["items"]["low"]) == {
        row["id"] for row in rows[: 2 * drawn + 1]
    }


def test_a_suite_that_lost_a_record_keeps_the_others(data: dict[str, Any], tmp_path: Path) -> None:
    """Its chunk is drawn whole and that record alone is new; a trace that was stored as cut stays so."""
    first = run_suite(suite(data))
    [segment] = (tmp_path / "suite" / "out" / "low" / "samples").glob("segment-*.jsonl")
    lines = [json.loads(line) for line in segment.read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if line["m"] == 1)
    cut = next(
        i for i, line in enumerate(lines) if line["m"] == 1 and i != at
    )  # stored as if it had been cut
    nothing = {
        "answer_ids": [],
        "answer_logps": [],
        "answer_text": "",
        "answer_finish": None,
        "canonical": None,
    }
    verdict = dict.fromkeys(("correct", "score", "parsed", "failed", "answer_seed"))
    lines[cut] |= {"m": 0, "finish": "length", **nothing, **verdict, "key": _key_of_cut(data, lines[cut])}
    del lines[at]
    segment.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for other in segment.parent.iterdir():
        if other != segment:
            other.unlink()
    again = run_suite(suite(data))
    assert again["tasks"]["low"]["new"] == 1 and again["tasks"]["low"]["samples"] == 24
    assert again["tasks"]["low"]["tokens"] < first["tasks"]["low"]["tokens"]
    assert (
        again["cost"]["tokens_drawn_now"] == first["tasks"]["low"]["tokens"]
    )  # all that was drawn, kept or not
    third = run_suite(suite(data))
    assert third["items"] == again["items"] and third["cost"]["tokens_drawn_now"] == 0


def _key_of_cut(data: dict[str, Any], line: dict[str, Any]) -> str:
    """The key that this trace would have, had it been cut."""
    from importlib.metadata import version

    from transformers import AutoTokenizer

    from vlm_reason.tasks.prompts import PromptBuilder
    from vlm_reason.tasks.resolve import resolve_template

    builder = PromptBuilder(
        AutoTokenizer.from_pretrained(data["model"]), resolve_template(data["tasks"]["low"]["template"]), 0
    )
    assert version("torch") in line["engine"]
    parameters = {"prompts": builder.fingerprint(), "max_trace_tokens": 12, "max_answer_tokens": 4}
    source = Provenance(line["weights"], line["engine"], 1.0, 1.0, None, parameters)
    prompt = line["prompt_ids"]
    assert source.key(prompt, line["seed"], line["k"], 1) == line["key"]
    return source.key(prompt, line["seed"], line["k"], 0)


def test_a_verifier_is_remembered_whatever_ran_in_between(data: dict[str, Any], tmp_path: Path) -> None:
    one = {name: {name: data["tasks"][name]} for name in ("low", "high")}
    run_suite(suite(data, tasks=one["low"]))
    assert (tmp_path / "suite" / "out" / "low" / VERIFIER).read_text() == "number\n"
    run_suite(suite(data, tasks=one["high"]))
    changed = {"low": {**data["tasks"]["low"], "verifier": "exact"}}
    with pytest.raises(
        UserError, match="task 'low' .* judged by verifier 'number', and the suite says 'exact'"
    ):
        run_suite(suite(data, tasks=changed))
    (tmp_path / "suite" / "out" / "high" / VERIFIER).unlink()  # a store from before: config.yaml says it
    changed = {"high": {**data["tasks"]["high"], "verifier": "exact"}}
    with pytest.raises(UserError, match="task 'high' .* judged by verifier 'number'"):
        run_suite(suite(data, tasks=changed))


def test_a_store_without_samples_has_no_verifier(data: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"low": data["tasks"]["low"]}
    run_suite(suite(data, tasks=tasks, budget={"tokens": 5}))
    assert not (tmp_path / "suite" / "out" / "low" / VERIFIER).exists()
    tasks = {"low": {**data["tasks"]["low"], "verifier": "exact"}}
    run_suite(suite(data, tasks=tasks))
    assert (tmp_path / "suite" / "out" / "low" / VERIFIER).read_text() == "exact\n"
