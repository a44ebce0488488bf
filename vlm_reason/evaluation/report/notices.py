"""What a reader must know before the figures, in sentences. Each looks at one thing that makes figures mislead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from .. import metrics
from .curves import calibration_sentence
from .figures import Notice
from .system import Problems, System

FEW = 30
"""Fewer problems than this, and every interval is wide."""
FEWEST = 10
"""Below this, calibration is not worth a sentence."""
NOTABLE = 0.01
"""Shares of cut or unreadable samples from here on are told."""


def of_system(system: System, several: bool) -> Iterator[Notice]:
    """What is special about the samples of one system."""
    who = system.name if several else ""
    c = system.columns
    if system.left_out:
        yield _caution(
            who, f"{system.left_out} samples saw the answer and are left out: they predict nothing."
        )
    if system.torn:
        ends = "1 segment ends" if system.torn == 1 else f"{system.torn} segments end"
        yield _note(who, f"{ends} in an incomplete line (a writer was stopped or is at work).")
    cut, unread, answered = int((c.finish == 2).sum()), int(c.unparsed.sum()), int(c.answered.sum())
    if cut >= NOTABLE * len(c):
        yield _caution(
            who, f"{cut / len(c):.1%} of the rationales hit the length limit; they count as wrong."
        )
    if answered and unread >= NOTABLE * answered:
        yield _caution(who, f"{unread / answered:.1%} of the answers could not be read; they count as wrong.")
    failed = int(c.failed.sum())
    if failed:
        yield _caution(
            who, f"The checker failed on {failed} answers (an exception or a time-out); they count as wrong."
        )
    if c.text_only.all():
        yield _note(who, "Imported as text: token counts and log-probabilities are unknown.")


def of_problems(who: str, p: Problems) -> Iterator[Notice]:
    """What is special about one system on one task; `who` is what the reader knows them by, or nothing."""
    if len(p) < FEW:
        yield _caution(
            who, f"Only {len(p)} problem{'s' * (len(p) > 1)}: intervals are wide, and curves rough."
        )
    if p.fewest != p.most:
        yield _note(who, f"Problems have {p.fewest} to {p.most} samples; curves in k end at {p.fewest}.")
    if not p.sure:
        yield _note(
            who,
            f"Neither calibration nor selection: {p.summary.skipped.get('ece', 'there is no confidence')}.",
        )
        return
    error = p.summary["ece"]
    if isinstance(error, metrics.CalibrationEstimate) and math.isfinite(error.value) and len(p) >= FEWEST:
        yield (_caution if error.p < 0.05 else _note)(who, calibration_sentence(error))
    lost = int((p.sampled & ~p.right).sum())
    if lost:
        yield _note(who, f"On {lost} of {len(p)} problems a right answer was sampled but not chosen.")


def of_comparison(systems: Sequence[str], task: str, problems: Mapping[int, Problems]) -> Iterator[Notice]:
    """Two systems are compared on the same problems, or not at all."""
    if 0 not in problems:
        yield _caution(task, f"{systems[0]} has no samples of this task, so nothing is compared.")
        return
    for i, name in enumerate(systems):
        if i not in problems:
            yield _note(task, f"{name} has no samples of this task.")
    first = problems[0]
    for i, other in problems.items():
        ids, theirs = set(first.ids), set(other.ids)
        if ids != theirs:
            yield _caution(
                task,
                f"{systems[i]} has other problems than {systems[0]} ({len(ids - theirs)} only in the first, "
                f"{len(theirs - ids)} only in the second), so they are not compared.",
            )
        elif first.asked != other.asked:
            one = next(name for name in first.ids if first.asked[name] != other.asked[name])
            yield _caution(
                task,
                f"{one} asks another question, or has another answer, in {systems[i]} than in {systems[0]}, so they "
                "are not compared.",
            )


def _caution(who: str, text: str) -> Notice:
    return Notice("caution", f"{who}: {text}" if who else text)


def _note(who: str, text: str) -> Notice:
    return Notice("note", f"{who}: {text}" if who else text)
