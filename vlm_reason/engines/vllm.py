"""The `vllm` engine: vLLM samples (in this process or on servers), under the same contract as the `hf` engine.

What is ours: a seed per request, never `n` samples of one shared seed; our stop rule, with ids as the truth; our names
for the laws (base, `reasoner`, `posterior`); weights that follow the trainer and say which version they are;
log-probabilities of the law that sampled. vLLM's are paged, continuous batching, prefix caching, tensor parallelism.

When not to use it: a small model on a CPU with prompts that share long prefixes, where `hf` runs them once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..compat.vllm import LEAST_TEMPERATURE, Output, has_prompt_logps
from ..errors import UserError
from ..models.adapters import adapter_parameters, use_adapter
from ..scoring.logprobs import context_length
from ..types import Completion, Finish
from .base import Law, SampleRequest, ScoreRequest
from .checks import check_sample, check_score, room
from .draw import StopDetector, decode
from .hf import HFEngine
from .processes import rank, together, world
from .sync import (
    AdapterWeights,
    adapter_names,
    adapter_weights,
    check_sync,
    policy_weights,
    prune,
    write_adapter,
)

SyncKind = Literal["adapter", "merged", "full"]


@dataclass(frozen=True)
class Call:
    """One request as vLLM sees it. adapter: the served name of a LoRA adapter, None for the model's own weights.
    prompt_logps: log-probabilities of the prompt's tokens are wanted, nothing is to be written."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    adapter: str | None = None
    prompt_logps: bool = False

    def parameters(self) -> dict[str, Any]:
        """Keywords of `vllm.SamplingParams`, which are also fields of its completions endpoint. Everything that a
        server could have defaults for is said."""
        return {
            "n": 1,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": self.seed,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_ids),
            "include_stop_str_in_output": True,
            "ignore_eos": True,  # only the rule's own ids end a segment
            "skip_special_tokens": False,  # a stop string may be a special token's name
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "prompt_logprobs": 0 if self.prompt_logps else None,
        }


class Backend(Protocol):
    """Where vLLM runs. `context`: tokens of prompt and text together."""

    context: int

    def generate(self, calls: Sequence[Call], progress: str | None) -> list[Output]:
        """One output a call, in order."""
        ...

    def begin_version(self, version: int) -> None:
        """What comes next belongs to this policy version."""
        ...

    def serve_adapters(self, folders: Mapping[str, Path]) -> None:
        """From now on serve these adapters, by served name, and no others. Called in every training process."""
        ...

    def load_weights(self, served: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """From now on the model's own weights are `tensors`, called `served`."""
        ...

    def close(self) -> None: ...


class VLLMEngine:
    """Sample with vLLM; score with `scorer` (the model in training; None where no process can run it) or, where it is
    exact, with vLLM.

    model: whose weights are served. kind: how they travel (engines/sync.py). folder: where adapters and weights are
    written for vLLM to read; server mode needs it visible to the servers under the same path.
    score `vllm` uses prompt log-probabilities, which vLLM has for temperature 0 or 1 and top-p 1 only, and for which it
    does not read its prefix cache (a cached position has none); other laws go to `scorer`, and that is said once.

    Thread-safe in one way: one thread may sample while another trains, as long as `sync` and `score` under `hf` are
    called by the thread that trains. `sample` never touches the model.
    """

    def __init__(
        self,
        backend: Backend,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        scorer: HFEngine | None,
        kind: SyncKind,
        folder: Path,
        score_here: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        check_sync(kind, bool(adapter_names(model)), world())
        self.backend, self.model, self.tokenizer, self.scorer = backend, model, tokenizer, scorer
        self.kind, self.folder, self.score_here = kind, folder, score_here
        self.context = backend.context
        self._note = note
        self._noted = False
        self._lock = threading.RLock()
        self._stops = StopDetector(tokenizer)
        self._version: int | None = None
        self._adapters: dict[str, AdapterWeights] = {}
        self._served: dict[str, str] = {}  # adapter -> the name it is served under
        self._loaded: str | None = None  # merged: whose weights the model has

    # ---- weights -------------------------------------------------------------------------------------------

    @property
    def version(self) -> int | None:
        """The policy version that is served, None before the first sync."""
        return self._version

    def sync(self, model: nn.Module, version: int) -> None:
        """Serve `model` as it is now under the name of policy `version`; nothing is done when that is served already.
        Under sharded training all processes call it together."""
        with self._lock:
            if version == self._version:
                return
            self._version = None  # whatever fails below, what is served has no name
            self.backend.begin_version(version)
            if self.kind == "full":
                together(lambda: self.backend.load_weights(f"reasoner@{version}", policy_weights(model)))
            else:
                assert isinstance(model, PeftModel)
                self._adapters = {name: adapter_weights(model, name) for name in adapter_names(model)}
                self._served = {name: w.served_name(version) for name, w in self._adapters.items()}
                self._loaded = None
                if self.kind == "adapter":
                    self._serve_adapters()
            self._version = version

    def _serve_adapters(self) -> None:
        folders = {served: self.folder / served for served in self._served.values()}

        def write() -> None:
            if rank() == 0:
                for name, served in self._served.items():
                    write_adapter(self.folder, served, self._adapters[name])

        together(write)
        together(lambda: self.backend.serve_adapters(folders))
        if rank() == 0:
            prune(self.folder, folders)

    def _load_merged(self, adapter: str | None) -> None:
        served = self._served[adapter] if adapter is not None else "base@0"
        if served != self._loaded:
            weights = None if adapter is None else self._adapters[adapter]
            self._loaded = None
            self.backend.load_weights(served, policy_weights(self.model, weights))
            self._loaded = served

    # ---- requests ------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        check_sample(requests, self.context)
        for i, request in enumerate(requests):
            if 0 < request.law.temperature < LEAST_TEMPERATURE:
                raise UserError(
                    f"sample request {i}: vLLM has no temperature between 0 and {LEAST_TEMPERATURE}, got "
                    f"{request.law.temperature}: use 0 (greedy)"
                )
        calls = [self._sample_call(request) for request in requests]
        outputs = self._run(calls, [request.law for request in requests], progress)
        return [self._completion(r, o) for r, o in zip(requests, outputs, strict=True)]

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        if self.scorer is not None and not self.score_here:
            return self.scorer.score(requests, progress)
        check_score(requests, context_length(self.model))
        mine = [i for i, request in enumerate(requests) if self._scores(request)]
        rest = [i for i in range(len(requests)) if i not in set(mine)]
        if rest and self.scorer is None:
            first = requests[rest[0]]
            raise UserError(
                f"vLLM has no log-probabilities of {len(first.context_ids) + len(first.target_ids)} tokens at "
                f"temperature {first.law.temperature:g} and top-p {first.law.top_p:g} (it has at 0 or 1 and 1, within "
                f"its {self.context} tokens), and no process holds the whole model: set engine.score=hf, which "
                "gathers copies of it"
            )
        if rest and not self._noted:
            self._noted = True
            self._note(
                "engine.score vllm: vLLM has prompt log-probabilities at temperature 0 or 1 and top-p 1 only, and "
                "within its context; the rest is scored by the model in this process"
            )
        laws = [requests[i].law for i in mine]
        outputs = self._run([self._score_call(requests[i]) for i in mine], laws, progress)
        scored = {i: _target_logps(requests[i], o) for i, o in zip(mine, outputs, strict=True)}
        if rest and self.scorer is not None:
            scored |= dict(zip(rest, self.scorer.score([requests[i] for i in rest], progress), strict=True))
        return [scored[i] for i in range(len(requests))]

    def _run(self, calls: Sequence[Call], laws: Sequence[Law], progress: str | None) -> list[Output]:
        """Outputs in order, each under the weights of its law. Merged: one set of weights after another."""
        if not calls:
            return []
        with self._lock:
            if self._version is None:
                self.sync(self.model, 0)
            for name in dict.fromkeys(law.adapter for law in laws):
                self._check_known(name)
            if self.kind != "merged":
                served = [self._named(call, law) for call, law in zip(calls, laws, strict=True)]
                return self.backend.generate(served, progress)
            outputs: dict[int, Output] = {}
            for name in dict.fromkeys(law.adapter for law in laws):
                self._load_merged(name)
                mine = [i for i, law in enumerate(laws) if law.adapter == name]
                outputs.update(
                    zip(mine, self.backend.generate([calls[i] for i in mine], progress), strict=True)
                )
            return [outputs[i] for i in range(len(calls))]

    def _named(self, call: Call, law: Law) -> Call:
        served = self._served.get(law.adapter) if law.adapter is not None else None
        return call if served is None else replace(call, adapter=served)

    def _check_known(self, name: str | None) -> None:
        if name is not None and isinstance(self.model, PeftModel):
            adapter_parameters(self.model, name)  # UserError for one that is not there
        elif not isinstance(self.model, PeftModel):
            with use_adapter(self.model, name):  # no switch to throw: full weights have one law
                pass

    def _sample_call(self, request: SampleRequest) -> Call:
        return Call(
            prompt_ids=request.prompt_ids,
            max_tokens=room(request, self.context),
            temperature=request.law.temperature,
            top_p=request.law.top_p,
            seed=request.seed,
            stop=request.stop.strings,
            stop_ids=request.stop.eos,
        )

    def _scores(self, request: ScoreRequest) -> bool:
        law = request.law
        return (
            has_prompt_logps(law.temperature, law.top_p)
            and len(request.context_ids) + len(request.target_ids) < self.context
        )

    def _score_call(self, request: ScoreRequest) -> Call:
        return Call((*request.context_ids, *request.target_ids), 1, temperature=0.0, prompt_logps=True)

    def _completion(self, request: SampleRequest, output: Output) -> Completion:
        """Ids are the truth: where the segment ends is found again in them, by the rule every engine follows."""
        ids, logps = output.ids, output.logps
        if not ids or len(ids) != len(logps):
            raise RuntimeError(f"vLLM returned {len(ids)} tokens with {len(logps)} log-probabilities")
        rule = request.stop
        finish: Finish = "length"
        end = self._end(ids, rule.strings)
        if end is not None:
            ids, logps, finish = ids[:end], logps[:end], "stop"
        elif ids[-1] in rule.eos:
            finish = "stop" if rule.eos_is_stop else "eos"
        elif len(ids) < room(request, self.context):
            raise RuntimeError(f"vLLM ended after {len(ids)} tokens, where the stop rule {rule} does not")
        return Completion(ids, logps, decode(self.tokenizer, ids, special=False), finish, request.seed)

    def _end(self, ids: tuple[int, ...], strings: tuple[str, ...]) -> int | None:
        if not strings:
            return None
        return next((t for t in range(1, len(ids) + 1) if self._stops.hit(ids[:t], strings)), None)

    def close(self) -> None:
        self.backend.close()


def _target_logps(request: ScoreRequest, output: Output) -> tuple[float, ...]:
    found = (output.prompt_logps or ())[len(request.context_ids) :]
    missing = len(request.target_ids) - sum(logp is not None for logp in found)
    if (
        missing
    ):  # a cached position has no log-probability; a sum without it would be a plausible wrong number
        raise RuntimeError(
            f"vLLM left out the log-probabilities of {missing} of {len(request.target_ids)} tokens"
        )
    return cast(tuple[float, ...], found)
