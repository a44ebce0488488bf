"""A rationale's text as passages to show: the answer marked, improbable tokens shaded.

A passage is [text, level, answer, p]: level 0 to 3 says how improbable (p below 0.3, 0.1, 0.02), answer is 1
where it is the answer, p is the probability of a shaded piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...store import SampleRecord
from .text import visible
from .tokens import Decode, Piece, pieces

LEVELS = (0.3, 0.1, 0.02)
MOST_CHARACTERS = 20_000
Passage = list[Any]


def passages(record: SampleRecord, decode: Decode | None) -> tuple[list[Passage], int]:
    """The passages of one sample, and how many characters were left out of the middle of a very long one. Text
    that came without tokens has its answer inside; a sampled answer stands behind its rationale."""
    trace, answer = record.trace_text, record.answer_text
    inside = bool(answer) and record.text_only
    start = trace.rfind(answer) if inside else -1
    if start >= 0:
        spans = [(start, start + len(answer))]
        parts = _cut_at(_whole(trace), spans)
    else:
        parts = _cut_at(_pieces_of(trace, record.trace_ids, record.trace_logps, decode), [])
        if answer:
            gap = "" if trace.endswith(("\n", " ")) or answer.startswith(("\n", " ")) else "\n"
            parts += [(gap, 0.0, 0)] if gap else []
            own = _pieces_of(answer, record.answer_ids, record.answer_logps, decode)
            parts += _cut_at(own, [_span(answer, record.parsed)])
    shown, cut = _shorten(parts)
    return _merge(shown), cut


def _span(answer: str, parsed: str | None) -> tuple[int, int]:
    """What was read in the answer, else all of it but the blanks around."""
    start = answer.rfind(parsed) if parsed else -1
    if parsed and start >= 0:
        return start, start + len(parsed)
    inner = answer.strip()
    start = answer.find(inner)
    return start, start + len(inner)


def _whole(text: str) -> list[Piece]:
    return [(text, 0.0)]


def _pieces_of(text: str, ids: Sequence[int], logps: Sequence[float], decode: Decode | None) -> list[Piece]:
    found = pieces(text, ids, logps, decode) if decode is not None and ids else None
    return found if found is not None else _whole(text)


def _cut_at(parts: Sequence[Piece], spans: Sequence[tuple[int, int]]) -> list[tuple[str, float, int]]:
    """(text, log-probability, is it the answer), cut where a span begins or ends."""
    edges = sorted({edge for span in spans for edge in span})
    made, position = [], 0
    for text, logp in parts:
        inner = [e - position for e in edges if position < e < position + len(text)]
        for start, end in zip([0, *inner], [*inner, len(text)], strict=True):
            if start < end:
                place = position + start
                made.append((text[start:end], logp, int(any(a <= place < b for a, b in spans))))
        position += len(text)
    return made


def _shorten(parts: list[tuple[str, float, int]]) -> tuple[list[tuple[str, float, int]], int]:
    """The first half and the last of what may be shown: a rationale's end is where its answer is."""
    total = sum(len(text) for text, _, _ in parts)
    if total <= MOST_CHARACTERS:
        return parts, 0
    cut = total - MOST_CHARACTERS
    head, tail, position = [], [], 0
    for text, logp, answer in parts:
        before = max(0, min(len(text), MOST_CHARACTERS // 2 - position))
        after = max(0, min(len(text), MOST_CHARACTERS // 2 + cut - position))
        head += [(text[:before], logp, answer)] if before else []
        tail += [(text[after:], logp, answer)] if after < len(text) else []
        position += len(text)
    return [*head, (f" […{cut} characters left out…] ", 0.0, 0), *tail], cut


def _merge(parts: Sequence[tuple[str, float, int]]) -> list[Passage]:
    """Neighbours that look the same become one; a shaded piece stays alone, for its probability is its own."""
    made: list[Passage] = []
    for text, logp, answer in parts:
        p = math.exp(min(0.0, logp))
        level = sum(p < bound for bound in LEVELS)
        if made and level == 0 and made[-1][1] == 0 and made[-1][2] == answer:
            made[-1][0] += visible(text)
        else:
            made.append([visible(text), level, answer, None if level == 0 else float(f"{p:.2g}")])
    return made
