"""From lm-eval's strings to token ids, by the conventions of its own `hf` backend, so that scores are comparable.

    (context, continuation)   white space at the end of the context moves to the continuation; both are encoded as one
                              text and cut behind the tokens of the context
    ("", continuation)        behind the start token (else the end-of-text token)
    rolling                   disjoint windows of at most `context` predicted tokens, each token predicted once

What is not taken over: a prompt that is too long is an error, never cut on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...engines.base import StopRule
from ...errors import UserError, nearest

Ids = tuple[int, ...]

MAX_GENERATED = 256
"""Tokens to generate where a task does not say, as in lm-eval."""

_READ = ("until", "do_sample", "temperature", "top_p", "max_gen_toks")
_ALIASES = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "use_cache": (True,),
}


@dataclass(frozen=True)
class Decoding:
    """What a task's `generation_kwargs` ask for. temperature 0 is greedy."""

    until: tuple[str, ...]
    max_tokens: int
    temperature: float
    top_p: float


def decoding(options: Mapping[str, Any], where: str) -> Decoding:
    """UserError for a setting that our engines do not have and that would change the text."""
    for name, value in options.items():
        if name in _READ or name in _ALIASES or value in _NEUTRAL.get(name, ()):
            continue
        raise UserError(
            f"{where}: generation_kwargs.{name}={value!r} is not supported{nearest(name, (*_READ, *_ALIASES))}"
        )
    made = dict(normalize_gen_kwargs(dict(options), MAX_GENERATED))
    sampled = bool(made["do_sample"])
    temperature = float(made.get("temperature", 1.0)) if sampled else 0.0
    until = tuple(term for term in made["until"] if term)
    if made["max_gen_toks"] < 1:
        raise UserError(f"{where}: max_gen_toks must be >= 1, got {made['max_gen_toks']}")
    return Decoding(until, made["max_gen_toks"], temperature, float(made.get("top_p", 1.0)))


class Encoder:
    """The tokenizer behind lm-eval's conventions. context: tokens the model was built for, None for no limit."""

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        self.tokenizer, self.context = tokenizer, context
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if eos is None:
            raise UserError("the tokenizer has no end-of-text token, which lm-eval needs")
        self.eos: int = eos
        self.prefix: int = eos if bos is None else bos
        self._prefix_text = str(tokenizer.decode([self.prefix]))

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """None: the tokenizer's own start tokens, unless the text begins with one (a chat template wrote it)."""
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self._prefix_text)
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def prompt(self, text: str) -> Ids:
        """A prompt to write behind; the start token where it would be empty."""
        return tuple(self.encode(text)) or (self.prefix,)

    def pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of the context and of what is scored behind it."""
        if not context:
            target = self.encode(continuation, add_special_tokens=False)
            if target[:1] == [self.prefix]:
                return tuple(target[:1]), tuple(target[1:])
            return (self.prefix,), tuple(target)
        bare = context.rstrip()
        if not bare:
            return self.pair("", context + continuation)
        continuation = context[len(bare) :] + continuation
        whole, head = self.encode(bare + continuation), self.encode(bare)
        return tuple(whole[: len(head)]), tuple(whole[len(head) :])

    def behind(self, cue: str, continuation: str) -> Ids:
        """Ids of `continuation` as it is encoded behind `cue`, without the cue's."""
        if not cue:
            return tuple(self.encode(continuation, add_special_tokens=False))
        head = len(self.encode(cue, add_special_tokens=False))
        return tuple(self.encode(cue + continuation, add_special_tokens=False)[head:])

    def windows(self, text: str) -> list[tuple[Ids, Ids]]:
        """(context, target) of every window of a text; none for an empty one."""
        ids = self.encode(text)
        longest = self.context or len(ids) + 1
        found = get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix, max_seq_len=longest, context_len=1
        )
        return [(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, found)]

    def check_room(self, tokens: int, where: str) -> None:
        """UserError for an input of more tokens than the model's context."""
        if self.context is not None and tokens > self.context:
            raise UserError(
                f"{where}: {tokens} tokens, and the model's context is {self.context}; use fewer few-shot examples or "
                "leave the item out (prompts are never cut)"
            )

    def stop_rule(self, until: Sequence[str]) -> StopRule:
        return StopRule(tuple(until), (self.eos,), eos_is_stop=True)

    def text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """What was written, up to the first stop string."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return before(text, until)


def before(text: str, until: Sequence[str]) -> str:
    for term in until:
        text = text.split(term)[0]
    return text
