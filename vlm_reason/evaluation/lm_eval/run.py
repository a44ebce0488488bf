"""Run lm-eval tasks on one of our models, and keep what each member and each rationale said.

A task is a YAML file, a name that lm-eval (or a folder of YAML files, `include`) knows, or `reasoning_gym/NAME`.
Looking through lm-eval's own 14,000 names takes half a minute, so it is done only for a name that is found nowhere
else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from ...errors import UserError
from ...store import SampleStore
from ...tasks.sources import TaskSpec
from .model import VLMReasonLM
from .samples import records
from .tasks import PREFIX, task_of


@dataclass(frozen=True)
class RunOptions:
    """limit: items a task, the first ones. shots: few-shot examples, None for the task's own number. chat: through the
    tokenizer's chat template, with `system` if given. generation: over the tasks' generation_kwargs. include: folder of
    more YAML tasks. problems: how many of a reasoning-gym generator. samples: folder of the sample store."""

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    include: str | None = None
    problems: int = 100
    samples: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("shots", 0), ("problems", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be >= {least}, got {value}")


class Manager(TaskManager):
    """lm-eval's, and the tasks it loaded last. What it raises for a task that cannot be had is of many kinds."""

    tasks: dict[str, ConfigurableTask]

    def load(self, *arguments: Any, **options: Any) -> Any:
        try:
            found = super().load(*arguments, **options)
        except UserError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"lm-eval cannot load the tasks ({type(error).__name__}: {said}); without a network, a task "
                "reads local files (dataset_path: json, dataset_kwargs: {data_files: ...})"
            ) from error
        self.tasks = found["tasks"]
        return found


def run(lm: VLMReasonLM, names: Sequence[str], options: RunOptions = RunOptions()) -> dict[str, Any]:
    """lm-eval's results. With `options.samples` every item's records are in that store afterwards. UserError for an
    unknown task and for one whose data cannot be had."""
    wanted, known = choose_tasks(names, options.include, options.problems, options.seed)
    manager = Manager(include_path=options.include, include_defaults=not known)
    _check_names(wanted, manager)
    lm.kept.clear()
    results = simple_evaluate(
        model=lm,
        tasks=wanted,
        task_manager=manager,
        limit=options.limit,
        num_fewshot=options.shots,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        system_instruction=options.system,
        gen_kwargs=dict(options.generation) or None,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    assert results is not None  # None is for processes of a rank above 0
    if options.samples is not None:
        with SampleStore(options.samples) as store:
            store.append(records(lm, results["samples"], manager.tasks))
    return dict(results)


def choose_tasks(
    names: Sequence[str], include: str | None, problems: int, seed: int
) -> tuple[list[Any], bool]:
    """What lm-eval is given for each name, and whether it can do without looking through its own tasks."""
    local = _included(include)
    wanted: list[Any] = []
    known = True
    for name in names:
        if name.startswith(PREFIX):
            generator = name.removeprefix(PREFIX)
            wanted.append(task_of(TaskSpec("reasoning_gym", generator, size=problems, seed=seed)))
        elif name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise UserError(f"task file {name!r} does not exist")
            wanted.append(str(Path(name).absolute()))
        else:
            wanted.append(name)
            known = known and name in local
    return wanted, known


def _included(folder: str | None) -> set[str]:
    """Names of the tasks in a folder of YAML files."""
    if folder is None:
        return set()
    if not Path(folder).is_dir():
        raise UserError(f"include: no folder {folder!r}")
    return set(TaskManager(include_path=folder, include_defaults=False).all_tasks)


def _check_names(wanted: Sequence[Any], manager: TaskManager) -> None:
    for name in wanted:
        if isinstance(name, str) and not name.endswith((".yaml", ".yml")) and not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists them all"
            raise UserError(f"lm-eval has no task {name!r}; {hint}")
