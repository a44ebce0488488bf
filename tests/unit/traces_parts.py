"""Small pieces for tests of vlm_reason.traces: a character template, hand-made traces, an engine that counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlm_reason.engines.base import Engine, Law, SampleRequest, ScoreRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.templates import Shot, Template
from vlm_reason.tasks.verifiers import Verdict
from vlm_reason.types import Completion, Finish, Problem, Trace, TraceGroup

TEMPLATE = Template(
    name="tiny",
    prior="{question}=",
    posterior="{question}={hint}=",
    cue="a:",
    shots=(Shot("1+1", " 1+1", "2"),),
)
RIGHT, WRONG = Verdict(True, 1.0, "1"), Verdict(False, 0.0, "0")


def problem(i: int, **metadata: object) -> Problem:
    return Problem(f"p{i}", f"{i}+{i + 1}", str(2 * i + 1), metadata=metadata)


def completion(prompts: PromptBuilder, text: str, finish: Finish = "stop", seed: int = 1) -> Completion:
    """A trace's completion that says `text`; incomplete ones lack their end marker."""
    ids = prompts.trace_ids(text)
    ids = ids if finish == "stop" else ids[:-1]
    return Completion(tuple(ids), (-1.0,) * len(ids), text, finish, seed)


def answer(prompts: PromptBuilder, text: str, seed: int = 1) -> Completion:
    ids = prompts.answer_ids(text)
    return Completion(tuple(ids), (-0.5,) * len(ids), f" {text}\n", "stop", seed)


def group(
    prompts: PromptBuilder,
    about: Problem,
    texts: Sequence[str],
    *,
    proposal: str = "reasoner/prior",
    finish: Sequence[Finish] | None = None,
    answers: Sequence[Sequence[str]] | None = None,
) -> TraceGroup:
    hinted = proposal.endswith("/hinted")
    prompt = prompts.hinted_ids(about) if hinted else prompts.prior_ids(about)
    ends = finish or ["stop"] * len(texts)
    written = answers or [()] * len(texts)
    return TraceGroup(
        about,
        tuple(
            Trace(
                about.id, k, proposal, prompt, completion(prompts, text, ends[k]), saw_answer=hinted,
                answers=tuple(answer(prompts, a) for a in written[k]),
            )
            for k, text in enumerate(texts)
        ),
    )  # fmt: skip


def adapted(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Both adapters, moved away from the base, so that reasoner, posterior and base are three laws."""
    wrapped = add_adapters(model, AdapterConfig(r=2, alpha=4))
    generator = torch.Generator().manual_seed(3)
    for name in ("reasoner", "posterior"):
        for parameter in adapter_parameters(wrapped, name).values():
            with torch.no_grad():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


class CountingEngine:
    """An engine that remembers what it was asked to score."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.scored: list[ScoreRequest] = []

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        return self.inner.sample(requests, progress)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        self.scored += requests
        return self.inner.score(requests, progress)

    def laws(self) -> set[Law]:
        return {request.law for request in self.scored}


def counting(model: nn.Module, tokenizer: object) -> CountingEngine:
    return CountingEngine(HFEngine(adapted(model), tokenizer))
