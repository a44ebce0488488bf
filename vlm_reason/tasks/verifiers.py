"""Verifiers: is this answer right? All of them give a `Verdict` for every answer and count what they could not judge.

An answer that cannot be read is wrong and counted as unparsed. A check that crashed or ran out of time is wrong and
counted as failed. Nothing is ever dropped: an accuracy over "the parsable ones" is another quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from ..errors import UserError, nearest
from ..types import Completion, Problem
from .answers import AnswerKind, canonical, extract_answer
from .worker import CheckWorker, Reply


@dataclass(frozen=True)
class Verdict:
    """correct; score in [0, 1] (1.0 or 0.0 unless the verifier grades); the answer as it was read, None if there was
    none; failed: the checker itself gave no judgement (crash, time, unreadable reference answer)."""

    correct: bool
    score: float
    parsed: str | None
    failed: bool = False


V = TypeVar("V", covariant=True)


class Verifies(Protocol[V]):
    """The one call that judging needs of a verifier."""

    def verify(self, problem: Problem, answer_text: str) -> V: ...


class ReadsAnswers(Protocol):
    """What of a prompt builder judging needs."""

    def parse_answer(self, completion_text: str) -> str | None: ...


def verdict_on(verifier: Verifies[V], prompts: ReadsAnswers, problem: Problem, answer: Completion) -> V:
    """The verdict on a sampled answer. One that was cut off at its cap, or in which nothing can be read, is judged as
    the empty answer: wrong, whatever it says so far."""
    text = prompts.parse_answer(answer.text) if answer.complete else None
    return verifier.verify(problem, text or "")


@dataclass
class Tally:
    """What a verifier has seen since it was made. wrong = total - correct, and includes unparsed and failed."""

    total: int = 0
    correct: int = 0
    unparsed: int = 0
    failed: int = 0
    timed_out: int = 0


@runtime_checkable
class Verifier(Protocol):
    name: str
    tally: Tally

    def verify(self, problem: Problem, answer_text: str) -> Verdict: ...

    def verify_many(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]: ...


class _Counting:
    """Counts verdicts; a verifier fills in `judge`."""

    name = ""

    def __init__(self) -> None:
        self.tally = Tally()

    def judge(self, problem: Problem, answer_text: str) -> Verdict:
        raise NotImplementedError

    def verify(self, problem: Problem, answer_text: str) -> Verdict:
        """Judge one answer: the parsed answer, or a whole completion that holds it."""
        verdict = self.judge(problem, answer_text)
        self.tally.total += 1
        self.tally.correct += verdict.correct
        self.tally.unparsed += verdict.parsed is None
        self.tally.failed += verdict.failed
        return verdict

    def verify_many(self, pairs: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """Verdict i belongs to pair i."""
        return [self.verify(problem, text) for problem, text in pairs]


_WRONG = Verdict(False, 0.0, None)


class CanonicalVerifier(_Counting):
    """Right when the canonical forms of answer and reference are the same string (see answers.canonical)."""

    kind: AnswerKind = "text"

    def judge(self, problem: Problem, answer_text: str) -> Verdict:
        gold = self._read(problem.answer)
        parsed = self._read(answer_text)
        if gold is None:
            return Verdict(False, 0.0, parsed, failed=True)
        if parsed is None:
            return _WRONG
        return Verdict(parsed == gold, float(parsed == gold), parsed)

    def _read(self, text: str) -> str | None:
        found = extract_answer(text, self.kind)
        return None if found is None else canonical(found, self.kind)


class NumberVerifier(CanonicalVerifier):
    """Exact equality of numbers: 18 = 18.0 = $18 = 18 dollars, no tolerance. The cheap choice for integer answers;
    not for formulas, intervals or several numbers (MathVerifier)."""

    name = "number"
    kind = "number"


class ChoiceVerifier(CanonicalVerifier):
    """The letter of a choice. The reference answer is a letter; the text of the right choice counts as well, if it is
    the only choice with that text."""

    name = "choice"
    kind = "choice"

    def judge(self, problem: Problem, answer_text: str) -> Verdict:
        letter = self._read(answer_text)
        if letter is None:
            letter = self._letter_of_text(problem, answer_text)
        gold = self._read(problem.answer)
        if gold is None:
            return Verdict(False, 0.0, letter, failed=True)
        return _WRONG if letter is None else Verdict(letter == gold, float(letter == gold), letter)

    @staticmethod
    def _letter_of_text(problem: Problem, answer_text: str) -> str | None:
        written = extract_answer(answer_text, "text")
        text = None if written is None else canonical(written, "text")
        choices = [canonical(c, "text") for c in problem.metadata.get("choices", ())]
        if text is None or choices.count(text) != 1:
            return None
        return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[choices.index(text)]


class YesNoVerifier(CanonicalVerifier):
    """yes = true, no = false; the last such word of the answer counts."""

    name = "yes_no"
    kind = "yes_no"


class ExactVerifier(CanonicalVerifier):
    """Equality after NFKC, case folding, white space and a final period. For names, labels, word lists."""

    name = "exact"
    kind = "text"


class MathVerifier(_Counting):
    """Mathematical equality by math-verify (sympy), in a worker process killed at `timeout` seconds.

    The answer is read first (last box, behind the answer cue, or the last number); numbers and identical strings are
    decided without the worker. math-verify judges the rest, reference first. Its known false positives that are caught
    here: alternatives ("3 or 4"), and numbers too small for its numeric comparison (1/2004! = 1/2006!).
    Not for choices, yes/no or names: use their own verifiers.
    """

    name = "math"

    def __init__(self, timeout: float = 5.0) -> None:
        super().__init__()
        self.worker = CheckWorker("math", timeout)

    def judge(self, problem: Problem, answer_text: str) -> Verdict:
        found = extract_answer(answer_text, "math") or extract_answer(answer_text, "number")
        parsed = None if found is None else canonical(found, "math")
        if parsed is None or found is None:
            return _WRONG
        gold_text = extract_answer(problem.answer, "math") or problem.answer
        gold = canonical(gold_text, "math")
        if parsed == gold:
            return Verdict(True, 1.0, parsed)
        if " or " in found and " or " not in gold_text:
            return Verdict(False, 0.0, parsed)
        reply = self.worker((_for_math_verify(gold_text), _for_math_verify(found)))
        return self._verdict(reply, parsed)

    def _verdict(self, reply: Reply, parsed: str) -> Verdict:
        self.tally.timed_out += reply.timed_out
        if reply.value is None:
            return Verdict(False, 0.0, parsed, failed=True)
        return Verdict(reply.value == 1.0, reply.value, parsed)

    def close(self) -> None:
        self.worker.close()


def _for_math_verify(text: str) -> str:
    return text.replace("\u2212", "-").strip().strip("$").rstrip(".")


class ReasoningGymVerifier(_Counting):
    """The generator's own scorer, in a worker process. Right at a score of at least 0.99.

    Several scorers give 0.01 to 0.25 to any text, so the score is 0 or 1 unless `graded`; graded scores are for
    looking at, not for training. A scorer that raises is a failed verdict.
    """

    name = "reasoning_gym"

    def __init__(self, timeout: float = 5.0, graded: bool = False) -> None:
        super().__init__()
        self.graded = graded
        self.worker = CheckWorker("gym", timeout)

    def judge(self, problem: Problem, answer_text: str) -> Verdict:
        if problem.metadata.get("source") != "reasoning_gym":
            raise UserError(
                f"verifier 'reasoning_gym' needs reasoning-gym problems; {problem.id!r} is none; use number, math, "
                "choice, yes_no or exact"
            )
        parsed = answer_text.strip()
        if not parsed:
            return _WRONG
        readings = [
            parsed,
            parsed.rstrip("."),
            extract_answer(parsed, "math"),
        ]  # the last: boxed, or behind a cue
        replies = [self._score(problem, text) for text in dict.fromkeys(readings) if text]
        scores = [r.value for r in replies if r.value is not None]
        self.tally.timed_out += any(r.timed_out for r in replies)
        if not scores:
            return Verdict(False, 0.0, parsed, failed=True)
        correct = max(scores) >= 0.99
        return Verdict(correct, max(scores) if self.graded else float(correct), parsed)

    def _score(self, problem: Problem, text: str) -> Reply:
        meta = problem.metadata
        return self.worker((meta["name"], dict(meta.get("options", {})), meta["entry"], text))

    def close(self) -> None:
        self.worker.close()


VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "number": NumberVerifier,
    "math": MathVerifier,
    "choice": ChoiceVerifier,
    "yes_no": YesNoVerifier,
    "exact": ExactVerifier,
    "reasoning_gym": ReasoningGymVerifier,
}


def make_verifier(name: str) -> Verifier:
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier {name!r}{nearest(name, VERIFIERS)}")
    return VERIFIERS[name]()


def as_trl_reward(verifier: Verifier) -> Callable[..., list[float | None]]:
    """A reward function as TRL's trainers call it: f(prompts, completions, **data set columns) -> [float | None].

    The reference comes from the column `answer` (a None there gives None: no reward for that row); `id`, `question`
    and `metadata` are used if the data set has them. Completions may be texts or chat messages.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = columns.get("answer")
        if answers is None:
            raise UserError(
                "the data set has no column 'answer', so its completions cannot be verified; rename the column that "
                f"holds the reference (columns: {', '.join(sorted(columns)) or 'none'})"
            )
        rewards: list[float | None] = []
        for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            if answer is None:
                rewards.append(None)
                continue
            problem = Problem(
                id=str(_cell(columns, "id", row, row)),
                question=str(_cell(columns, "question", row, _message_text(prompts[row]))),
                answer=str(answer),
                metadata=_cell(columns, "metadata", row, {}),
            )
            rewards.append(verifier.verify(problem, _message_text(completion)).score)
        return rewards

    reward.__name__ = f"{verifier.name}_reward"  # TRL logs rewards under this name
    return reward


def _cell(columns: dict[str, Any], name: str, row: int, default: Any) -> Any:
    return columns[name][row] if columns.get(name) is not None else default


def _message_text(message: Any) -> str:
    """The text of a completion or prompt: itself, or the content of its last chat message."""
    return message if isinstance(message, str) else str(message[-1]["content"]) if message else ""
