"""`optim: ivon` of a recipe: weights/ wired into traces/, which do not know each other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, from_dict
from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from ..traces.config import TraceConfig
    from ..traces.trainer import TraceTrainer
    from ..weights.ivon_recipe import IVONConfig

POSTERIOR = "posterior"
"""Folder of output_dir."""


def optimization_of(config: RunConfig) -> IVONOptimization | None:
    """What the config's `optim` asks for; None for the trainer's own. UserError for what does not go with it."""
    if config.trainer.get("optim") == "ivon":
        raise UserError("trainer.optim: ivon is written at the top level of the config: optim: ivon")
    if config.optim is None:
        return None
    from ..weights.ivon_recipe import IVONConfig

    for key, why in (
        (
            "rollout_ahead",
            "the next window would be sampled at one draw of the weights and trained at another",
        ),
        (
            "deepspeed",
            "DeepSpeed keeps the optimiser's state in partitions of its own; use FSDP2 or replicas",
        ),
        ("weight_decay", "the prior's strength is ivon.weight_decay"),
        ("optim", "the optimiser is named once"),
    ):
        if config.trainer.get(key):
            raise UserError(f"optim: ivon with trainer.{key} = {config.trainer[key]!r}: {why}")
    if config.adapter.get("full"):
        raise UserError("optim: ivon learns a posterior over an adapter: leave out adapter.full")
    return IVONOptimization(config, from_dict(IVONConfig, config.ivon or {}, "ivon"))


@dataclass(frozen=True)
class IVONOptimization:
    """`traces.run.Optimization` by IVON: a window is sampled, scored and differentiated at one draw of the weights."""

    config: RunConfig
    settings: IVONConfig

    def make(self, groups: list[dict[str, Any]], args: TraceConfig, problems: int) -> torch.optim.Optimizer:
        from ..weights.ivon_recipe import make_ivon

        return make_ivon(
            groups,
            self.settings,
            learning_rate=args.learning_rate,
            steps=args.max_steps,
            steps_per_window=args.steps_per_window(),
            data_size=problems,
            seed=self.config.seed,
        )

    def keep(self, trainer: TraceTrainer) -> dict[str, Any]:
        """OUTPUT_DIR/posterior, over the reasoner; and what it amounts to."""
        from ..weights import IVON, Posterior, diagnose

        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(optimizer, IVON)
        posterior = Posterior.from_optimizer(optimizer, trainer.adapted, "reasoner")
        found = diagnose(optimizer)  # of the first group, the reasoner's
        if trainer.ranks.main:
            folder = Path(self.config.output_dir) / POSTERIOR
            shutil.rmtree(folder, ignore_errors=True)  # of a run killed before its summary
            posterior.save(folder)
        trainer.ranks.wait()
        return {
            "posterior": {
                "updates": found.updates,
                "ess": optimizer.param_groups[0]["ess"],
                "temperature": found.temperature,
                "memory": found.memory,
                "sigma": found.sigma[2],
                "noise_to_weight": found.noise_to_weight[2],
                "hess_drift": found.hess_drift[2],
            }
        }
