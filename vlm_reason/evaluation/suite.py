"""A suite: several tasks with their prompts, verifiers and sampling, and the model to run them with.

    suite = from_dict(SuiteConfig, load_config("evals/suites/arithmetic.yaml", ["model=runs/m"]))

One YAML file, checked as every config is: an unknown key is an error that names the nearest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..config import from_dict
from ..errors import UserError
from ..tasks.sources import TaskSpec
from .harness import EvalConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TaskEntry:
    """One task of a suite: where its problems come from (`task`), how they are asked (`template`, `shots`), what is
    right (`verifier`), and what of `sampling` differs from the suite's."""

    task: TaskSpec
    template: str | dict[str, Any] = "steps"
    shots: int = 0
    verifier: str = "auto"
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What a run may spend; None is no limit. Each task may use an equal share of the tokens and seconds that the tasks
    before it left.

    tokens    sampled in all, stored ones included, so that a restarted run stops at the same problem. Never exceeded: a
              problem is begun only if its longest possible samples still fit.
    seconds   of this call; looked at between chunks, so the last chunk may overrun
    problems  of each task, the first so many
    """

    tokens: int | None = None
    seconds: float | None = None
    problems: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds", "problems"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"budget.{name} must be > 0, got {value}")


@dataclass(frozen=True)
class Draws:
    """`draws` members drawn from the posterior in the folder `posterior` (`weights.Posterior.save`): draws 0, 1, ... of
    `seed`, variances divided by `temper` first."""

    posterior: str
    draws: int
    seed: int = 0
    temper: float = 1.0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"draws must be >= 1, got {self.draws}")
        if self.seed < 0:
            raise UserError(f"seed must be >= 0, got {self.seed}")
        if not 0 < self.temper < math.inf:
            raise UserError(f"temper must be > 0, got {self.temper}")


@dataclass(frozen=True)
class SuiteConfig:
    """A suite and the model it is run with.

    suite         its name, which results carry
    tasks         name -> task; names are folders of output_dir
    model, dtype, engine   as in a training recipe
    members       M samples of a weight posterior: PEFT adapter folders, draws from posteriors, or folders of whole
                  models; none: `model` as it is. The folder of a posterior alone is its mean
    data          folder that relative file names of `jsonl` tasks start from
    sampling      EvalConfig's keys, for every task
    rank          how the samples of a problem become one answer (vlm_reason.ranking.METHODS)
    long_prompts  prompts that do not fit the context with the longest trace and answer. refuse: an error before
                  anything is drawn; wrong: never drawn, counted as wrong and listed. None is ever cut.
    """

    suite: str
    tasks: dict[str, TaskEntry]
    model: str = "smollm2-135m"
    dtype: str = "float32"
    members: tuple[str | Draws, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    data: str = "data"
    sampling: dict[str, Any] = field(default_factory=dict)
    rank: str = "majority"
    budget: Budget = Budget()
    long_prompts: Literal["refuse", "wrong"] = "refuse"
    output_dir: str = "runs/eval"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("tasks is empty: name at least one task")
        for name in (self.suite, *self.tasks):
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"the name {name!r} must be letters, digits, '_', '.' and '-', for it names a folder"
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {self.seed}")
        named = [m if isinstance(m, str) else f"{m.posterior} with seed {m.seed}" for m in self.members]
        if len(set(named)) < len(named):
            raise UserError(f"members names a folder twice: {', '.join(named)}; each sample counts once")

    @property
    def models(self) -> int:
        """How many models are run: M, or 1."""
        return max(1, sum(1 if isinstance(m, str) else m.draws for m in self.members))

    def sampling_of(self, task: str) -> EvalConfig:
        """The suite's sampling with the task's own keys over it."""
        merged = {**self.sampling, **self.tasks[task].sampling}
        if "adapter" in merged:
            raise UserError(
                "sampling.adapter has no meaning in a suite: give the adapter's folder in members"
            )
        return from_dict(EvalConfig, {"seed": self.seed, **merged}, f"tasks.{task}.sampling")

    def problems_of(self, task: str) -> TaskSpec:
        """Where the problems come from, with `data` in front of a relative file name."""
        spec = self.tasks[task].task
        if spec.kind != "jsonl" or Path(spec.name).expanduser().is_absolute():
            return spec
        return replace(spec, name=str(Path(self.data).expanduser() / spec.name))
