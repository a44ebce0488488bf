"""The `hf` engine: batched, KV-cached sampling and scoring with a transformers model in this process.

What it does beyond `model.generate`: a seed per request, log-probabilities of the law that sampled, prompts that are
equal or share a prefix are run once, finished rows leave the batch, grouped heads are not copied (models/attention.py),
the cache is not copied at every step (cache.py). When not to use it: on a GPU with more than a few thousand samples a
step, where vLLM's paged continuous batching wins.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..compat.peft import lean_lora
from ..errors import UserError
from ..models.adapters import use_adapter
from ..models.attention import folded_attention
from ..scoring.forest import TokenPair
from ..scoring.logprobs import (
    batches,
    context_length,
    head_logits,
    head_logprobs_and_best,
    score_sequences,
    unwrap,
)
from ..types import Completion, Finish
from .base import Law, SampleRequest, ScoreRequest
from .cache import new_cache, select, shares_prefixes
from .checks import check_sample, check_score, room
from .draw import StopDetector, decode, draw, uniforms

MIN_SHARED = 8
"""A common prefix shorter than this is not worth a forward pass of its own."""

DROP_SHARE = 8
"""Finished rows leave once they are 1/8 of the batch: to leave copies the cache, to stay wastes a share of the step."""


class HFEngine:
    """Sample and score with `model` (a transformers causal language model, with PEFT adapters or without).

    batch_size: rows decoded together. score_tokens: tokens scored together, a shared prefix counted once. Results do
    not depend on either, nor on the order or company of requests, up to floating point. Text is generated until the
    stop rule, `max_tokens` or the model's context is reached (finish `length` in both last cases).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        score_tokens: int = 8192,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be >= 1, got {batch_size}")
        if score_tokens < 1:
            raise UserError(f"score_tokens must be >= 1, got {score_tokens}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.score_tokens = score_tokens
        self._stops = StopDetector(tokenizer)

    @property
    def context(self) -> int | None:
        """Tokens the model was built for, None if its config does not say."""
        return context_length(self.model)

    @torch.no_grad()  # not inference_mode: buffers a model refreshes in forward must stay usable in training
    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        check_sample(requests, self.context)
        results: dict[int, Completion] = {}
        with _bar(progress, len(requests)) as bar:
            for law, indices in _by_law([r.law for r in requests]):
                # Equal prompts become neighbours, lengths rise: batches share prefills and carry little padding.
                indices = sorted(
                    indices, key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids, i)
                )
                with self._serving(law):
                    for start in range(0, len(indices), self.batch_size):
                        chosen = indices[start : start + self.batch_size]
                        batch = [requests[i] for i in chosen]
                        results.update(zip(chosen, self._sample_batch(batch, law, bar), strict=True))
        return [results[i] for i in range(len(requests))]

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        return [logps for logps, _ in self._score(requests, progress, greedy=False)]

    def score_greedy(
        self, requests: Sequence[ScoreRequest], progress: str | None = None
    ) -> list[tuple[tuple[float, ...], bool]]:
        """What `score` returns, and whether greedy decoding behind the context would write the target (ties count)."""
        return self._score(requests, progress, greedy=True)

    @torch.no_grad()
    def _score(
        self, requests: Sequence[ScoreRequest], progress: str | None, greedy: bool
    ) -> list[tuple[tuple[float, ...], bool]]:
        check_score(requests, self.context)
        results: dict[int, tuple[tuple[float, ...], bool]] = {}
        with _bar(progress, len(requests)) as bar:
            for law, indices in _by_law([r.law for r in requests]):
                pairs = [(requests[i].context_ids, requests[i].target_ids) for i in indices]
                with self._serving(law):
                    for batch in batches(self.model, pairs, self.score_tokens):
                        for j, scored in zip(
                            batch.members,
                            self._score_batch([pairs[j] for j in batch.members], law, greedy),
                            strict=True,
                        ):
                            results[indices[j]] = scored
                        bar.update(len(batch.members))
        return [results[i] for i in range(len(requests))]

    def _score_batch(
        self, pairs: list[TokenPair], law: Law, greedy: bool
    ) -> list[tuple[tuple[float, ...], bool]]:
        if not greedy:
            logps, _ = score_sequences(self.model, pairs, law.temperature, law.top_p)
            return [
                (tuple(row[: len(target)]), False)
                for row, (_, target) in zip(logps.tolist(), pairs, strict=True)
            ]
        both, mask = score_sequences(
            self.model, pairs, law.temperature, law.top_p, read=head_logprobs_and_best
        )
        if both.dim() == 2:  # no batch member has a target
            return [((), True) for _ in pairs]
        first = ((both[..., 0] >= both[..., 1]) | ~mask).all(-1).tolist()
        return [
            (tuple(row[: len(target)]), best)
            for row, best, (_, target) in zip(both[..., 0].tolist(), first, pairs, strict=True)
        ]

    @contextmanager
    def _serving(self, law: Law) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(use_adapter(self.model, law.adapter))
            stack.enter_context(evaluating(self.model))
            stack.enter_context(folded_attention(unwrap(self.model)))
            stack.enter_context(lean_lora(self.model))
            yield

    def _sample_batch(self, requests: list[SampleRequest], law: Law, bar: tqdm) -> list[Completion]:
        causal = unwrap(self.model)
        device = next(causal.parameters()).device
        caps = [room(r, self.context) for r in requests]
        steps = max(caps)
        table = np.stack(
            [np.resize(uniforms(r.seed, cap), steps) for r, cap in zip(requests, caps, strict=True)]
        )
        u = torch.from_numpy(table).to(device)  # [B, steps]; a row past its cap is never read
        rows = [_Row() for _ in requests]
        state = self._begin([r.prompt_ids for r in requests], device)
        live = list(range(len(requests)))  # batch row b of the model is request live[b]
        for step in range(steps):
            tokens, logps = draw(state.logits, u[live, step], law)
            for b, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
                row = rows[live[b]]
                if row.finish is None:
                    row.ids.append(token)
                    row.logps.append(logp)
                    row.finish = self._finish(requests[live[b]], row.ids, caps[live[b]])
                    bar.update(row.finish is not None)
            keep = [b for b, i in enumerate(live) if rows[i].finish is None]
            if not keep:
                break
            if (len(live) - len(keep)) * DROP_SHARE >= len(live):
                live = [live[b] for b in keep]
                state = state.select(keep)
                tokens = tokens[torch.tensor(keep, device=device)]
            state = self._step(state, tokens)
        return [self._completion(r, row) for r, row in zip(requests, rows, strict=True)]

    def _begin(self, prompts: list[tuple[int, ...]], device: torch.device) -> Decoding:
        return prefill(unwrap(self.model), prompts, device)

    def _step(self, state: Decoding, tokens: Tensor) -> Decoding:
        assert isinstance(state, State)
        return decode_step(unwrap(self.model), state, tokens)

    def _finish(self, request: SampleRequest, ids: list[int], cap: int) -> Finish | None:
        rule = request.stop
        if rule.strings and self._stops.hit(ids, rule.strings):
            return "stop"
        if ids[-1] in rule.eos:
            return "stop" if rule.eos_is_stop else "eos"
        return "length" if len(ids) >= cap else None

    def _completion(self, request: SampleRequest, row: _Row) -> Completion:
        assert row.finish is not None
        text = decode(self.tokenizer, row.ids, special=False)
        return Completion(tuple(row.ids), tuple(row.logps), text, row.finish, request.seed)


@dataclass
class _Row:
    """What one request has produced so far."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: Finish | None = None


class Decoding(Protocol):
    """Between two steps of decoding: logits [B, V] of the next token, and rows that can leave."""

    @property
    def logits(self) -> Tensor: ...
    def select(self, rows: list[int]) -> Decoding: ...


@dataclass(frozen=True)
class State:
    """Between two steps. logits [B, V] of the next token; position [B] that token will have; mask [B, L] of the cache,
    None when no slot is padding."""

    cache: Cache
    logits: Tensor
    position: Tensor
    mask: Tensor | None

    def select(self, rows: list[int]) -> State:
        index = torch.tensor(rows, device=self.logits.device)
        select(self.cache, rows, self.logits.device)
        mask = None if self.mask is None else self.mask[index]
        return State(self.cache, self.logits[index], self.position[index], mask)


def prefill(causal: PreTrainedModel, prompts: list[tuple[int, ...]], device: torch.device) -> State:
    """Run every distinct prompt once, and what all of them have in common once for all.

    Cache layout: [common prefix][left padding][rest of the prompt], so that the last token of every row is in the last
    slot; positions skip the padding.
    """
    unique = list(dict.fromkeys(prompts))
    cache = new_cache(causal.config)
    shared = _common_prefix(unique) if len(unique) > 1 and shares_prefixes(cache) else 0
    if shared >= MIN_SHARED:
        _backbone(causal, torch.tensor([unique[0][:shared]], device=device), cache, None, None)
        select(cache, [0] * len(unique), device)
    else:
        shared = 0
    width = max(map(len, unique)) - shared
    ids = torch.zeros(len(unique), width, dtype=torch.long)
    mask = torch.zeros(len(unique), shared + width, dtype=torch.bool)
    for n, prompt in enumerate(unique):
        rest = prompt[shared:]
        ids[n, width - len(rest) :] = torch.tensor(rest)
        mask[n, :shared] = True
        mask[n, shared + width - len(rest) :] = True
    ids, mask = ids.to(device), mask.to(device)
    position = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, shared:]
    kept = None if bool(mask.all()) else mask
    hidden = _backbone(causal, ids, cache, kept, position)
    state = State(cache, head_logits(causal, hidden[:, -1]), position[:, -1] + 1, kept)
    where = {prompt: n for n, prompt in enumerate(unique)}
    return state if len(unique) == len(prompts) else state.select([where[p] for p in prompts])


def decode_step(causal: PreTrainedModel, state: State, tokens: Tensor) -> State:
    mask = None if state.mask is None else torch.nn.functional.pad(state.mask, (0, 1), value=True)
    context = context_length(causal)
    position = (
        state.position.clamp_max(context - 1) if context else state.position
    )  # finished rows may run past it
    hidden = _backbone(causal, tokens[:, None], state.cache, mask, position[:, None])
    return State(state.cache, head_logits(causal, hidden[:, -1]), state.position + 1, mask)


def _backbone(
    causal: PreTrainedModel, ids: Tensor, cache: Cache, mask: Tensor | None, position: Tensor | None
) -> Tensor:
    """Hidden states [B, S, H]; only the rows that matter meet the LM head afterwards."""
    return causal.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).last_hidden_state


def _common_prefix(prompts: list[tuple[int, ...]]) -> int:
    """Length of what all prompts begin with, leaving every prompt at least one token of its own."""
    first, last = min(prompts), max(prompts)  # the lexicographic extremes differ first where any two do
    limit = min(map(len, prompts)) - 1
    return next((t for t in range(limit) if first[t] != last[t]), limit)


def _by_law(laws: list[Law]) -> Iterator[tuple[Law, list[int]]]:
    for law in dict.fromkeys(laws):
        yield law, [i for i, other in enumerate(laws) if other == law]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _bar(label: str | None, total: int) -> tqdm:
    return tqdm(
        total=total,
        desc=label,
        unit="seq",
        file=sys.stderr,
        disable=label is None,
        leave=False,
        mininterval=0.5,
    )
