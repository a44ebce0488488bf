"""Verifiers: verdicts, counts, the worker's time limit, and TRL's way of calling them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_reason.errors import UserError
from vlm_reason.tasks.sources import TaskSpec, load_problems
from vlm_reason.tasks.verifiers import (
    VERIFIERS,
    ChoiceVerifier,
    ExactVerifier,
    MathVerifier,
    NumberVerifier,
    ReasoningGymVerifier,
    Tally,
    Verdict,
    Verifier,
    YesNoVerifier,
    as_trl_reward,
    make_verifier,
)
from vlm_reason.types import Problem


def gold(answer: str, **metadata: object) -> Problem:
    return Problem("p", "q", answer, metadata=metadata)


@pytest.fixture(scope="module")
def math_verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(timeout=3.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_names(name: str) -> None:
    verifier = make_verifier(name)
    assert verifier.name == name
    assert isinstance(verifier, Verifier)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="unknown verifier 'nummber'; did you mean 'number'"):
        make_verifier("nummber")


def test_number_verdicts_and_tally() -> None:
    v = NumberVerifier()
    texts = ["84", "$84.00", "Answer: 84", "85", "no idea", "", "84 or 85"]
    verdicts = v.verify_many((gold("84"), t) for t in texts)
    assert [x.correct for x in verdicts] == [True, True, True, False, False, False, False]
    assert [x.parsed for x in verdicts] == ["84", "84", "84", "85", None, None, None]
    assert v.tally == Tally(total=7, correct=3, unparsed=3)
    assert v.verify(gold("no number"), "84") == Verdict(False, 0.0, "84", failed=True)
    assert v.tally == Tally(total=8, correct=3, unparsed=3, failed=1)


def test_choice_verdicts() -> None:
    problem = gold("B", choices=("red", "blue", "red"))
    v = ChoiceVerifier()
    assert [
        v.verify(problem, t).correct for t in ("B", "(b) blue", "blue", "Blue.", "A", "red", "green")
    ] == ([True, True, True, True, False, False, False])
    assert v.tally.unparsed == 2  # "red" names two choices, "green" none


def test_yes_no_and_exact() -> None:
    assert YesNoVerifier().verify(gold("True"), "Yes, it does.").correct
    assert not YesNoVerifier().verify(gold("True"), "no").correct
    assert ExactVerifier().verify(gold("barn damp"), " Barn  damp. ").correct
    assert not ExactVerifier().verify(gold("barn damp"), "damp barn").correct


@pytest.mark.parametrize(
    ("reference", "answer", "correct"),
    [
        ("\\frac{1}{9}", "1/9", True), ("2\\sqrt{3}", "\\sqrt{12}", True), ("x^2+2x+1", "(x+1)^2", True),
        ("10{,}000", "10000", True), ("-4", "\u22124", True), ("\\frac{1}{9}", "0.111", False),
        ("(1,2)", "(2,1)", False), ("5", "so \\boxed{5}. Or 6", True),
        # what math-verify alone would let through
        ("3", "3 or 4", False), ("1/2004!", "1/2006!", False), ("3x+4y+14=0", "3*x-1*y+13=0", False),
    ],
)  # fmt: skip
def test_math_verdicts(math_verifier: MathVerifier, reference: str, answer: str, correct: bool) -> None:
    verdict = math_verifier.verify(gold(reference), answer)
    assert (verdict.correct, verdict.failed) == (correct, False)


def test_math_time_limit_is_counted_and_the_worker_goes_on(math_verifier: MathVerifier) -> None:
    before, starts = math_verifier.tally.timed_out, math_verifier.worker.starts
    begin = time.monotonic()
    verdict = math_verifier.verify(gold("5"), "9^{9^{9^{9}}}")
    assert time.monotonic() - begin < 3.0 + 1.0 + 10.0
    assert verdict.failed and not verdict.correct
    assert math_verifier.tally.timed_out == before + 1
    assert math_verifier.verify(gold("2\\sqrt{3}"), "\\sqrt{12}").correct
    assert math_verifier.worker.starts <= starts + 2


def test_a_worker_that_does_not_answer_is_killed_and_replaced() -> None:
    """SIGSTOP stands for C code that never returns to the interpreter: the limit inside the worker cannot act."""
    v = MathVerifier(timeout=4.0)
    try:
        assert v.verify(gold("2\\sqrt{3}"), "\\sqrt{12}").correct
        assert v.worker._process is not None
        stuck = v.worker._process.pid
        os.kill(stuck, signal.SIGSTOP)
        v.worker.timeout = 0.5
        assert v.verify(gold("x+1"), "1+x").failed
        with pytest.raises(ProcessLookupError):
            os.kill(stuck, 0)
        v.worker.timeout = 20.0
        assert v.verify(gold("x+1"), "1+x").correct
        assert (v.worker.starts, v.tally.timed_out, v.tally.failed) == (2, 1, 1)
        assert v.worker._process is not None
        os.kill(v.worker._process.pid, signal.SIGKILL)  # and one that dies
        v.worker._process.wait()
        assert v.verify(gold("x+2"), "2+x").correct
        assert v.worker.starts == 3
    finally:
        v.close()


def test_reasoning_gym_verdicts() -> None:
    v = ReasoningGymVerifier(timeout=20.0)
    try:
        (problem,) = load_problems(TaskSpec("reasoning_gym", "chain_sum", size=1, seed=7))
        texts = (problem.answer, f" {problem.answer}.", f"So.\nAnswer: {problem.answer}", "zzz", "")
        assert [v.verify(problem, t).correct for t in texts] == [True, True, True, False, False]
        (factors,) = load_problems(TaskSpec("reasoning_gym", "prime_factorization", size=1))
        assert v.verify(factors, factors.answer).correct
        assert v.verify(factors, "zzz") == Verdict(
            False, 0.0, "zzz", failed=True
        )  # its scorer raises on words
        (fraction,) = load_problems(TaskSpec("reasoning_gym", "fraction_simplification", size=1))
        assert v.verify(fraction, "zzz").score == 0.0
        v.graded = True
        assert v.verify(fraction, "zzz").score == pytest.approx(0.01)
        assert v.tally.failed == 1
        assert v.worker.starts == 1
        with pytest.raises(UserError, match="needs reasoning-gym problems"):
            v.verify(gold("1"), "1")
    finally:
        v.close()


def test_verify_many_keeps_order() -> None:
    pairs = [(gold(str(i)), str(i if i % 3 else i + 1)) for i in range(60)]
    assert [x.correct for x in NumberVerifier().verify_many(pairs)] == [i % 3 != 0 for i in range(60)]


def test_trl_reward_by_hand() -> None:
    v = NumberVerifier()
    reward = as_trl_reward(v)
    assert reward.__name__ == "number_reward"
    messages = [
        [{"role": "assistant", "content": "It is \\boxed{7}."}],
        [{"role": "assistant", "content": "8"}],
    ]
    columns = {"answer": ["7", "7"], "completion_ids": [[1], [2]], "trainer_state": object()}
    assert reward(prompts=["a", "b"], completions=["so 7", "8"], **columns) == [1.0, 0.0]
    assert reward(prompts=[messages[0], messages[0]], completions=messages, **columns) == [1.0, 0.0]
    assert reward(prompts=["a", "b"], completions=["7", "7"], answer=[None, 7]) == [None, 1.0]
    assert v.tally.total == 5
    with pytest.raises(UserError, match=r"no column 'answer'.*\(columns: solution\)"):
        reward(prompts=["a"], completions=["7"], solution=["7"])


def test_trl_trainer_logs_the_reward(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    """One step of GRPOTrainer: the reward it logs is the accuracy this verifier counted, over every completion."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    verifier = NumberVerifier()
    data = Dataset.from_dict({"prompt": ["1 + 1 =", "2 + 2 ="], "answer": ["1", "2"]})
    trainer = GRPOTrainer(
        model=tiny_llama,
        processing_class=tiny_tokenizer,
        reward_funcs=as_trl_reward(verifier),
        train_dataset=data,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "rewards/number_reward/mean" in row)
    assert verifier.tally.total == 8
    assert logged["rewards/number_reward/mean"] == pytest.approx(verifier.tally.correct / 8)


def test_agrees_with_recorded_judgements(shared_data: Path, math_verifier: MathVerifier) -> None:
    """Recorded MATH answers and their judgement by another checker; items whose record is itself wrong are named."""
    rows = [
        json.loads(x) for x in (shared_data / "recorded_math_rm8" / "test.jsonl").read_text().splitlines()
    ]
    differ, total = [], 0
    for row in rows[:60]:
        for sample in row["samples"]:
            total += 1
            verdict = math_verifier.verify(gold(row["answer"]), f"\\boxed{{{sample['pred']}}}")
            if verdict.correct != bool(sample["correct"]):
                differ.append((row["id"], row["answer"], sample["pred"]))
    assert total == 480
    assert differ == []
