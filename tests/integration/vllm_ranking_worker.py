"""What tests/integration/test_vllm_ranking.py measures, in the environment that vLLM needs. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from vlm_reason.engines.base import Law, SampleRequest, StopRule
from vlm_reason.engines.hf import HFEngine
from vlm_reason.engines.make import make_engine
from vlm_reason.models.adapters import AdapterConfig, add_adapters
from vlm_reason.models.load import load_model
from vlm_reason.ranking import METHODS, lacking, rank, score_candidates
from vlm_reason.store import SampleRecord

QUESTIONS = ("Question: 12 + 7 - 5\nReasoning:", "Question: 40 - 13 + 2\nReasoning:")
TRACES, TEMPERATURE = 4, 0.8


def drawn(engine: HFEngine, prompt: tuple[int, ...], cue: tuple[int, ...], name: str) -> list[SampleRecord]:
    """Rationales up to a line break, full stop or equals sign, and an answer of three tokens behind each whole one."""
    law = Law("reasoner", TEMPERATURE)
    traces = engine.sample(
        [SampleRequest(prompt, k, 24, law, StopRule(("\n", ".", "="))) for k in range(TRACES)]
    )
    made = []
    for k, trace in enumerate(traces):
        base = SampleRecord(
            key=f"{k:032x}", problem_id=name, question=name, reference="", prompt_ids=prompt, trace_ids=trace.ids,
            trace_text=trace.text, trace_logps=trace.logps, finish=trace.finish, seed=k, temperature=TEMPERATURE,
            top_p=1.0, proposal="reasoner/prior", saw_answer=False, weights="w", engine="e", k=k,
        )  # fmt: skip
        if trace.complete:
            (answer,) = engine.sample([SampleRequest((*prompt, *trace.ids, *cue), 100 + k, 3, law)])
            base = replace(
                base, m=1, answer_ids=answer.ids, answer_text=answer.text, answer_logps=answer.logps,
                canonical=answer.text,
            )  # fmt: skip
        made.append(base)
    return made


def main(folder: Path) -> dict:
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    model = add_adapters(base, AdapterConfig(r=4, alpha=8))
    options = {"kind": "vllm", "batch_size": 16, "max_model_len": 256, "score": "vllm", "sync": "adapter"}
    engine, hf = make_engine(model, tokenizer, options, folder), HFEngine(model, tokenizer)
    cue = tuple(tokenizer("Answer:").input_ids)
    groups = {text: drawn(hf, tuple(tokenizer(text).input_ids), cue, text) for text in QUESTIONS}
    law = Law("reasoner")
    ours, theirs = (score_candidates(e, cue, groups, law) for e in (hf, engine))
    answers = [
        (float(a), float(b))
        for name in groups
        for a, b in zip(ours[name].logp_answer.ravel(), theirs[name].logp_answer.ravel(), strict=True)
        if a != b  # both -inf behind a cut rationale
    ]
    traces = [
        abs(a - b) / length
        for name, made in ours.items()
        for a, b, length in zip(made.logp_trace, theirs[name].logp_trace, made.trace_length, strict=True)
    ]
    posteriors = [
        abs(p - q)
        for name, made in ours.items()
        for method in METHODS
        if not lacking(made, method)
        for p, q in zip(rank(made, method).posterior, rank(theirs[name], method).posterior, strict=True)
    ]
    return {
        "complete": sum(r.complete for own in groups.values() for r in own),
        "scores": len(answers),
        "answers": max(abs(a - b) for a, b in answers),
        "traces_per_token": max(traces),
        "posterior": max(posteriors),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
