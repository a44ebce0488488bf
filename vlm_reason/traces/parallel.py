"""How one step's gradient is summed over processes and where the optimiser keeps its state: three ways, one interface.

    gradient = sum over ranks of the gradient of - sum_{rows of the rank} objective(row) / (groups of the whole step)

equals the one-process gradient. DDP, DeepSpeed and FSDP2 average over ranks, so their losses are multiplied by the
number of ranks (ours are summed). Nothing is reduced before a step's last pass where the weights are replicated or
only adapters are trained.

The optimiser's state is read and written whole, parameter by parameter: `optimizer.pt` is what one process would have
written, so a run goes on under another number of processes, or another way of sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..compat import deepspeed as zero
from ..models.adapters import adapter_parameters
from ..scoring.enter import enter_through
from .config import TraceConfig
from .distributed import Ranks

BUCKET = 1 << 25
"""Elements of one all-reduce: 128 MiB of fp32."""
Groups = Sequence[Sequence[nn.Parameter]]


class Parallel(Protocol):
    """`lockstep`: all ranks must run the same passes. `begin`, then a `backward` a pass, then `finish`: once a step.
    `forget`: drop the optimiser's state of an adapter that starts anew."""

    lockstep: bool

    def begin(self, adapters: Sequence[str]) -> None: ...
    def backward(self, part: Tensor, last: bool) -> None: ...
    def finish(self) -> None: ...
    def read_state(self) -> dict[str, Any]: ...
    def write_state(self, state: dict[str, Any]) -> None: ...
    def forget(self, adapter: str) -> None: ...


@runtime_checkable
class DrawingOptimizer(Protocol):
    """An optimiser whose state says what the parameters hold (`weights.IVON`): they hold a draw from it.

    `put_draw_in_place`: after the state was replaced. `start_anew`: q of `parameters` is as at first, around what they
    hold now. `mean`: inside, they hold the mean."""

    def mean(self) -> AbstractContextManager[None]: ...
    def put_draw_in_place(self) -> None: ...
    def start_anew(self, parameters: Sequence[Tensor]) -> None: ...


class Replicated:
    """One process, or several with the whole model each (DDP).

    The all-reduce is our own, of the trained parameters' gradients, in buckets, once a step. DistributedDataParallel
    would want every rank to run the same number of passes through one forward with the same parameters trained each
    time; adapters that alternate and steps cut by tokens are neither.
    """

    lockstep = False

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, backward: Callable
    ) -> None:
        self._model, self._optimizer, self._ranks, self._backward = model, optimizer, ranks, backward
        if ranks.size > 1:  # as DDP does: whatever a process loaded, it starts from rank 0's weights
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=0)

    def begin(self, adapters: Sequence[str]) -> None:
        pass

    def backward(self, part: Tensor, last: bool) -> None:
        self._backward(part)

    def finish(self) -> None:
        if self._ranks.size > 1:
            sum_gradients([p for p in self._model.parameters() if p.requires_grad])

    def read_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def write_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def forget(self, adapter: str) -> None:
        _forget(self._model, self._optimizer, adapter)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their sums over ranks, in fp32. One that no rank has stays None; one that some ranks lack counts
    as 0 there."""
    if not parameters:
        return
    held = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, some in zip(parameters, held.tolist(), strict=True) if some]):
        flat = torch.cat([_gradient(p).flatten().float() for p in bucket])
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


class FullySharded:
    """FSDP2 (`models.sharding.shard_fully`): parameters are DTensors.

    With adapters, gradients stay unsharded until a step's last pass and are reduced once; with full weights they are
    reduced in every pass, since a whole model of gradients is what sharding is to avoid.
    """

    lockstep = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, reduce_once: bool
    ) -> None:
        assert isinstance(model, FSDPModule)
        self._model, self._optimizer, self._ranks, self._reduce_once = model, optimizer, ranks, reduce_once
        enter_through(model, model)

    def begin(self, adapters: Sequence[str]) -> None:
        pass

    def backward(self, part: Tensor, last: bool) -> None:
        self._model.set_requires_gradient_sync(last or not self._reduce_once)
        (part * self._ranks.size).backward()

    def finish(self) -> None:
        pass

    def read_state(self) -> dict[str, Any]:
        states = []
        for parameter in _parameters(self._optimizer):
            own = self._optimizer.state.get(parameter, {})
            states.append({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in own.items()})
        return _state_dict(self._optimizer.param_groups, _sizes(self._optimizer), states)

    def write_state(self, state: dict[str, Any]) -> None:
        _take_settings(self._optimizer, state)
        for n, parameter in enumerate(_parameters(self._optimizer)):
            entry = state["state"].get(n)
            if entry is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter] = {k: _like(v, parameter) for k, v in entry.items()}
        if isinstance(self._optimizer, DrawingOptimizer):
            self._optimizer.put_draw_in_place()

    def forget(self, adapter: str) -> None:
        _forget(self._model, self._optimizer, adapter)


class Zero:
    """DeepSpeed ZeRO-2 and ZeRO-3: `engine.step()` is the optimiser's step, on flat fp32 partitions a parameter group.

    A parameter without gradient counts as gradient 0 in a flat partition, and AdamW would still move it by its momentum
    and decay it. A hook on the optimiser therefore takes the gradient away from the groups of adapters that the step
    does not train: they are skipped, as they are in one process.
    """

    lockstep = True

    def __init__(self, model: nn.Module, engine: Any, groups: Groups, ranks: Ranks) -> None:
        self._engine, self._groups, self._ranks = engine, groups, ranks
        self._active: frozenset[str] = frozenset()
        self._passes = 0
        self._optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._optimizer.register_step_pre_hook(self._hide_others)
        self._optimizer.register_step_post_hook(self._show_others)
        enter_through(model, engine)

    def begin(self, adapters: Sequence[str]) -> None:
        self._active, self._passes = frozenset(adapters), 0
        zero.forget_gradients(self._engine)

    def backward(self, part: Tensor, last: bool) -> None:
        self._engine.backward(part * self._ranks.size, scale_wrt_gas=False)
        self._passes += 1

    def finish(self) -> None:
        if self._passes:
            self._engine.step()

    def read_state(self) -> dict[str, Any]:
        states = [s for i, group in enumerate(self._groups) for s in zero.read_state(self._engine, i, group)]
        return _state_dict(self._optimizer.param_groups, [len(g) for g in self._groups], states)

    def write_state(self, state: dict[str, Any]) -> None:
        _take_settings(self._optimizer, state)
        first = 0
        for i, group in enumerate(self._groups):
            own = [state["state"].get(n) or {} for n in range(first, first + len(group))]
            zero.write_state(self._engine, i, group, own)
            first += len(group)

    def forget(self, adapter: str) -> None:
        for i, group in enumerate(self._optimizer.param_groups):
            if group["adapter"] == adapter:
                zero.drop_state(self._engine, i)

    def _hide_others(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["adapter"] not in self._active:
                for flat in group["params"]:
                    self._hidden.append((flat, flat.grad))
                    flat.grad = None

    def _show_others(self, *_: Any) -> None:
        for flat, gradient in self._hidden:  # with optimiser offload DeepSpeed keeps this very tensor
            flat.grad = gradient
        self._hidden = []


class Replica(nn.Module):
    """One of several equal models. It adds nothing: the gradients are summed by `Replicated.finish`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def shards_weights(args: TraceConfig) -> bool:
    """Whether no process will have all of the weights (ZeRO-3, FSDP2)."""
    if args.deepspeed_plugin is not None:
        return args.deepspeed_plugin.zero_stage == 3
    return args.fsdp2


def make_parallel(trainer: Any) -> Parallel:
    """The way that `trainer`, prepared for training, was launched. UserError for a kind of sharding not listed here."""
    ranks = Ranks.current()
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    if trainer.is_deepspeed_enabled:
        return Zero(model, trainer.deepspeed, trainer._groups, ranks)
    if trainer.args.fsdp2:
        return FullySharded(model, optimizer, ranks, reduce_once=trainer.adapter is not None)
    return Replicated(model, optimizer, ranks, trainer.accelerator.backward)


def one_group_an_adapter(optimizer: torch.optim.Optimizer, owner: Callable[[nn.Parameter], str]) -> None:
    """Split the parameter groups so that each belongs to one adapter, named in its key `adapter`; empty ones go."""
    split = []
    for group in optimizer.param_groups:
        names = dict.fromkeys(owner(p) for p in group["params"])
        split += [
            {**group, "params": [p for p in group["params"] if owner(p) == name], "adapter": name}
            for name in names
        ]
    optimizer.param_groups[:] = split


def at_mean(optimizer: torch.optim.Optimizer | None) -> AbstractContextManager[None]:
    """Inside, the parameters hold what is kept of a run: the mean, where the optimiser has them hold a draw."""
    own = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return own.mean() if isinstance(own, DrawingOptimizer) else nullcontext()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _state_dict(
    groups: Sequence[dict[str, Any]], sizes: Sequence[int], states: Sequence[dict]
) -> dict[str, Any]:
    """In the form of `torch.optim.Optimizer.state_dict`: parameters by their number, tensors on the CPU."""
    first, out = 0, []
    for group, size in zip(groups, sizes, strict=True):
        out.append({**group, "params": list(range(first, first + size))})
        first += size
    on_cpu = [{k: v.cpu() if torch.is_tensor(v) else v for k, v in state.items()} for state in states]
    return {"state": {n: state for n, state in enumerate(on_cpu) if state}, "param_groups": out}


def _take_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Learning rates and the like, group by group, as `load_state_dict` does."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """A saved piece of state where `parameter` has its own: sharded alike if it has the parameter's shape."""
    if not torch.is_tensor(value):
        return value
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value.clone()  # not a view of the file it was read from
    own = value.to(parameter.device)
    return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _forget(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: str) -> None:
    parameters = list(adapter_parameters(model, adapter).values())
    if isinstance(optimizer, DrawingOptimizer):
        optimizer.start_anew(parameters)
        return
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
