"""From a finished lm-eval run to the sample store, with what lm-eval does not keep: every member, every rationale.

    multiple choice   one record a member and one of the mixture: log p of each option (`choice_logps`), the right one
    generation        one record a repeat (the text that answered), and one a draft where it was chosen from several

The verdict on a text is the task's own: its first filter and its first metric that says right or wrong. Every repeat
and every draft is judged, not the first alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from ...store import SampleRecord
from ...store.importers import Reading
from ...store.importers.lm_eval import METRICS, records_of_line
from ...store.importers.source import Source
from ...store.record import sample_key
from ...tasks.answers import canonical, extract_answer
from ...types import Completion
from .mixture import Draft, Mixed, Written
from .model import VLMReasonLM
from .rationales import PROPOSAL

ENGINE = "lm-eval"

READING = Reading(
    extract=lambda text: extract_answer(text, "math") or extract_answer(text, "number"),
    canonical=lambda answer: canonical(answer, "math"),
)
"""Two answers are one where these say so, as in `vlm-reason import`."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A document of a task: its id, what lm-eval logged of it, and the task to judge by."""

    name: str
    logged: Mapping[str, Any]
    task: ConfigurableTask


def records(
    lm: VLMReasonLM, logged: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, ConfigurableTask]
) -> Iterator[SampleRecord]:
    """The records of `simple_evaluate(lm, ...)["samples"]`, all items in order. Perplexity tasks have none."""
    for name, samples in logged.items():
        filters = dict.fromkeys(sample["filter"] for sample in samples)
        for sample in samples:
            if sample["filter"] != next(iter(filters)):
                continue  # the same answers, read in another way
            item = Item(f"{name}/{sample['doc_id']}", sample, tasks[name])
            first = lm.kept.get((item.name, 0, 0))
            if isinstance(first, Written):
                yield from _written(lm, item)
            elif isinstance(first, Mixed) and tasks[name].OUTPUT_TYPE == "multiple_choice":
                yield from _choices(lm, item)


# ---- multiple choice ---------------------------------------------------------------------------------------


def _choices(lm: VLMReasonLM, item: Item) -> Iterator[SampleRecord]:
    """As the importer of lm-eval's logs makes them, with each member's log-probabilities in the place of the mixture's.
    The members' verdicts are their own: `acc` is the mixture's."""
    count = len(item.logged["arguments"])
    mixed = [value for i in range(count) if isinstance(value := lm.kept[item.name, i, 0], Mixed)]
    several = len(lm.members) > 1
    if several:
        yield _choice(item, item.logged, [m.value for m in mixed], lm.identity, None)
    for m, member in enumerate(lm.members):
        own = (
            {name: value for name, value in item.logged.items() if name != "acc"} if several else item.logged
        )
        yield _choice(item, own, [value.members[m] for value in mixed], member.weights, member.index)


def _choice(
    item: Item, logged: Mapping[str, Any], logps: Sequence[float], weights: str, member: int | None
) -> SampleRecord:
    line = {**logged, "resps": [[[logp, False]] for logp in logps]}
    path = Path(f"{item.name.rpartition('/')[0]}.jsonl")
    source = Source(path, "", weights, member, READING, filter=str(logged["filter"]))
    (record,) = records_of_line(line, source)
    return dataclasses.replace(record, engine=ENGINE, proposal="lm_eval/choice", temperature=0.0)


# ---- generation --------------------------------------------------------------------------------------------


def _written(lm: VLMReasonLM, item: Item) -> Iterator[SampleRecord]:
    repeat = 0
    members = {member.index: member.weights for member in lm.members}
    while isinstance(written := lm.kept.get((item.name, 0, repeat)), Written):
        several = len(written.drafts) > 1
        shown = written.drafts[written.chosen or 0]
        weights = lm.identity if several else members.get(shown.member, lm.identity)
        yield _record(lm, item, shown, written, repeat, weights, own=not several)
        if several:
            width = len(written.drafts)
            for j, draft in enumerate(written.drafts):
                weights = members.get(draft.member, lm.identity)
                yield _record(lm, item, draft, written, repeat * width + j, weights, own=True)
        repeat += 1


def _record(
    lm: VLMReasonLM, item: Item, draft: Draft, written: Written, k: int, weights: str, own: bool
) -> SampleRecord:
    """own: what one member wrote; else what the mixture answered, which is one of its drafts or nothing."""
    answer = draft.completion if own or written.chosen is not None else None
    trace, how = draft.trace, written.decoding
    reasoned = trace is not None
    trace = trace or Completion((), (), "", "stop", 0 if answer is None else answer.seed)
    name = PROPOSAL if reasoned else "lm_eval/text"
    record = SampleRecord(
        key=_key(item, lm, weights, k, own),
        problem_id=f"{item.name}/{item.logged['doc_hash'][:8]}",  # as the importer names it
        question=str(item.logged["arguments"][0][0]),
        reference=str(item.logged["target"]),
        prompt_ids=draft.prompt,
        trace_ids=trace.ids,
        trace_text=trace.text,
        trace_logps=trace.logps,
        finish=trace.finish,
        seed=trace.seed,
        temperature=1.0 if reasoned else how.temperature,
        top_p=1.0 if reasoned else how.top_p,
        proposal=name if own else f"{name}/mixture",
        saw_answer=False,
        weights=weights,
        engine=ENGINE,
        k=k,
        member=draft.member if own else None,
    )
    if answer is None:
        return record
    text = lm.encoder.text(answer.ids, how.until)
    correct, parsed = judged(item.task, item.logged, text)
    label = draft.canonical
    if label is None and parsed is not None:
        label = READING.canonical(READING.extract(parsed) or parsed)
    return dataclasses.replace(
        record,
        m=1,
        answer_ids=answer.ids,
        answer_text=text,
        answer_logps=answer.logps,
        answer_finish=answer.finish,
        answer_seed=answer.seed,
        correct=correct if label is not None or correct is None else False,
        score=None if correct is None else float(correct),
        parsed=parsed,
        failed=False,
        canonical=label,
    )


def judged(task: ConfigurableTask, logged: Mapping[str, Any], text: str) -> tuple[bool | None, str | None]:
    """The task's own verdict on a text: its first filter, its first metric that is 0 or 1 (None if it has none), and
    what the filter read."""
    instance = Instance(
        "generate_until",
        dict(logged["doc"]),
        tuple(logged["arguments"][0]),
        0,
        (task.config.task, logged["doc_id"], 1),
    )
    instance.resps = [text]
    ensemble = task._filters[0]
    ensemble.apply([instance])
    read = instance.filtered_resps[ensemble.name]
    metrics = task.process_results(dict(logged["doc"]), [read])
    known = [name for name in (*METRICS, *metrics) if name in metrics]
    values = [metrics[name] for name in known if isinstance(metrics[name], bool | int | float)]
    verdict = next((bool(value) for value in values if value in (0, 1)), None)
    seen = read if isinstance(read, str) else next(iter(read), None)
    parsed = None if seen is None else str(seen).strip()
    return verdict, None if parsed in ("", "[invalid]") else parsed


def _key(item: Item, lm: VLMReasonLM, weights: str, k: int, own: bool) -> str:
    """What was asked (document, prompt), of whom, and as which draw."""
    asked = {name: item.logged[name] for name in ("doc_hash", "prompt_hash", "target_hash")}
    return sample_key(
        weights=weights,
        engine=ENGINE,
        prompt_ids=(),
        parameters={"item": item.name, "identity": lm.identity, "own": own, **asked},
        seed=lm.seed,
        k=k,
        m=1,
    )
