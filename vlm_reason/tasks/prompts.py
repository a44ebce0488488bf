"""From problems to token ids: the prompt, the cue and the target segments of one template under one tokenizer.

A sequence is always  prompt ids + z ids + cue ids + y ids, joined as ids. Sampled ids are kept as they were drawn and
nothing is tokenised again. For this to be the sequence a model would have been trained on, cutting the text at a
boundary must not change its tokens: encode(a + b) = encode(a) + encode(b) at prompt|z, z|cue and cue|y. A builder
checks that on probe texts when it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..errors import UserError
from ..types import Problem, StopRule
from .templates import Template

Ids = tuple[int, ...]

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
_PROBE_TRACES = (" So it is 7.", " 3 + 4 = 7", " The sky is blue; therefore B.")
_PROBE_ANSWERS = ("7", "-24", "1,000", "B", "yes")


class PromptBuilder:
    """The ids of one template under one tokenizer, with `shots` of its worked examples in front.

    Raises UserError when a boundary merges (naming the boundary, the pair and what to change), when the template needs
    a chat template and the tokenizer has none, and when there are fewer worked examples than `shots`.
    Text only: a problem with images is refused.
    """

    def __init__(self, tokenizer: Any, template: Template, shots: int = 0) -> None:
        if not 0 <= shots <= len(template.shots):
            raise UserError(
                f"shots must be 0 to {len(template.shots)} for template {template.name!r}, got {shots}"
            )
        if template.chat and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"template {template.name!r} needs a chat template, and the tokenizer "
                f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has none; "
                "use an instruct model or a plain template (steps, arithmetic, choices)"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.shots = shots
        self._check_boundaries()

    # ---- segments, in the order of the sequence ----

    def prior_ids(self, problem: Problem) -> Ids:
        """Prompt behind which the model reasons without knowing the answer."""
        return self._prompt_ids(self._prior_text(self._question(problem)))

    def hinted_ids(self, problem: Problem, hint: str | None = None) -> Ids:
        """Prompt that reveals `hint`: the reference answer by default, or a worked solution."""
        question = self._question(problem)
        return self._prompt_ids(self._posterior_text(question, problem.answer if hint is None else hint))

    def direct_ids(self, problem: Problem) -> Ids:
        """Prompt of the no-trace control: prior_ids + empty_trace_ids + cue_ids."""
        return (*self.prior_ids(problem), *self.empty_trace_ids, *self.cue_ids)

    def trace_ids(self, text: str) -> Ids:
        """A written rationale as z, closed by trace_end. Outside a chat it gets a leading space.

        z ends at the first trace_end, so one inside the rationale may not stay: where trace_end is white space
        (a newline) the lines are joined by spaces, otherwise UserError.
        """
        end = self.template.trace_end
        body = text.strip()
        if end.isspace():
            body = " ".join(part.strip() for part in body.split(end) if part.strip())
        elif end in body:
            raise UserError(
                f"template {self.template.name!r}: the rationale {body[:60]!r} holds trace_end {end!r}"
            )
        return self._encode(self._trace_text(body))

    @cached_property
    def empty_trace_ids(self) -> Ids:
        """z of length zero: trace_end alone, unless it merges into the prompt (see Template.empty_traces)."""
        return self._encode(self.empty_trace)

    @cached_property
    def cue_ids(self) -> Ids:
        return self._encode(self.template.cue)

    def answer_ids(self, text: str) -> Ids:
        """y as a target: answer_prefix + text + answer_end. An answer that holds answer_end is refused."""
        end = self.template.answer_end
        if end in text:
            raise UserError(
                f"template {self.template.name!r}: the answer {text[:60]!r} holds answer_end {end!r}, where a sampled "
                "answer would stop; use a template with another answer_end (chat)"
            )
        return self._encode(self._answer_text(text))

    # ---- where segments end, and reading them ----

    @cached_property
    def trace_stop(self) -> StopRule:
        return StopRule(strings=(self.template.trace_end,), eos=self._eos, eos_is_stop=False)

    @cached_property
    def answer_stop(self) -> StopRule:
        return StopRule(strings=(self.template.answer_end,), eos=self._eos, eos_is_stop=True)

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def parse_answer(self, completion_text: str) -> str | None:
        """The answer inside a sampled y: what stands before answer_end or an end token. None if nothing does."""
        text = completion_text
        for end in (self.template.answer_end, *(self.decode([i]) for i in self._eos)):
            text = text.partition(end)[0]
        return text.strip() or None

    def fingerprint(self) -> str:
        """16 hex digits that change when the ids of any prompt may change: vocabulary, template, shots."""
        template = self.template
        parts = {
            "vocabulary": sorted(self.tokenizer.get_vocab().items()),
            "probe": self._encode(_PROBE_TRACES[2] + template.trace_end + template.cue),
            "special": self._special_prefix,
            "template": [
                template.name, template.prior, template.posterior, template.cue, template.trace_end,
                template.answer_end, template.answer_prefix, template.empty_traces, template.chat, template.system,
                f"{template.question.__module__}.{template.question.__qualname__}",
            ],
            "shots": [(s.question, s.trace, s.answer) for s in template.shots[: self.shots]],
            "chat_template": self.tokenizer.chat_template if template.chat else None,
        }  # fmt: skip
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    # ---- text ----

    def _question(self, problem: Problem) -> str:
        if problem.images:
            raise UserError(f"problem {problem.id!r} has images; this prompt builder is for text only")
        return self.template.question(problem)

    def _prior_text(self, question: str) -> str:
        fill = self.template.fill_prior
        used = self.template.shots[: self.shots]
        return self._render([fill(s.question) for s in used], fill(question))

    def _posterior_text(self, question: str, hint: str) -> str:
        fill = self.template.fill_posterior
        used = self.template.shots[: self.shots]
        return self._render([fill(s.question, s.answer) for s in used], fill(question, hint))

    def _render(self, shot_prompts: Sequence[str], prompt: str) -> str:
        """Worked examples, then the prompt, up to where z begins."""
        t = self.template
        replies = [
            self._trace_text(s.trace) + t.cue + self._answer_text(s.answer) for s in t.shots[: self.shots]
        ]
        if not t.chat:
            return "".join(p + r + "\n" for p, r in zip(shot_prompts, replies, strict=True)) + prompt
        messages = [{"role": "system", "content": t.system}] if t.system is not None else []
        for shot_prompt, reply in zip(shot_prompts, replies, strict=True):
            messages += [{"role": "user", "content": shot_prompt}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": prompt})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _trace_text(self, body: str) -> str:
        """In a chat z opens the turn and its end tag has a line of its own; elsewhere z goes on behind a colon."""
        body = body.strip() + "\n" if self.template.chat else " " + body.strip()
        return body + self.template.trace_end

    def _answer_text(self, text: str) -> str:
        return self.template.answer_prefix + text + self.template.answer_end

    # ---- ids ----

    def _encode(self, text: str) -> Ids:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _prompt_ids(self, text: str) -> Ids:
        """A chat template writes its own start token; a plain prompt gets the tokenizer's."""
        return self._encode(text) if self.template.chat else (*self._special_prefix, *self._encode(text))

    @cached_property
    def _special_prefix(self) -> Ids:
        """Start tokens this tokenizer puts before a text (Llama 3: one, SmolLM2 and Qwen 2.5: none)."""
        plain, full = self._encode("a"), tuple(self.tokenizer.encode("a"))
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return full[:start]

    @cached_property
    def _eos(self) -> Ids:
        """Every id that ends a text: the tokenizer's own, and the end-of-turn tokens its vocabulary holds."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        vocabulary = self.tokenizer.get_vocab()
        ids = {vocabulary[t] for t in _END_TOKENS if t in vocabulary} & special
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return tuple(sorted(ids))

    # ---- the boundary check ----

    @cached_property
    def empty_trace(self) -> str:
        prompts = self._probe_prompts()
        candidates = [text + self.template.trace_end for text in self.template.empty_traces]
        for text in candidates:
            if all(self._joins(prompt, text) for prompt in prompts):
                return text
        raise self._merged("prompt|empty trace", prompts[0], candidates[-1])

    def _check_boundaries(self) -> None:
        """Probe every boundary; the errors name the first pair whose text changes its tokens when cut."""
        t = self.template
        traces = [self._trace_text(body) for body in (*(s.trace for s in t.shots), *_PROBE_TRACES)]
        prompts = self._probe_prompts()
        answers = [self._answer_text(a) for a in (*_PROBE_ANSWERS, *(s.answer for s in t.shots))]
        pairs = [("prompt|trace", prompt, trace) for prompt in prompts for trace in traces]
        # Behind a prompt that ends with a space, a trace would start with the bare word.
        pairs += [("prompt|trace", p, trace.lstrip()) for p in prompts if p.endswith(" ") for trace in traces]
        if t.cue:
            pairs += [("trace|cue", trace, t.cue) for trace in (*traces, self.empty_trace)]
            pairs += [("cue|answer", t.cue, answer) for answer in answers]
        else:
            pairs += [("trace|answer", traces[0], answer) for answer in answers]
        for boundary, left, right in pairs:
            if not self._joins(left, right):
                raise self._merged(boundary, left, right)

    def _probe_prompts(self) -> list[str]:
        question = self.template.shots[0].question if self.template.shots else "3 + 4"
        return [self._prior_text(question), self._posterior_text(question, "7")]

    def _joins(self, left: str, right: str) -> bool:
        return self._encode(left + right) == self._encode(left) + self._encode(right)

    def _merged(self, boundary: str, left: str, right: str) -> UserError:
        """The message shows the whole token that straddles the boundary, or says that a segment encodes differently."""
        joint, apart = self._encode(left + right), self._encode(left) + self._encode(right)
        same = next((i for i, (a, b) in enumerate(zip(joint, apart, strict=False)) if a != b), 0)
        token = self.decode([joint[min(same, len(joint) - 1)]])
        fix = {
            "prompt|trace": "let the prompt end without a space or newline, so that the trace brings its own",
            "prompt|empty trace": "give the template another text in empty_traces",
            "trace|cue": "let the cue start with a letter behind a trace_end that is a newline or a tag",
            "cue|answer": "let the cue end without a space, and answer_prefix begin with one",
            "trace|answer": "let answer_prefix begin with a space",
        }[boundary]
        return UserError(
            f"template {self.template.name!r}: the boundary {boundary} merges under this tokenizer: "
            f"{left[-12:]!r} | {right[:12]!r} shares the token {token!r}; {fix}"
        )
