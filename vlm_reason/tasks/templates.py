"""Prompt templates: the text around the trace z and the answer y, written once for the prior and for the posterior.

    prior prompt      prior(question)                 z  trace_end   cue   y  answer_end
    posterior prompt  posterior(question, hint)       z  trace_end   cue   y  answer_end

Only the prompt differs between the two, so a trace drawn behind one can be scored behind the other, token by token.
A template is data; `prompts.PromptBuilder` turns it into token ids and refuses it where a boundary would merge.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError, nearest
from ..types import Problem
from .rows import LETTERS

QuestionFormat = Callable[[Problem], str]


@dataclass(frozen=True)
class Shot:
    """A worked example. `question` is already formatted; `trace` is z without its trace_end."""

    question: str
    trace: str
    answer: str


def plain_question(problem: Problem) -> str:
    """Context, question, and what may be answered, if the data say it. Fits any task."""
    parts = [str(problem.metadata["context"])] if problem.metadata.get("context") else []
    parts.append(problem.question.strip())
    if problem.metadata.get("choices"):
        parts.append(_lettered(problem.metadata["choices"]))
    if problem.metadata.get("labels"):
        parts.append("Labels: " + ", ".join(problem.metadata["labels"]))
    return "\n".join(parts)


_CHAIN_SUM = re.compile(
    r"\s*State the final answer to the following arithmetic problem:\s*(?P<bare>.+?)\s*=?\s*"
)
_CALCULATE = re.compile(r"\s*Calculate\s+(?P<bare>.+?)\s*\.?\s*")
_BARE = re.compile(r"[\d\s.+*/()-]*\d[\d\s.+*/()-]*")


def bare_expression(problem: Problem) -> str:
    """The expression without the generator's boilerplate: `58 + 26` (reasoning-gym chain_sum, basic_arithmetic)."""
    question = problem.question.strip()
    for pattern in (_CHAIN_SUM, _CALCULATE):
        if match := pattern.fullmatch(question):
            question = match["bare"]
    if not _BARE.fullmatch(question):
        raise UserError(
            f"template 'arithmetic' needs a bare expression such as '58 + 26'; problem {problem.id!r} asks "
            f"{problem.question[:80]!r}; use the template 'steps'"
        )
    return question


def lettered_choices(problem: Problem) -> str:
    """The question with its choices as `A) ...` lines."""
    if not problem.metadata.get("choices"):
        raise UserError(
            f"template 'choices' needs problems with choices; {problem.id!r} has none; use the template 'steps'"
        )
    return plain_question(problem)


def bare_text(problem: Problem) -> str:
    """What is to be classified, on one line, without the list of labels: short prompts, for models trained on them."""
    return " ".join(problem.question.split())


def _lettered(choices: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


@dataclass(frozen=True)
class Template:
    """Everything around z and y.

    prior          text before z when the answer is unknown; holds {question}. With chat: the user's message.
    posterior      the same, revealing a hint; holds {question} and {hint}.
    cue            text between z and y, given, never sampled
    trace_end      closes z; part of z, sampled by the model
    answer_end     closes y; part of y
    answer_prefix  what y begins with; part of y. A space here keeps the boundary cue|y from merging.
    empty_traces   texts (before trace_end) that may stand for "no trace". The literal empty one comes first; a
                   tokenizer that would merge trace_end into the end of the prompt takes the next.
    shots          worked examples; the caller says how many are used
    chat           render through the tokenizer's chat template, with `system` if given
    question       how a problem becomes the text of {question}
    """

    name: str
    prior: str
    posterior: str
    cue: str
    trace_end: str = "\n"
    answer_end: str = "\n"
    answer_prefix: str = " "
    empty_traces: tuple[str, ...] = ("", " None.")
    shots: tuple[Shot, ...] = ()
    chat: bool = False
    system: str | None = None
    question: QuestionFormat = plain_question

    def __post_init__(self) -> None:
        for field, text, slots in (
            ("prior", self.prior, ("{question}",)),
            ("posterior", self.posterior, ("{question}", "{hint}")),
        ):
            for slot in slots:
                if text.count(slot) != 1:
                    raise UserError(f"template {self.name!r}: {field} must hold {slot} once, got {text!r}")
        if "{hint}" in self.prior:
            raise UserError(
                f"template {self.name!r}: prior must not hold {{hint}}: it would reveal the answer"
            )
        for field in ("trace_end", "answer_end"):
            if not getattr(self, field):
                raise UserError(f"template {self.name!r}: {field} is empty, so the segment could never end")
        for shot in self.shots:
            if self.trace_end in shot.trace or self.answer_end in shot.answer:
                raise UserError(
                    f"template {self.name!r}: the shot {shot.question[:40]!r} holds its own end marker"
                )
        if not self.empty_traces:
            raise UserError(f"template {self.name!r}: empty_traces needs at least one text ('' for none)")

    def fill_prior(self, question: str) -> str:
        return self.prior.replace("{question}", question)

    def fill_posterior(self, question: str, hint: str) -> str:
        """Both slots in one pass, so that a question containing '{hint}' stays as it is."""
        texts = {"{question}": question, "{hint}": hint}
        return re.sub(r"\{question\}|\{hint\}", lambda slot: texts[slot[0]], self.posterior)


STEPS = Template(
    name="steps",
    prior="Problem: {question}\nSteps:",
    posterior="Problem: {question}\nKnown answer: {hint}\nSteps:",
    cue="Answer:",
    shots=(
        Shot(
            "A box holds 6 pens. Ana buys 4 boxes and gives away 5 pens. How many pens are left?",
            " 4 boxes hold 4 * 6 = 24 pens. After giving away 5 there are 24 - 5 = 19 left.",
            "19",
        ),
        Shot(
            "Is every square a rectangle? Answer yes or no.",
            " A rectangle has four right angles. A square has four right angles too.",
            "yes",
        ),
        Shot(
            "A train leaves at 9:40 and rides for 35 minutes. When does it arrive?",
            " 20 minutes after 9:40 it is 10:00. 35 - 20 = 15 minutes remain.",
            "10:15",
        ),
    ),
)

ARITHMETIC = Template(
    name="arithmetic",
    prior="Problem: {question}\nSteps:",
    posterior="Problem: {question} = {hint}\nSteps:",
    cue="Answer:",
    shots=(
        Shot("47 + 35", " 47 + 35 = 82.", "82"),
        Shot("47 + 35 - 6", " 47 + 35 = 82. 82 - 6 = 76.", "76"),
        Shot("7 - 31", " 7 - 31 = -24.", "-24"),
        Shot("4 - 19 + 62", " 4 - 19 = -15. -15 + 62 = 47.", "47"),
    ),
    question=bare_expression,
)

CHOICES = Template(
    name="choices",
    prior="Question: {question}\nReasoning:",
    posterior="Question: {question}\nRight choice: {hint}\nReasoning:",
    cue="Answer:",
    shots=(
        Shot(
            "Which of these melts in the sun?\nA) a stone\nB) an ice cube\nC) a spoon",
            " The sun warms things. Ice turns into water when it gets warm.",
            "B",
        ),
        Shot(
            "Where would you look up what a word means?\nA) an atlas\nB) a cookbook\nC) a calendar\nD) a dictionary",
            " Meanings of words are listed in a dictionary.",
            "D",
        ),
        Shot(
            "What does a plant need to make its food?\nA) sunlight\nB) sand\nC) wind\nD) noise",
            " Plants make food by photosynthesis, which is driven by light.",
            "A",
        ),
    ),
    question=lettered_choices,
)

LABELS = Template(
    name="labels",
    prior="Text: {question}\nReasoning:",
    posterior="Text: {question}\nRight label: {hint}\nReasoning:",
    cue="Label:",
    shots=(
        Shot(
            "the soup was cold and nobody came to ask how it was",
            " Cold food and no service are faults.",
            "negative",
        ),
        Shot("an evening i would gladly have again", " Wanting it again says that it was good.", "positive"),
    ),
    question=bare_text,
)

# The trace is closed by the first half of the answer tag and the cue is the second half: whole tags would merge with
# what follows under the pre-tokenisers of Llama 3 and Qwen. Any instruct model can follow it.
CHAT = Template(
    name="chat",
    prior=(
        "{question}\n\nThink step by step. Then write the final answer, and nothing else, between <answer> and "
        "</answer>."
    ),
    posterior=(
        "{question}\n\nThe final answer is known to be: {hint}\n\nWrite the step by step reasoning that leads from the "
        "question to it, as if it were not known. Then write the final answer, and nothing else, between <answer> and "
        "</answer>."
    ),
    cue=">",
    trace_end="<answer",
    answer_end="</answer>",
    shots=STEPS.shots[:2],
    chat=True,
)

TEMPLATES: dict[str, Template] = {t.name: t for t in (STEPS, ARITHMETIC, CHOICES, LABELS, CHAT)}


def template_named(name: str) -> Template:
    """The built-in template called `name`. UserError with the nearest name if there is none."""
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]
