"""One store may hold draws under several settings. Their seeds are the same, so what tells a trace (problem, weights,
member, seed, k) does not tell them apart, and a reader of the whole store has to refuse them."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UserError
from .record import SampleRecord


def check_one_setting(records: Iterable[SampleRecord]) -> None:
    """UserError where a trace has answer m twice, or was cut in one record (m = 0) and answered in another."""
    traces: dict[tuple[str, str, int | None, int, int], set[int]] = {}
    for r in records:
        there = traces.setdefault((r.problem_id, r.weights, r.member, r.seed, r.k), set())
        if there and (r.m in there or 0 in (r.m, *there)):
            raise drawn_twice(r.problem_id, r.k)
        there.add(r.m)


def drawn_twice(problem_id: str, k: int) -> UserError:
    return UserError(
        f"the store holds trace {k} of problem {problem_id!r} twice, drawn under different settings (caps, prompt, "
        "engine, temperature): use an output_dir for each"
    )
