"""`samples_*.jsonl` as lm-eval writes them with --log_samples: one line for each document and filter.

    resps           what the model gave: [request][repeat], a text, or (log-likelihood, is greedy) as numbers or strings
    filtered_resps  the same behind the filter
    target          the reference: a text, or the index of the right option
    arguments       what was asked: {"gen_args_0": {"arg_0": prompt, "arg_1": options or continuation}, ...}

A document with several log-likelihood requests is multiple choice: the option with the largest one is the answer, its
letter the class, and all K of them stay in `extra` (`choice_logps`, `choice_gold`); K may differ between documents. One
text is judged by the metric in the file. Of several texts (repeats) the file judges only what its filter made of them,
so each is judged by itself, by the canonical form of its answer.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import UserError, nearest
from ..record import SampleRecord
from .source import Answer, BadSample, Source, text_record

ENGINE = "imported lm-eval"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
METRICS = ("exact_match", "acc", "pass@1", "pass_at_1")
_FILE = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d\d-\d\dT[\d.\-:]+")
_KEPT = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")
_UNREADABLE = "[invalid]"


def with_filter(source: Source, lines: Iterable[Mapping[str, Any]]) -> Source:
    """`source` with the filter to read. UserError where the file has several and none was chosen."""
    there = sorted({str(line.get("filter", "none")) for line in lines})
    chosen = source.filter or (there[0] if len(there) == 1 else None)
    if chosen is None:
        raise UserError(f"{source.path} has the filters {', '.join(there)}; choose one with --filter")
    if chosen not in there:
        raise UserError(f"{source.path} has no filter {chosen!r}{nearest(chosen, there)}")
    return replace(source, filter=chosen)


def records_of_line(line: Mapping[str, Any], source: Source) -> list[SampleRecord]:
    if str(line.get("filter", "none")) != source.filter:
        return []
    requests = _requests(line["arguments"])
    if len(requests) != len(line["resps"]) or not requests:
        raise BadSample(f"{len(requests)} requests but {len(line['resps'])} responses")
    first = line["resps"][0][0]
    if isinstance(first, (list, tuple)):
        answers, extra = _choice(line, requests, source)
    elif len(requests[0]) < 2:
        raise BadSample(
            "the log-likelihood of a whole text is no answer; only multiple choice and generation are"
        )
    else:
        answers, extra = _texts(line, requests[0], source), {}
    found = _FILE.fullmatch(source.path.stem)
    task = found["task"] if found else source.path.stem
    problem_id = f"{task}/{line['doc_id']}"
    if line.get("doc_hash"):
        problem_id += f"/{line['doc_hash'][:8]}"
    prompt, doc = str(requests[0][0]), line.get("doc")
    question = doc["question"] if isinstance(doc, dict) and isinstance(doc.get("question"), str) else prompt
    reference = str(extra.pop("reference", line["target"]))
    kept = {name: line[name] for name in _KEPT if name in line}
    values = {
        name: line[name] for name in line.get("metrics", ()) if isinstance(line.get(name), (int, float, str))
    }
    extra = {**kept, "task": task, "prompt": prompt, "metrics": values, **extra}
    return [
        text_record(source, ENGINE, problem_id, question, reference, k, answer, extra)
        for k, answer in enumerate(answers)
    ]


def _requests(arguments: Any) -> list[list[Any]]:
    """[request][argument], from the file's dictionaries or from lists."""
    if isinstance(arguments, Mapping):
        arguments = [arguments[f"gen_args_{i}"] for i in range(len(arguments))]
    return [
        [one[f"arg_{j}"] for j in range(len(one))] if isinstance(one, Mapping) else list(one)
        for one in arguments
    ]


# ---- log-likelihoods ----


def _choice(
    line: Mapping[str, Any], requests: Sequence[Sequence[Any]], source: Source
) -> tuple[list[Answer], dict[str, Any]]:
    if "acc_mutual_info" in line:  # behind the K options stand the same without the question
        requests = requests[: len(requests) // 2]
    pairs = [response[0] for response in line["resps"][: len(requests)]]
    logps = [float(pair[0]) for pair in pairs]
    texts = [str(request[1]) for request in requests]
    if not all(map(math.isfinite, logps)):
        return [Answer("", "", None, False, failed=True)], {"choices": texts}
    if len(logps) == 1:
        return [_continuation(line, texts[0], str(pairs[0][1]) == "True")], {}
    best = max(range(len(logps)), key=logps.__getitem__)
    verdict = _verdict("acc", line["acc"]) >= 1.0 if "acc" in line else None
    gold = _gold(line["target"], texts, verdict, best)
    if not gold and verdict is None:
        raise BadSample(
            f"`target` {line['target']!r} is none of the {len(texts)} options, and there is no `acc`"
        )
    correct = best in gold if verdict is None else verdict
    extra = {
        "choices": texts,
        "choice_logps": logps,
        "choice_gold": gold[0] if len(gold) == 1 else None,
        "reference": texts[gold[0]].strip() if gold else line["target"],
    }
    return [Answer("", texts[best].strip(), _letter(best), correct)], extra


def _continuation(line: Mapping[str, Any], text: str, greedy: bool) -> Answer:
    """One scored continuation: right where it is what the model would have written."""
    correct = _verdict("acc", line["acc"]) >= 1.0 if "acc" in line else greedy
    return Answer("", text.strip() if greedy else "", text.strip() if greedy else "something else", correct)


def _gold(target: Any, texts: Sequence[str], verdict: bool | None, best: int) -> list[int]:
    """Indices of the right options. `target` is an index, a list of them, a letter, or the text of an option; where "1"
    could be either, the reading that agrees with the file's verdict on option `best` counts, an index first."""
    value = target
    if isinstance(target, str):
        try:
            value = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            pass
    wanted = list(value) if isinstance(value, (list, tuple)) else [value]
    options = [text.strip() for text in texts]
    readings = [
        [one for one in wanted if isinstance(one, int) and 0 <= one < len(texts)],
        [i for i, option in enumerate(options) if option in {str(one).strip() for one in [target, *wanted]}],
        [LETTERS.index(one) for one in map(str, wanted) if len(one) == 1 and one in LETTERS[: len(texts)]],
    ]
    found = [reading for reading in readings if reading]
    agreeing = [reading for reading in found if verdict is None or (best in reading) == verdict]
    return (agreeing or found or [[]])[0]


def _letter(index: int) -> str:
    return LETTERS[index] if index < len(LETTERS) else str(index)


# ---- texts ----


def _texts(line: Mapping[str, Any], request: Sequence[Any], source: Source) -> list[Answer]:
    reading, texts = source.reading, [str(text) for text in line["resps"][0]]
    filtered = line["filtered_resps"][0]
    filtered = [filtered] if not isinstance(filtered, list) else filtered
    options = request[1] if isinstance(request[1], Mapping) else {}
    temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
    top_p = float(options.get("top_p", 1.0))
    law: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    if len(texts) == 1:
        answer = str(filtered[0])
        score = _metric(line, source)
        canonical = _canonical(answer, source)
        return [Answer(texts[0], answer, canonical, score >= 1.0, score=score, **law)]
    gold = reading.canonical(reading.extract(str(line["target"])) or str(line["target"]))
    made = []
    for k, text in enumerate(texts):
        answer = str(filtered[k]) if len(filtered) == len(texts) else reading.extract(text) or ""
        canonical = _canonical(answer, source)
        made.append(Answer(text, answer, canonical, canonical is not None and canonical == gold, **law))
    return made


def _canonical(answer: str, source: Source) -> str | None:
    """None for the filter's own "[invalid]". A filter that keeps the whole text leaves the answer to be found in it."""
    if answer.strip() in ("", _UNREADABLE):
        return None
    return source.reading.canonical(source.reading.extract(answer) or answer)


def _metric(line: Mapping[str, Any], source: Source) -> float:
    """The file's verdict on its one text, in [0, 1]."""
    listed = line.get("metrics") or [
        name for name in METRICS if name in line
    ]  # old versions did not list them
    there = [name for name in listed if isinstance(line.get(name), (bool, int, float))]
    if source.metric is not None and source.metric not in there:
        raise BadSample(f"no metric {source.metric!r}{nearest(source.metric, there)}")
    only = there[0] if len(there) == 1 else None
    named = source.metric or next((name for name in METRICS if name in there), only)
    if named is None:
        raise BadSample(f"several metrics or none ({', '.join(there)}); choose the verdict with --metric")
    return _verdict(named, line[named])


def _verdict(name: str, value: Any) -> float:
    if not 0 <= float(value) <= 1:  # not true of NaN either
        raise BadSample(f"metric {name} is {value}, no verdict in [0, 1]; choose another with --metric")
    return float(value)
