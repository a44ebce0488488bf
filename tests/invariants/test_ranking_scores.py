"""N rationales x A answers scored in one call: what each pair gives alone, every shared token forwarded once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vlm_reason.engines.base import Law
from vlm_reason.engines.hf import HFEngine
from vlm_reason.ranking import rank, score_candidates
from vlm_reason.store import SampleRecord

CUE = (5, 6)
PROMPT, TRACE = 20, 12


def records(problem: str, n: int = 8) -> list[SampleRecord]:
    """n rationales, the last one cut, each with an answer of its own of 1 to 3 tokens."""
    rng = random.Random(problem)
    draw = lambda length: tuple(rng.randrange(4, 60) for _ in range(length))  # noqa: E731
    prompt, made = draw(PROMPT), []
    for k in range(n):
        cut = k == n - 1
        trace, answer = draw(TRACE), () if cut else (10 + k, *draw(k % 3))
        made.append(
            SampleRecord(
                key=f"{k:032x}", problem_id=problem, question="", reference="", prompt_ids=prompt, trace_ids=trace,
                trace_text="", trace_logps=(-1.0,) * TRACE, finish="length" if cut else "stop", seed=k,
                temperature=0.7, top_p=1.0, proposal="base/prior", saw_answer=False, weights="w", engine="e", k=k,
                m=0 if cut else 1, answer_ids=answer, answer_text="" if cut else str(k),
                answer_logps=(-1.0,) * len(answer), canonical=None if cut else str(k % 3),
            )
        )  # fmt: skip
    return made


@torch.no_grad()
def alone(model: torch.nn.Module, context: tuple[int, ...], target: tuple[int, ...]) -> float:
    logps = model(torch.tensor([[*context, *target]])).logits[0].log_softmax(-1)
    return float(sum(logps[len(context) - 1 + t, token] for t, token in enumerate(target)))


@pytest.mark.parametrize("score_tokens", [100_000, 150])
def test_one_call_scores_what_every_pair_scores_alone(tiny_llama, tiny_tokenizer, score_tokens: int) -> None:
    groups = {name: records(name) for name in ("a", "b")}
    seen: list[int] = []
    hook = tiny_llama.get_input_embeddings().register_forward_pre_hook(lambda _, a: seen.append(a[0].numel()))
    scored = score_candidates(
        HFEngine(tiny_llama, tiny_tokenizer, score_tokens=score_tokens), CUE, groups, Law()
    )
    hook.remove()
    forwarded = sum(seen)
    for name, own in groups.items():
        made = scored[name]
        answers = [r.answer_ids for r in own if r.answered]
        for n, record in enumerate(own):
            context = (*record.prompt_ids, *record.trace_ids, *CUE)
            expected = [alone(tiny_llama, context, a) if record.complete else -np.inf for a in answers]
            assert made.logp_answer[n] == pytest.approx(expected, abs=1e-4)
            trace = alone(tiny_llama, record.prompt_ids, record.trace_ids)
            assert made.logp_trace[n] == pytest.approx(trace, abs=1e-4)
            assert made.logp_own[n] == (made.logp_answer[n, made.chosen[n]] if record.answered else -np.inf)
        assert made.logq == pytest.approx([-1.0 * TRACE] * 8)
        assert 1 <= rank(made, "importance").ess <= 8
    if score_tokens > 1000:  # x once, z behind it, the cue, and answers but for their last tokens
        pairs = sum(len(a) - 1 for a in answers) * 7
        assert forwarded == 2 * (PROMPT + 8 * TRACE - 1 + 7 * len(CUE) + pairs)
        assert forwarded < 2 * 7 * 7 * (PROMPT + TRACE + len(CUE)) / 5
