"""IVON under anybody's `transformers.Trainer`: train at draws, evaluate and save at the mean.

optimizer = IVON(model.parameters(), lr=0.1, ess=len(data))
trainer = Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None),
                  callbacks=[IVONCallback()])
trainer.train()                                    # afterwards the model holds the mean
Posterior.from_optimizer(optimizer, model)         # of an adapter
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from .ivon import IVON


class IVONCallback(TrainerCallback):
    """From the end of a step that is evaluated or saved until the next step begins, the parameters hold the posterior's
    mean, and so does a checkpoint's model; resuming from it puts the draw of that time in place. When training is over
    they hold the mean too, or what load_best_model_at_end put there.

    Give it as the last of the callbacks: one behind it that asks for an evaluation would get it at a draw. It decides
    nothing else: learning rates, clipping and accumulation are the Trainer's. UserError at the start of training with
    another optimiser.
    """

    def __init__(self) -> None:
        self._view: AbstractContextManager[None] | None = None
        self._optimizer: IVON | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self._back_to_the_draw()
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(inner, IVON):
            raise UserError(
                f"IVONCallback needs Trainer(optimizers=(IVON(...), None)); the optimiser is {type(inner).__name__}"
            )
        self._optimizer = inner
        if args.eval_on_start:
            self._publish_the_mean()

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._back_to_the_draw()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._publish_the_mean()

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._publish_the_mean()

    def _publish_the_mean(self) -> None:
        if self._view is None and self._optimizer is not None:
            self._view = self._optimizer.mean()
            self._view.__enter__()

    def _back_to_the_draw(self) -> None:
        if self._view is not None:
            view, self._view = self._view, None
            view.__exit__(None, None, None)
