"""What a comparison of methods is: sets of classification problems, methods with their settings, seeds.

suite = from_dict(WeightSuite, load_config("evals/suites/bayes_lora.yaml", ["data=DATA"]))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...config import from_dict
from ...errors import UserError, nearest
from ...models.adapters import AdapterConfig
from ...tasks.sources import TaskSpec
from ...weights.job import Method, Training
from ...weights.methods import METHODS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SetEntry:
    """One data set. Every seed trains on another `train` problems of `task`, chosen at random, and keeps `held_out`
    more for methods that calibrate; all are tested on the first `test` problems of `eval_task`.

    labels         class names, for generators whose answers are few (the problems' answers are among them)
    template       how a problem becomes a prompt
    out_of_domain  name of another set: its first `test` test problems, asked with this set's prompt and labels
    training       what differs from the suite's
    """

    task: TaskSpec
    eval_task: TaskSpec
    train: int = 100
    held_out: int = 40
    test: int = 200
    labels: tuple[str, ...] = ()
    template: str | dict[str, Any] = "labels"
    out_of_domain: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class MethodEntry:
    """method: a name in `vlm_reason.weights.METHODS`; options: its settings; start: another entry whose posterior it
    begins from (fitted once a set and seed); n, mode: of its predictive; training: what differs from the set's."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    n: int = 8
    mode: str = "auto"
    training: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Method:
        return from_dict(METHODS[self.method], self.options, f"options of {self.method}")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}{nearest(self.method, METHODS)}")
        self.build()


@dataclass(frozen=True)
class WeightSuite:
    """sets, methods by name; `reference`: the method others are compared with, pair by pair; seeds: of adapters,
    training data and their order; data: what {data} stands for in names of tasks; only: run these sets alone (their
    table has what else is already in output_dir)."""

    sets: dict[str, SetEntry]
    methods: dict[str, MethodEntry]
    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = "map"
    data: str | None = None
    only: tuple[str, ...] = ()
    output_dir: str = "runs/weight_suite"

    def __post_init__(self) -> None:
        for kind, names in (("set", self.sets), ("method", self.methods)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise UserError(f"name of a {kind}: letters, digits, '_', '-', '.', got {name!r}")
        if not self.sets or not self.methods or not self.seeds:
            raise UserError("a comparison needs at least one set, one method and one seed")
        self._known("reference", self.reference, self.methods)
        order = list(self.methods)
        for name, method in self.methods.items():
            if method.start is not None:
                self._known(f"methods.{name}.start", method.start, self.methods)
                if order.index(method.start) >= order.index(name):
                    raise UserError(f"methods.{name}.start: {method.start!r} must stand before it")
        for name, entry in self.sets.items():
            if entry.out_of_domain is not None:
                self._known(f"sets.{name}.out_of_domain", entry.out_of_domain, self.sets)
        for name in self.only:
            self._known("only", name, self.sets)
        for where in (
            {},
            *(e.training for e in self.sets.values()),
            *(m.training for m in self.methods.values()),
        ):
            from_dict(Training, {**self.training, **where}, "training")

    def training_of(self, entry: SetEntry, method: MethodEntry) -> Training:
        return from_dict(Training, {**self.training, **entry.training, **method.training}, "training")

    def task(self, spec: TaskSpec) -> TaskSpec:
        """With {data} replaced. UserError where it stands in a name and `data` was not given."""
        if "{data}" not in spec.name:
            return spec
        if self.data is None:
            raise UserError(f"task {spec.name!r}: say where the data are (data=FOLDER)")
        return replace(spec, name=spec.name.replace("{data}", self.data))

    @staticmethod
    def _known(key: str, name: str, names: Mapping[str, Any]) -> None:
        if name not in names:
            raise UserError(f"{key}: {name!r} is not there{nearest(name, names)}")
