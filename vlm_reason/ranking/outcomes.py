"""Where a ranker fails. Every problem is one of three:

right          the answer it puts first is right
not_chosen     a right answer is among the samples, another was put first: a failure of selection
never_sampled  no sample is right: a failure of coverage, which no ranker can mend
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..store import SampleRecord

Outcome = Literal["right", "not_chosen", "never_sampled"]


def outcome(records: Sequence[SampleRecord], answer: str | None) -> Outcome:
    """Of one problem's judged samples and the class that was put first (None: no answer could be read)."""
    right = {record.canonical for record in records if record.correct}
    if answer is not None and answer in right:
        return "right"
    return "not_chosen" if right else "never_sampled"
