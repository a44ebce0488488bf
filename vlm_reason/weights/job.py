"""What a method is given to fit a posterior, and what it gives back.

    method = BLoB(...)                       # a frozen dataclass of settings, with one method
    posterior, report = method.fit(job)

`Posterior`s are what was learnt; methods are how. A method may return any family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from ..errors import UserError, nearest
from .examples import Example
from .likelihoods import Likelihood
from .posterior import Posterior

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True)
class Training:
    """Gradient training of one adapter. A step is `batch_size` examples over all processes; the last batch of an epoch
    is smaller, never dropped. weight_decay: AdamW's, as the MAP baseline has it. schedule: a name of transformers' (
    linear, cosine, constant, ...). max_grad_norm: 0 for no clipping. tokens_per_microbatch: memory and speed, never
    the result."""

    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_share: float = 0.06
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 200
    tokens_per_microbatch: int = 8192

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise UserError(f"training.epochs must be > 0, got {self.epochs}")
        if self.batch_size < 1:
            raise UserError(f"training.batch_size must be >= 1, got {self.batch_size}")
        if not self.learning_rate > 0:
            raise UserError(f"training.learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"training.warmup_share must be in [0, 1], got {self.warmup_share}")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"training.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("save_steps", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be >= 1, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"training.schedule: unknown {self.schedule!r}{nearest(self.schedule, SCHEDULES)}"
            )


@dataclass(frozen=True)
class Job:
    """model: the base with one trainable adapter `adapter`; a method trains that adapter in place and leaves the mean
    of what it returns in it. train, held_out: examples. start: a posterior to go on from (post-hoc methods use its
    mean; in continual learning it is the prior). output_dir: where checkpoints go; None keeps none."""

    model: PeftModel
    train: Sequence[Example]
    likelihood: Likelihood
    training: Training = field(default_factory=Training)
    held_out: Sequence[Example] = ()
    start: Posterior | None = None
    seed: int = 0
    adapter: str = "default"
    output_dir: Path | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("no training examples: a posterior needs data")


@dataclass(frozen=True)
class FitReport:
    """method: name; family: of the posterior; examples N; steps; seconds; train_nll: nats an example,
    None where not computed: for methods that train the mean of what they minimised over the last tenth of the steps
    (its penalties included), for laplace, core and vbll the mean of -log p(y) over the examples at the mean of the
    posterior; not for comparing methods. held_out_nll: of the predictive; details: the method's own, JSON-able."""

    method: str
    family: str
    examples: int
    steps: int
    seconds: float
    train_nll: float | None = None
    held_out_nll: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A frozen dataclass; `methods.METHODS` maps names to these classes."""

    def fit(self, job: Job) -> tuple[Posterior, FitReport]: ...
