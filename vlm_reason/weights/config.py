"""BayesConfig: a run that fits a posterior over an adapter and predicts with it, as one file (`kind: bayes`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..config import check_run_keys, from_dict
from ..errors import UserError, nearest
from ..models.adapters import AdapterConfig
from .job import Method, Training
from .predictive.predict import LINKS, MODES


@dataclass(frozen=True)
class Prediction:
    """n: draws. mode, link: see `Posterior.predictive`. antithetic: draws in opposite pairs. tokens: of one forward
    pass, padding included; memory and speed, never the result."""

    n: int = 10
    mode: str = "auto"
    link: str = "mc"
    antithetic: bool = False
    tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("n", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"predictive.{name} must be >= 1, got {getattr(self, name)}")
        if self.mode not in MODES:
            raise UserError(f"predictive.mode: unknown {self.mode!r}{nearest(self.mode, MODES)}")
        if self.link not in LINKS:
            raise UserError(f"predictive.link: unknown {self.link!r}{nearest(self.link, LINKS)}")


@dataclass(frozen=True)
class BayesConfig:
    """kind        bayes
    model       hub id, folder, or a built-in alias; dtype: of the base model, the adapter is float32
    task        training problems; held_out: problems that methods choose by (a temperature, a width); eval_task:
                problems that are predicted at the end. The last two may be left out
    template    how a problem becomes a prompt; shots: worked examples in it
    likelihood  choice: one of C label tokens behind the prompt. tokens: the reference answer, and before it the
                rationale where the data have one
    adapter     the keys of AdapterConfig
    method      name in `weights.METHODS`; options: its settings
    start       folder of a posterior to go on from; null begins with a new adapter
    training    the keys of Training
    predictive  the keys of Prediction
    """

    kind: Literal["bayes"] = "bayes"
    model: str = "smollm2-135m"
    dtype: str = "float32"
    task: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] | None = None
    eval_task: dict[str, Any] | None = None
    template: str | dict[str, Any] = "choices"
    shots: int = 0
    likelihood: Literal["choice", "tokens"] = "choice"
    adapter: dict[str, Any] = field(default_factory=dict)
    method: str = "map"
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    predictive: dict[str, Any] = field(default_factory=dict)
    output_dir: str = "runs/bayes"
    seed: int = 0

    def __post_init__(self) -> None:
        check_run_keys(self.shots, self.seed, self.output_dir)

    # ---- the sections, checked and typed

    def method_settings(self) -> Method:
        return method_named(self.method, self.options)

    def adapter_settings(self) -> AdapterConfig:
        default = {"r": 8, "alpha": 16, "target_modules": ("q_proj", "v_proj"), "seed": self.seed}
        return from_dict(AdapterConfig, {**default, **self.adapter}, "adapter")

    def training_settings(self) -> Training:
        return from_dict(Training, self.training, "training")

    def prediction_settings(self) -> Prediction:
        return from_dict(Prediction, self.predictive, "predictive")


def method_named(name: str, options: Mapping[str, Any]) -> Method:
    """UserError for a method or an option that there is not."""
    from .methods import METHODS

    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    known = [f.name for f in fields(METHODS[name])]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            hint = nearest(key, known)
            if "did you mean" not in hint:
                hint = f" of method {name!r}{hint}; options={{}} drops the settings of another method"
            raise UserError(f"unknown config key 'options.{key}'{hint}")
    return from_dict(METHODS[name], options, "options")
