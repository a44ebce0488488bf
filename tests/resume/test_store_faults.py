"""Faults known from caches of samples, each tried on a tiny model: another model or prompt is never answered from the
store, repeats stay apart, and killed, restarted or doubled runs leave the same samples."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_reason.engines.hf import HFEngine
from vlm_reason.evaluation import EvalConfig, make_judge, sample_into, sampling, stored
from vlm_reason.evaluation.provenance import provenance_of
from vlm_reason.models.load import fingerprint_weights
from vlm_reason.store import SampleRecord, SampleStore
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.templates import Template
from vlm_reason.tasks.verifiers import make_verifier
from vlm_reason.types import Problem

PROBLEMS = [Problem(f"p{i}", f"{i}+{i + 1}", str(2 * i + 1)) for i in range(6)]
CONFIG = EvalConfig(traces=4, temperature=1.0, max_trace_tokens=6, max_answer_tokens=3, adapter=None, seed=3)
Fill = Callable[..., list[SampleRecord]]


def template(prior: str = "{question}=") -> Template:
    return Template(
        "sums", prior=prior, posterior="{question}={hint}=", cue="a:", trace_end="\n", answer_end="\n"
    )


@pytest.fixture
def fill(tiny_llama: Any, tiny_tokenizer: Any) -> Fill:
    """Draw what is missing into the store in a folder; the records of this model and prompt. `model` and `prior`
    replace the tiny model and its prompt, `before_append` runs in front of each chunk that is written."""

    def filled(
        folder: Path, config: EvalConfig = CONFIG, *, model: Any = None, prior: str = "{question}=",
        expect_new: int | None = None, before_append: Callable[[], None] | None = None,
    ) -> list[SampleRecord]:  # fmt: skip
        builder = PromptBuilder(tiny_tokenizer, template(prior))
        used = tiny_llama if model is None else model
        engine = HFEngine(used, tiny_tokenizer)
        source = provenance_of(engine, builder.fingerprint(), config, fingerprint_weights(used))
        judge = make_judge(make_verifier("number"), builder)
        with SampleStore(folder) as store:
            if before_append is not None:
                real = store.append

                def append(records: list[SampleRecord]) -> int:
                    before_append()
                    return real(records)

                store.append = append  # type: ignore[method-assign, assignment]
            new = sample_into(store, engine, builder, PROBLEMS, judge, config, source)
            assert expect_new is None or new == expect_new
            return stored(store, builder, PROBLEMS, config, source)

    return filled


def texts(records: list[SampleRecord]) -> list[tuple[Any, ...]]:
    return [(r.problem_id, r.k, r.m, r.trace_ids, r.answer_ids, r.trace_logps) for r in records]


def test_another_model_is_drawn_anew(fill: Fill, tiny_llama: Any, tmp_path: Path) -> None:
    first = fill(tmp_path, expect_new=24)
    with torch.no_grad():
        tiny_llama.lm_head.weight[5] += 1.0
    second = fill(tmp_path, expect_new=24)
    assert texts(first) != texts(second) and first[0].weights != second[0].weights
    assert len(SampleStore(tmp_path)) == 48


def test_another_prompt_or_cap_is_drawn_anew(fill: Fill, tmp_path: Path) -> None:
    first = fill(tmp_path, expect_new=24)
    other = fill(tmp_path, prior="{question}?", expect_new=24)
    assert first[0].prompt_ids != other[0].prompt_ids
    shorter = EvalConfig(**{**vars(CONFIG), "max_trace_tokens": 5})
    cooler = EvalConfig(**{**vars(CONFIG), "temperature": 0.5})
    fill(tmp_path, shorter, expect_new=24)
    fill(tmp_path, cooler, expect_new=24)
    assert texts(fill(tmp_path, expect_new=0)) == texts(first)


def test_repeats_are_samples_of_their_own(fill: Fill, tmp_path: Path) -> None:
    """Four draws of a problem differ and stay four, on the second call too; eight keep the four that were there."""
    first = fill(tmp_path)
    draws = {r.trace_ids for r in first if r.problem_id == "p0"}
    assert len(draws) > 1 and sorted(r.k for r in first if r.problem_id == "p0") == [0, 1, 2, 3]
    assert len({r.seed for r in first}) == 24
    assert texts(fill(tmp_path, expect_new=0)) == texts(first)
    more = fill(tmp_path, EvalConfig(**{**vars(CONFIG), "traces": 8}), expect_new=24)
    assert set(texts(first)) <= set(texts(more)) and len(more) == 48


def test_a_killed_run_taken_up_again_leaves_the_same_store(
    fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in front of the second, third, ... write, until a run gets through."""
    monkeypatch.setattr(sampling, "SAMPLES_PER_CHUNK", 8)
    whole = fill(tmp_path / "whole")
    context, kills = multiprocessing.get_context("fork"), 0
    while True:
        writes = 0

        def die_at_the_second() -> None:
            nonlocal writes
            writes += 1
            if writes == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        process = context.Process(
            target=fill, args=(tmp_path / "killed",), kwargs={"before_append": die_at_the_second}
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == 2
    assert list(SampleStore(tmp_path / "killed").records()) == whole
    assert _same_columns(tmp_path / "killed", tmp_path / "whole")


def test_two_runs_at_once_leave_the_same_store(fill: Fill, tmp_path: Path) -> None:
    whole = fill(tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=fill, args=(tmp_path / "two",)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    assert list(SampleStore(tmp_path / "two").records()) == whole
    assert _same_columns(tmp_path / "two", tmp_path / "whole")


def _same_columns(a: Path, b: Path) -> bool:
    one, other = SampleStore.open(a).columns(), SampleStore.open(b).columns()
    names = ("problem", "k", "m", "seed", "canonical", "correct", "trace_logp", "answer_logp", "trace_tokens")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)
