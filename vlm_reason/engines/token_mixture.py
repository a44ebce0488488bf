"""M members mixed token by token: sampling needs all of them at every step.

    p(y_t | x, y_<t) = (1/M) sum_m p_m(y_t | x, y_<t)

This is another model than the mixture of whole answers, p(y | x) = (1/M) sum_m p_m(y | x): there one member writes the
answer to its end, here the members are asked anew at every token, whatever each of them thought of the tokens before.
It is what averaging the softmax of an ensemble means for a language model (Malinin & Gales 2021, arXiv:2002.07650).
M times the memory of the key-value cache and M times the time of one model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.adapters import use_adapter
from ..models.attention import folded_attention
from ..scoring.logprobs import unwrap
from .base import Law, ScoreRequest
from .hf import Decoding, HFEngine, State, decode_step, evaluating, prefill

MIXTURE = "mixture"
"""Adapter name of the law that mixes all members."""


class TokenMixtureEngine(HFEngine):
    """Sample and score the mixture of the adapters `members` of `model`, under `Law("mixture", ...)`.

    Temperature and top-p act on the mixture, not on its members. `score` has temperature 0 or 1 and top-p 1 only: for
    others the members' log-probabilities of the target do not determine the mixture's. UserError for those, for laws of
    another name, and for no members.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        members: Sequence[str | None],
        batch_size: int = 64,
        score_tokens: int = 8192,
    ) -> None:
        super().__init__(model, tokenizer, batch_size, score_tokens)
        if not members:
            raise UserError("a mixture needs at least one member")
        self.members = tuple(members)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        for request in requests:
            law = request.law
            if law.temperature not in (0.0, 1.0) or law.top_p != 1.0:
                raise UserError(
                    "a token-level mixture scores at temperature 0 or 1 and top_p 1, got "
                    f"{law.temperature} and {law.top_p}"
                )
            _check(law)
        single = HFEngine(self.model, self.tokenizer, self.batch_size, self.score_tokens)
        by_member = [
            single.score([replace(r, law=replace(r.law, adapter=member)) for r in requests], progress)
            for member in self.members
        ]
        return [mix_tokens(each) for each in zip(*by_member, strict=True)]

    @contextmanager
    def _serving(self, law: Law) -> Iterator[None]:
        _check(law)
        with ExitStack() as stack:  # no short path for LoRA here: it is made for one adapter at a time
            stack.enter_context(evaluating(self.model))
            stack.enter_context(folded_attention(unwrap(self.model)))
            yield

    def _begin(self, prompts: list[tuple[int, ...]], device: torch.device) -> Decoding:
        states = []
        for member in self.members:
            with use_adapter(self.model, member):
                states.append(prefill(unwrap(self.model), prompts, device))
        return _Together(tuple(states))

    def _step(self, state: Decoding, tokens: Tensor) -> Decoding:
        assert isinstance(state, _Together)
        states = []
        for member, own in zip(self.members, state.states, strict=True):
            with use_adapter(self.model, member):
                states.append(decode_step(unwrap(self.model), own, tokens))
        return _Together(tuple(states))


@dataclass(frozen=True)
class _Together:
    """The members' states over the same text."""

    states: tuple[State, ...]

    @property
    def logits(self) -> Tensor:
        """log of the mean probability, [B, V] fp32: normalised already, so any law can be made of it."""
        logp = torch.stack([state.logits.float().log_softmax(-1) for state in self.states])
        return logp.logsumexp(0) - math.log(len(self.states))

    def select(self, rows: list[int]) -> _Together:
        return _Together(tuple(state.select(rows) for state in self.states))


def mix_tokens(members: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """log (1/M) sum_m p_m(y_t) for every token t, from the members' log-probabilities [M][T]."""
    if not members or not members[0]:
        return ()
    logps = torch.tensor(members, dtype=torch.float64)
    return tuple((logps.logsumexp(0) - math.log(len(members))).tolist())


def _check(law: Law) -> None:
    if law.adapter != MIXTURE:
        raise UserError(f"the law of a token-level mixture is {MIXTURE!r}, got {law.adapter!r}")
