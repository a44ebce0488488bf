"""From the problems of a config to examples and their likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import from_dict
from ..errors import UserError
from ..tasks.prompts import PromptBuilder
from ..tasks.sources import TaskSpec, held_out, load_problems
from ..types import Problem
from .config import BayesConfig
from .examples import Example, choice_examples
from .likelihoods import Choice, Likelihood, Tokens


@dataclass(frozen=True)
class Data:
    """labels: names of the classes; empty where the target is text."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    test: tuple[Example, ...]
    likelihood: Likelihood
    labels: tuple[str, ...] = ()


def load_data(config: BayesConfig, builder: PromptBuilder, note: Callable[[str], None]) -> Data:
    """Problems of held_out and eval_task whose question is trained on are left out, and `note` is told how many. One
    set of label tokens serves all three. UserError where nothing is left, and as `choice_examples`."""
    if not config.task:
        raise UserError("the config has no section 'task': it names the problems to train on")
    train = _problems(config.task, "task")
    later = [_kept(getattr(config, name), name, train, note) for name in ("held_out", "eval_task")]
    everything = [*train, *later[0], *later[1]]
    labels: tuple[str, ...] = ()
    likelihood: Likelihood
    if config.likelihood == "choice":
        choices = choice_examples(everything, builder)
        examples, likelihood, labels = list(choices.examples), Choice(choices.label_ids), choices.names
    else:
        examples, likelihood = token_examples(everything, builder), Tokens()
    ends = len(train), len(train) + len(later[0])
    return Data(
        tuple(examples[: ends[0]]), tuple(examples[ends[0] : ends[1]]), tuple(examples[ends[1] :]), likelihood, labels
    )  # fmt: skip


def token_examples(problems: Sequence[Problem], builder: PromptBuilder) -> list[Example]:
    """prompt + rationale + cue + answer, predicted from behind the prompt; without a rationale prompt + empty trace +
    cue + answer, predicted from behind the cue."""
    examples = []
    for problem in problems:
        rationale = str(problem.metadata.get("rationale") or "").strip()
        before = builder.prior_ids(problem) if rationale else builder.direct_ids(problem)
        behind = (*builder.trace_ids(rationale), *builder.cue_ids) if rationale else ()
        ids = (*before, *behind, *builder.answer_ids(problem.answer))
        examples.append(Example(problem.id, ids, len(before)))
    return examples


def _problems(section: dict[str, Any], name: str) -> list[Problem]:
    return load_problems(from_dict(TaskSpec, section, name))


def _kept(
    section: dict[str, Any] | None, name: str, train: Sequence[Problem], note: Callable[[str], None]
) -> list[Problem]:
    if not section:
        return []
    problems = _problems(section, name)
    kept = held_out(problems, train)
    if len(kept) < len(problems):
        note(
            f"{len(problems) - len(kept)} of {len(problems)} problems of {name} left out: repeated or trained on"
        )
    if not kept:
        raise UserError(f"every problem of {name!r} is trained on too: name other problems")
    return kept
