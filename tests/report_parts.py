"""Stores for the tests of the report: samples written down by hand, hostile texts among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_reason.store import SampleRecord, SampleStore

HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1"> "quoted" \'single\' `tick` ${x}',
    "a\u202ereversed\u202c \u2066isolated\u2069 \u200f",
    "nul \x00 bell \x07 escape \x1b[31m line\u2028paragraph\u2029 bom\ufeff",
    "<!-- comment --> ]]> &amp; &lt;b&gt; %3Cscript%3E javascript:alert(1)",
    "half a pair \ud83d and a whole one \U0001f600",
)


def record(
    problem: str,
    k: int,
    answer: str | None,
    correct: bool,
    *,
    reference: str = "1",
    question: str | None = None,
    trace: str = "So it is.",
    member: int | None = None,
    reward: float | None = None,
    weights: str = "w",
    proposal: str = "base/prior",
    saw_answer: bool = False,
    finish: str = "stop",
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> SampleRecord:
    """Sample k of a problem. answer None: cut, no answer was asked for. Each character is a token of log-probability
    -0.1, the last one of -5."""
    ids = tuple(map(ord, trace))
    logps = (-0.1,) * (len(ids) - 1) + (-5.0,)
    own = f" {answer}" if answer is not None else ""
    return SampleRecord(
        key=f"{abs(hash((problem, k, member, weights, proposal, saw_answer, temperature, top_p))):032x}"[
            -32:
        ],
        problem_id=problem,
        question=question if question is not None else f"What is {problem}?",
        reference=reference,
        prompt_ids=(1, 2),
        trace_ids=ids,
        trace_text=trace,
        trace_logps=logps,
        finish="length" if answer is None else finish,  # type: ignore[arg-type]
        seed=k,
        temperature=temperature,
        top_p=top_p,
        proposal=proposal,
        saw_answer=saw_answer,
        weights=weights,
        engine="by hand",
        k=k,
        m=0 if answer is None else 1,
        member=member,
        answer_ids=tuple(map(ord, own)),
        answer_text=own,
        answer_logps=(-0.2,) * len(own),
        answer_finish=None if answer is None else "stop",
        correct=None if answer is None else correct,
        parsed=answer,
        failed=None if answer is None else False,
        canonical=answer,
        reward=reward,
    )


def votes(
    problem: str, answers: Sequence[str | None], reference: str = "1", **rest: object
) -> list[SampleRecord]:
    """One sample for each of `answers`; right where it is the reference."""
    return [
        record(problem, k, a, a == reference, reference=reference, **rest)  # type: ignore[arg-type]
        for k, a in enumerate(answers)
    ]


def three_kinds() -> list[SampleRecord]:
    """16 right, 4 not chosen (three of them confident, one not), 4 never sampled (two of them confident)."""
    made: list[SampleRecord] = []
    for i in range(16):
        made += votes(f"sum/{i}", ["1", "1", "1", "2" if i % 2 else "1"])
    for i in range(16, 19):
        made += votes(f"sum/{i}", ["2", "2", "2", "1"])
    made += votes("sum/19", ["2", "3", "1", None])
    for i in (20, 21):
        made += votes(f"sum/{i}", ["7", "7", "7", "7"])
    for i in (22, 23):
        made += votes(f"sum/{i}", ["7", "8", "9", None])
    return made


def hostile() -> list[SampleRecord]:
    """Hostile text wherever a data set or a model can put some."""
    made = []
    for i, text in enumerate(HOSTILE):
        made += votes(f"evil/{i}{text[:12]}", ["1", text, "1", text], question=text, trace=text + " end")
    return made


def store_of(folder: Path, records: Sequence[SampleRecord]) -> Path:
    with SampleStore(folder) as store:
        assert store.append(records) == len(records)
    return folder
