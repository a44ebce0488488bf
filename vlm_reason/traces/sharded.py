"""How `transformers.Trainer` trains in several processes here: who wraps, shards, saves and loads.

Nothing of this knows what is trained on. transformers and accelerate start the processes and hold the schedule; the
sharding is ours or DeepSpeed's (parallel.py), and a checkpoint is in every case what one process would have written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..compat.deepspeed import own_the_boundary
from ..errors import UserError
from ..models.adapters import (
    AdapterConfig,
    adapter_parameters,
    load_adapters,
    save_adapters,
    trainable,
)
from ..models.sharding import load_weights, shard_fully, whole_parameters
from .checkpoint import load_optimizer, save_optimizer
from .config import TraceConfig
from .distributed import Ranks
from .parallel import Parallel, Replica, at_mean, make_parallel, one_group_an_adapter

OptimizerFactory = Callable[[list[dict[str, Any]], TraceConfig], torch.optim.Optimizer]
"""(parameter groups as torch takes them, one an adapter, named in its key `adapter`; args) -> optimiser."""


class ShardedTrainer(Trainer):
    """`transformers.Trainer` over adapters or full weights, in one process or many. Subclasses set `adapter` (None:
    full weights), `adapters`, `ranks` and `_optimizer_factory`; `parallel` is there once training is prepared."""

    args: TraceConfig
    model: nn.Module
    parallel: Parallel
    ranks: Ranks
    adapter: AdapterConfig | None
    adapters: tuple[str, ...]
    _optimizer_factory: OptimizerFactory | None

    @property
    def adapted(self) -> PeftModel:
        """The model with its adapters. Full weights have none: check `adapter` first."""
        assert isinstance(self.model, PeftModel)
        return self.model

    @property
    def sharded(self) -> bool:
        """Whether weights or optimiser state are spread over the processes."""
        return self.is_deepspeed_enabled or self.args.fsdp2

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Over the parameters of every adapter: phases then choose by giving gradients to some of them only."""
        trainable(self.model, self.adapters)
        if self._optimizer_factory is not None and self.is_deepspeed_enabled:
            raise UserError(
                "DeepSpeed keeps the optimiser's state in partitions of its own, which an optimizer_factory does not "
                "know: train with FSDP2 or with replicas"
            )
        if self.optimizer is None and self._optimizer_factory is not None:
            groups = [
                {"params": list(adapter_parameters(self.model, name).values()), "adapter": name}
                for name in self.adapters
            ]
            self.optimizer = self._optimizer_factory(groups, self.args)
        created = super().create_optimizer(model)
        if self._optimizer_factory is None:
            owner = {id(p): n for n in self.adapters for p in adapter_parameters(self.model, n).values()}
            one_group_an_adapter(created, lambda p: owner[id(p)])
        self._groups = [list(group["params"]) for group in created.param_groups]
        return created

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Several processes without DeepSpeed: in a wrapper that does nothing, so that accelerate adds none of its own
        (see parallel.py)."""
        if self.ranks.size > 1 and not self.is_deepspeed_enabled:
            return model if isinstance(model, Replica) else Replica(model)
        return super()._wrap_model(model, training)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Wrap and shard. A sharded run loads its weights before, its optimiser's state after."""
        late = resume_from_checkpoint if self.sharded else None
        if late is not None:
            self._load_from_checkpoint(late)
        if self.is_deepspeed_enabled:
            own_the_boundary(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if self.args.fsdp2:
            shard_fully(self.model, self.args.device, torch.bfloat16 if self.args.bf16 else None)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if self.sharded else resume_from_checkpoint
        )
        self.parallel = make_parallel(self)
        if late is not None:
            if self.is_deepspeed_enabled and self.args.bf16:  # the masters were made of rounded weights
                self._load_weights(late)
            self._load_optimizer_and_scheduler(late)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Sharded weights are gathered a few at a time into rank 0's memory on the CPU, adapters alone if there are
        any; then, as always, rank 0 writes. Of an optimiser that has the parameters hold draws: the mean."""
        with at_mean(self.optimizer):
            if self.sharded:
                self._save_gathered(output_dir, _internal_call)
            else:
                super().save_model(output_dir, _internal_call)

    def _save_gathered(self, output_dir: str | None, _internal_call: bool) -> None:
        names = (
            None if self.adapter is None else [k for k, _ in self.model.named_parameters() if "lora_" in k]
        )
        masters = self.adapter is not None or _internal_call  # a checkpoint goes on from the fp32 masters
        whole = {}
        for name, tensor in whole_parameters(self.model, names, masters=masters):
            if self.ranks.main:
                whole[name] = tensor.to("cpu", copy=True)
        if self.ranks.main:
            self._save(output_dir, whole)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        save_adapters(self.adapted, output_dir or self.args.output_dir, whole=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.parallel, self.lr_scheduler, Path(output_dir), self.ranks)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            load_optimizer(self.parallel, self.lr_scheduler, Path(checkpoint))

    def load_optimizer_state(self, checkpoint: str | Path) -> None:
        """The optimiser as it was at `checkpoint`, without training on: for who reads it. The model must not
        be sharded yet."""
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        self.create_optimizer().load_state_dict(state)

    def _load_weights(self, checkpoint: str) -> None:
        if self.adapter is not None:
            load_adapters(self.adapted, checkpoint)
        else:
            load_weights(self.model, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is not None or self.sharded:
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
