"""The training bar, on stderr: stdout belongs to --json."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class StepProgress(TrainerCallback):
    """A bar over optimiser steps with the loss, the bound and the effective sample size of the step's window."""

    def __init__(self, row: Callable[[], dict[str, Any]]) -> None:
        self._row = row
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is None:
            return
        row = self._row()
        shown = {"phase": row.get("phase"), "bound": row.get("bound"), "ess": row.get("ess")}
        self._bar.set_postfix(
            {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in shown.items() if v is not None}
        )
        self._bar.update(1)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
