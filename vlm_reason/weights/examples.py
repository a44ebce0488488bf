"""What a posterior is fitted on and asked about: sequences of token ids with a target, padded on the right.

A causal model never looks right, so a batch padded there needs no attention mask; `last` says where each row ends.

    problems -> choice_examples(problems, builder) -> Choices: one prompt an example, the target one of C label tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..tasks.prompts import PromptBuilder
from ..tasks.rows import LETTERS
from ..types import Problem

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """ids: the whole sequence. target: what a likelihood wants: the index of the right label; a number; the position
    in `ids` from which tokens are predicted (token likelihood). rejected: the other sequence of a preference pair."""

    id: str
    ids: Ids
    target: float = 0
    rejected: Ids = ()


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. input_ids [B, T]; last [B]: position of the last token of each row; target [B].
    rejected: the same of the other half of preference pairs."""

    ids: tuple[str, ...]
    input_ids: Tensor
    last: Tensor
    target: Tensor
    rejected: Batch | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Sequence[int]) -> Batch:
        """These rows, in this order, without the padding that none of them needs."""
        at = torch.tensor(index, device=self.last.device)
        width = int(self.last[at].max()) + 1
        rejected = None if self.rejected is None else self.rejected.rows(index)
        names = tuple(self.ids[i] for i in index)
        return Batch(names, self.input_ids[at, :width], self.last[at], self.target[at], rejected)

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "last", "target")}
        return replace(self, **moved, rejected=None if self.rejected is None else self.rejected.to(device))


def make_batch(examples: Sequence[Example], pad: int = 0) -> Batch:
    """UserError without examples, for one without tokens, and where only some have a `rejected`."""
    if not examples:
        raise UserError("no examples: a batch needs at least one")
    empty = [e.id for e in examples if not e.ids]
    if empty:
        raise UserError(f"example {empty[0]!r} has no tokens")
    names = tuple(e.id for e in examples)
    targets = torch.tensor([e.target for e in examples])
    rejected = None
    if any(e.rejected for e in examples):
        single = [e.id for e in examples if not e.rejected]
        if single:
            raise UserError(f"example {single[0]!r} has no rejected sequence, others of its batch have one")
        rejected = _padded(names, [e.rejected for e in examples], targets, pad, None)
    return _padded(names, [e.ids for e in examples], targets, pad, rejected)


def _padded(
    names: tuple[str, ...], rows: Sequence[Ids], targets: Tensor, pad: int, rejected: Batch | None
) -> Batch:
    sizes = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(sizes.max())), pad)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    return Batch(names, ids, sizes - 1, targets, rejected)


def in_batches(examples: Sequence[Example], tokens: int = 4096, rows: int = 64) -> Iterator[Batch]:
    """All examples in batches of at most `rows` rows and, padding included, `tokens` tokens (one row at least), longest
    first. Use `Batch.ids` to put results back in order."""
    queue = sorted(range(len(examples)), key=lambda n: (-len(examples[n].ids), n))
    while queue:
        longest = len(examples[queue[0]].ids)
        size = max(1, min(rows, tokens // longest))
        yield make_batch([examples[n] for n in queue[:size]])
        queue = queue[size:]


@dataclass(frozen=True)
class Choices:
    """Examples of one task with the C label tokens: label c of every example is token `label_ids[c]`."""

    examples: tuple[Example, ...]
    label_ids: Ids
    names: tuple[str, ...]


def choice_examples(problems: Sequence[Problem], builder: PromptBuilder) -> Choices:
    """Prompt + empty trace + cue as the sequence, and one token a label behind it: the letter of a choice, or the first
    token of a class name where these differ from one another, else a letter. Tokens that all labels begin with (a space
    of its own, in some vocabularies) belong to the sequence.

    UserError for problems that are neither multiple choice nor classification or do not share their classes, for
    labels that are not told apart by the tokenizer, and for no problems at all.
    """
    if not problems:
        raise UserError("no problems to make examples of: give at least one")
    count = max(_label_count(p) for p in problems)
    metadata = problems[0].metadata
    classes: tuple[str, ...] = tuple(metadata.get("labels", ())) if not metadata.get("choices") else ()
    names = classes or tuple(LETTERS[:count])
    found = _first_tokens(builder, names) or _first_tokens(builder, tuple(LETTERS[: len(names)]))
    if found is None:
        raise UserError(
            f"the tokenizer does not tell the labels {', '.join(names)} apart by a token, nor A, B, ..."
        )
    begun, ids = found
    examples = tuple(
        Example(p.id, (*builder.direct_ids(p), *begun), _label_index(p, names)) for p in problems
    )
    return Choices(examples, ids, names)


def _label_count(problem: Problem) -> int:
    found: Any = problem.metadata.get("choices") or problem.metadata.get("labels")
    if not found:
        raise UserError(
            f"problem {problem.id!r} has neither choices nor labels: no labels to be uncertain about"
        )
    return len(found)


def _label_index(problem: Problem, names: Sequence[str]) -> int:
    if problem.answer not in names:
        raise UserError(f"problem {problem.id!r}: answer {problem.answer!r} is none of {', '.join(names)}")
    return list(names).index(problem.answer)


def _first_tokens(builder: PromptBuilder, names: Sequence[str]) -> tuple[Ids, Ids] | None:
    """(what all of them begin with, the token behind it of each); None where two share that token too."""
    texts = [builder.answer_ids(name) for name in names]
    if len(set(texts)) < len(texts):
        return None
    shared = 0
    while len({ids[: shared + 1] for ids in texts}) == 1 and len(texts) > 1:
        shared += 1
    if any(len(text) == shared for text in texts):  # one is how others begin
        return None
    ids = tuple(text[shared] for text in texts)
    return (texts[0][:shared], ids) if len(set(ids)) == len(ids) else None
