"""What we take of DeepSpeed beyond its documented interface. Importing this file does not import DeepSpeed.

ZeRO keeps flat fp32 partitions for each parameter group of the optimiser, which sees them in place of its parameters.
A group here is the parameters of one adapter, so "leave the other adapter alone" is "leave its flats alone".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Any]
"""What an optimiser keeps for one parameter: tensors of the parameter's shape, and numbers."""


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds `parameter` in parts."""
    return hasattr(parameter, "ds_id")


def partitioned_shape(parameter: Tensor) -> torch.Size:
    return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]


def gathered(parameters: Sequence[Tensor], written: bool) -> AbstractContextManager[None]:
    """ZeRO-3 parameters are whole inside the block; `written`: rank 0's values are kept afterwards."""
    from deepspeed import zero

    return zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None)


def join_process_group() -> None:
    """DeepSpeed takes over the process group that is there. Without it, a model loaded under ZeRO-3 before the engine
    exists would be partitioned for one process."""
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def cast_partitioned(model: nn.Module, dtype: torch.dtype) -> None:
    """A model loaded under ZeRO-3 is held in the precision of the DeepSpeed config, fp32 if that names none, whatever
    its weights are stored in. Back to `dtype`: what a frozen base was trained in, at half the memory."""
    for parameter in model.parameters():
        if is_partitioned(parameter) and parameter.is_floating_point():
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)  # type: ignore[attr-defined]
            parameter.data = parameter.data.to(dtype)


def master(parameter: nn.Parameter) -> Tensor | None:
    """The whole fp32 master copy of a parameter that ZeRO trains, None of any other. Collective."""
    if not _is_trained(parameter):
        return None
    if is_partitioned(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        with _answering(parameter):
            return safe_get_full_fp32_param(parameter)
    return _assembled(parameter, lambda mapping: mapping.hp_fragment)


def set_master(parameter: nn.Parameter, value: Tensor) -> None:
    """Write `value` [whole] into this process's part of the fp32 master copy, where there is one."""
    if not _is_trained(parameter):
        return
    if is_partitioned(parameter):
        _set_local(parameter, value, None)
    elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
        mapping.hp_fragment.data.copy_(_own_part(mapping, value))


def _is_trained(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


# ---- gradients and the step --------------------------------------------------------------------------------------


def own_the_boundary(config: dict[str, Any]) -> None:
    """In `config` (a DeepSpeed config): `engine.step()` ends an accumulation, however many passes it took. Otherwise
    DeepSpeed counts passes, and with optimiser offload loses what the last pass did not touch."""
    config["managed_gradient_accumulation"] = False


def forget_gradients(engine: Any) -> None:
    """Before a step's first pass. ZeRO-3 overwrites its gradient partitions in the first pass of a step and adds in
    later ones, so a parameter that the first pass does not reach would start from the previous step's gradient; with
    optimiser offload one that no pass reaches would keep it."""
    optimizer = engine.optimizer
    buffers = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    buffers += [
        flat.grad for group in range(len(optimizer.optimizer.param_groups)) for flat in flats(engine, group)
    ]
    for buffer in buffers:
        if buffer is not None:
            buffer.zero_()


# ---- optimiser state ---------------------------------------------------------------------------------------------


def flats(engine: Any, group: int) -> list[Tensor]:
    """The flat fp32 partitions that stand for parameter group `group` in this process."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3: several sub-groups a group
        return [
            flat
            for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat)
            if optimizer.sub_group_to_group_id[i] == group
        ]
    return [optimizer.single_partition_of_fp32_groups[group]]


def read_state(engine: Any, group: int, parameters: Sequence[nn.Parameter]) -> Iterator[State]:
    """The whole optimiser state of each of a group's `parameters`; {} where it was never stepped. Collective."""
    states = [engine.optimizer.optimizer.state.get(flat) or {} for flat in flats(engine, group)]
    known = states[0]
    for parameter in parameters:
        out: State = {}
        for key, value in known.items():
            shaped = (
                torch.is_tensor(value) and value.numel() == flats(engine, group)[0].numel() and value.ndim
            )
            if shaped:
                out[key] = _read_one(engine, group, parameter, key)
            else:  # a copy each: one step counter that many parameters share would count each of them
                out[key] = value.clone() if torch.is_tensor(value) else value
        yield out


def write_state(engine: Any, group: int, parameters: Sequence[nn.Parameter], states: Sequence[State]) -> None:
    """The inverse of `read_state`; groups without state are left without. Every process has all of `states`."""
    if not states or not states[0]:
        drop_state(engine, group)
        return
    keys = {k for k, v in states[0].items() if torch.is_tensor(v) and v.ndim}
    for flat in flats(engine, group):
        scalars = {k: v.clone() if torch.is_tensor(v) else v for k, v in states[0].items() if k not in keys}
        engine.optimizer.optimizer.state[flat] = {**scalars, **{k: torch.zeros_like(flat) for k in keys}}
    for parameter, state in zip(parameters, states, strict=True):
        for key in keys:
            if is_partitioned(parameter):
                _set_local(parameter, state[key], key)
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                flat_state = engine.optimizer.optimizer.state[flats(engine, group)[0]][key]
                _fragment(mapping, flat_state).copy_(_own_part(mapping, state[key]))


def drop_state(engine: Any, group: int) -> None:
    for flat in flats(engine, group):
        engine.optimizer.optimizer.state.pop(flat, None)


def _read_one(engine: Any, group: int, parameter: nn.Parameter, key: str) -> Tensor:
    if is_partitioned(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        with _answering(parameter):
            return safe_get_full_optimizer_state(parameter, key)
    flat_state = engine.optimizer.optimizer.state[flats(engine, group)[0]][key]
    return _assembled(parameter, lambda mapping: _fragment(mapping, flat_state))


def _fragment(mapping: Any, flat: Tensor) -> Tensor:
    address = mapping.hp_fragment_address
    return flat.narrow(0, address.start, address.numel)


def _own_part(mapping: Any, value: Tensor) -> Tensor:
    address = mapping.lp_fragment_address
    return value.flatten().narrow(0, address.start, address.numel)


def _assembled(parameter: nn.Parameter, part: Any) -> Tensor:
    """ZeRO-1/2: every process holds a fragment of the parameter, or none; their sum over zeros is the whole."""
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        _own_part(mapping, whole).copy_(part(mapping))
    dist.all_reduce(whole, group=parameter._dp_group)  # type: ignore[attr-defined]
    return whole.view(parameter.shape)


def _set_local(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """ZeRO-3: this process's part of `value`, padded as DeepSpeed pads it."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = value.detach().flatten().float()
    rank, count = dist.get_rank(), dist.get_world_size()
    padded = torch.nn.functional.pad(flat, (0, size * count - flat.numel()))
    part = padded.narrow(0, size * rank, size).to(parameter.ds_tensor.device)  # type: ignore[attr-defined]
    with _answering(parameter):
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)


@contextmanager
def _answering(parameter: nn.Parameter) -> Iterator[None]:
    """ZeRO-3 answers only for parameters that require grad, which those of a resting adapter do not."""
    flag = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        yield
    finally:
        parameter.requires_grad_(flag)
