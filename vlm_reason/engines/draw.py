"""Inverse-CDF sampling of one token a row from its own uniform, and when a row's text stops.

    token = min { v : F(v) > u F(V) },   F the running sum of probabilities in fp64, u ~ U[0, 1) of request and step

A uniform is a function of (seed, step) alone, so a request draws the same tokens whatever else is in the batch: a token
changes only if u falls within rounding of a boundary of F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..scoring.logprobs import log_law
from .base import Law

BLOCK = 256


def uniforms(seed: int, steps: int) -> np.ndarray:
    """u_0 .. u_{steps-1} in [0, 1), fp64, of the request with this seed; a longer request begins with the same values.

    Philox (Salmon et al. 2011) takes the whole 64-bit seed as its key; torch's CPU generator would keep 32 bits of it.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(steps)


def draw(logits: Tensor, u: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their log-probabilities [B] fp32 under `law`, from logits [B, V] and uniforms [B] fp64."""
    if law.temperature == 0:
        logp = log_law(logits, 0.0)
        tokens = logp.argmax(-1)
        return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1)
    if law.top_p < 1:
        logits = log_law(logits, law.temperature, law.top_p)
    else:
        logits = logits.float() / law.temperature
    top = logits.amax(-1, keepdim=True)
    tokens, total = inverse_cdf((logits - top).exp(), u)
    return tokens, (logits.gather(-1, tokens[:, None]) - top).squeeze(-1) - total.log().float()


def inverse_cdf(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds u times the total, and the total [B] fp64. mass [B, V] >= 0 fp32.

    Two levels, block sums and then the one block that holds the target: a running fp64 sum over the whole vocabulary
    costs ten times as much. UserError where a total is not finite: there is no law to draw from.
    """
    batch, vocab = mass.shape
    mass = torch.nn.functional.pad(mass, (0, -vocab % BLOCK))
    blocks = mass.view(batch, -1, BLOCK)
    outer = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    if not bool(outer[:, -1].isfinite().all()):
        raise UserError(
            "the model's next-token scores are not finite: its weights hold NaN or infinity, or its dtype overflows; "
            "mend the weights, or use dtype bfloat16 or float32"
        )
    target = u[:, None] * outer[:, -1:]
    index = _first_above(outer, target)
    before = torch.where(index > 0, outer.gather(-1, (index - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, index[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    token = index * BLOCK + _first_above(inside, target - before)
    return token.squeeze(-1), outer[:, -1]


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """First index with running > target, at most the first that reaches the total: rounding never lands on mass 0."""
    last = torch.searchsorted(running, running[:, -1:].contiguous(), right=False)
    return torch.minimum(torch.searchsorted(running, target.contiguous(), right=True), last)


class StopDetector:
    """Does the text of `ids` hold a stop string, given that it did not one token earlier?

    Only the tail is decoded: a string of n UTF-8 bytes spans at most n tokens with text, plus a margin for what some
    tokenizers strip at the start of a decoded piece. A token that cannot end a stop string is not decoded twice.
    """

    MARGIN = 4

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def hit(self, ids: Sequence[int], strings: tuple[str, ...]) -> bool:
        candidates = [s for s in strings if self._may_end(ids[-1], s)]
        if not candidates:
            return False
        window = max(len(s.encode()) for s in candidates) + self.MARGIN
        tail = self._decode(ids[-window:])
        return any(s in tail for s in candidates)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids, special=True)

    def _may_end(self, token: int, string: str) -> bool:
        """False only if this token surely does not complete `string`: its text lacks the last character. A space may be
        stripped from a lone piece and a non-ASCII character may be spread over tokens, so these are always tried."""
        last = string[-1]
        if last == " " or not last.isascii():
            return True
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        return last in self._pieces[token]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: bool) -> str:
    """The text of `ids` as it was written; `special` keeps the special tokens' names in it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return cast(str, text)
