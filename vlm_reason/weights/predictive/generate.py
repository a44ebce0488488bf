"""Text from draws of weights: one draw writes a whole text, with a key-value cache of its own.

    made = generate(posterior, model, [prompt_ids], n=8, max_new_tokens=64, eos=(tokenizer.eos_token_id,))
    made.ids[s][b]          # what draw s writes behind prompt b

All S B rows are decoded together: the base is read once a token, where B = 1 and S = 10 the decoding of one text by one
draw after another reads it ten times. Each row attends to keys and values that its own draw made.

When not to use it: to sample from one draw only, or with vLLM at hand: `Posterior.export_samples` writes draws that it
serves side by side. The mixture token by token is another model: engines/token_mixture.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ...engines.base import Law
from ...engines.draw import draw as draw_tokens
from ...engines.draw import uniforms
from ...engines.hf import evaluating
from ...errors import UserError
from ...models.adapters import use_adapter
from ...models.attention import folded_attention
from ...scoring.enter import unwrap
from ..artefact import Tree
from ..examples import Ids
from ..noise import Draw
from ..per_row import draws_in_rows, stack
from .draws import adapter_kept, way_of

if TYPE_CHECKING:
    from ..posterior import Posterior

TOKENS_DRAWN = 17
"""Stream of the uniforms that tokens are drawn with."""


@dataclass(frozen=True)
class Generated:
    """ids[s][b]: what draw s wrote behind prompt b, the end-of-text token included where it came."""

    ids: tuple[tuple[Ids, ...], ...]


@torch.no_grad()
def generate(
    posterior: Posterior,
    model: PeftModel,
    prompts: Sequence[Ids],
    n: int = 10,
    max_new_tokens: int = 64,
    *,
    eos: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    antithetic: bool = False,
    adapter: str = "default",
    rows: int = 64,
) -> Generated:
    """Texts of n draws behind every prompt, token for token what each draw, written into the adapter, writes by itself.

    temperature: 0 is greedy. Otherwise token t of draw s behind prompt b depends on (seed, s, b, t) alone, so neither
    on the batch nor on n. rows: how many texts are decoded at once (draws of one prompt count; one at least).

    UserError for no prompts, an empty prompt, a temperature below 0.
    """
    if not prompts or any(not ids for ids in prompts):
        raise UserError("generation needs at least one prompt, and a token in each")
    if n < 1 or max_new_tokens < 1 or rows < 1:
        raise UserError(f"n, max_new_tokens, rows must be at least 1, got {n}, {max_new_tokens}, {rows}")
    law = Law(None, temperature, top_p)
    texts: list[list[Ids]] = []
    with ExitStack() as inside:
        inside.enter_context(use_adapter(model, adapter))
        inside.enter_context(evaluating(model))
        inside.enter_context(adapter_kept(model, adapter))
        inside.enter_context(folded_attention(unwrap(model)))
        at_once = rows if way_of(posterior, model, None, adapter) == "rows" else 1
        for numbers, draws in _chunks(posterior.sample(n, seed, antithetic), at_once):
            texts += [[] for _ in draws]
            with ExitStack() as these:
                if len(draws) == 1:
                    posterior.write(model, draws[0], adapter)
                else:
                    these.enter_context(draws_in_rows(model, stack(draws), adapter, repeat=False))
                size = max(1, rows // len(draws))
                for start in range(0, len(prompts), size):
                    some = range(start, min(start + size, len(prompts)))
                    tokens = _Tokens(law, seed, numbers, some, max_new_tokens) if temperature else None
                    made = _decode(
                        model, [prompts[b] for b in some], len(draws), max_new_tokens, tuple(eos), tokens
                    )
                    for number, own in zip(numbers, made, strict=True):
                        texts[number] += own
    return Generated(tuple(tuple(own) for own in texts))


class _Tokens(LogitsProcessor):
    """Leaves each row the one token that its uniform picks under the law; greedy decoding then takes it."""

    def __init__(self, law: Law, seed: int, draws: range, prompts: range, steps: int) -> None:
        self.law, self.step = law, 0
        keys = [Draw(seed, TOKENS_DRAWN, b, s).block_seed(0) for s in draws for b in prompts]
        self.u = torch.from_numpy(np.stack([uniforms(key, steps) for key in keys]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = draw_tokens(scores, self.u[:, self.step].to(scores.device), self.law)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _decode(
    model: PeftModel, prompts: Sequence[Ids], draws: int, steps: int, eos: Ids, tokens: LogitsProcessor | None
) -> list[list[Ids]]:
    """[draws][prompts] texts."""
    causal = unwrap(model)
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
    )
    with _own_settings(causal):
        out = cast(Any, causal).generate(
            ids.repeat(draws, 1).to(causal.device), attention_mask=mask.repeat(draws, 1).to(causal.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([] if tokens is None else [tokens]),
        )  # fmt: skip
    texts = [_until(row, eos) for row in out[:, width:].tolist()]
    return [texts[s * len(prompts) : (s + 1) * len(prompts)] for s in range(draws)]


@contextmanager
def _own_settings(causal: PreTrainedModel) -> Iterator[None]:
    """Without what the model's own generation_config.json has for what a call leaves open: penalties, end tokens."""
    own = causal.generation_config
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


def _until(ids: list[int], eos: Ids) -> Ids:
    end = next((t + 1 for t, token in enumerate(ids) if token in eos), len(ids))
    return tuple(ids[:end])


def _chunks(draws: Iterator[Tree], size: int) -> Iterator[tuple[range, list[Tree]]]:
    """(their numbers, draws), `size` at a time."""
    first = 0
    while own := list(islice(draws, size)):
        yield range(first, first + len(own)), own
        first += len(own)
