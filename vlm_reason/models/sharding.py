"""Parameters that are spread over processes, read and written whole: ZeRO-3 partitions, FSDP2 DTensors, ZeRO masters.

`whole_parameters` is also what a weight sync reads (engines/sync.py): a few parameters at a time, never the model.
Whatever touches a sharded parameter is collective: all processes call it, with the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..compat import deepspeed as zero
from ..errors import UserError

AT_ONCE = 1 << 26
"""Elements gathered together: 256 MiB of fp32."""


def shard_fully(model: nn.Module, device: torch.device, param_dtype: torch.dtype | None = None) -> None:
    """FSDP2 in place: each decoder layer is a unit, gathered when it runs; embedding, norm and LM head are the root's.

    `param_dtype`: compute in this precision, from weights of their own; gradients are summed in fp32. UserError for a
    model that does not say what its layers are.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = set(getattr(causal, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(
            f"{type(causal).__name__} does not name its layers, so FSDP2 cannot split it: use ZeRO-3"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype, torch.float32) if param_dtype else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of `model` is not whole in this process."""
    return any(isinstance(p, DTensor) or zero.is_partitioned(p) for p in model.parameters())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    return zero.partitioned_shape(parameter) if zero.is_partitioned(parameter) else parameter.shape


@contextmanager
def whole_tensors(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The whole tensors of `parameters`, detached, valid inside the block; ordinary parameters are themselves."""
    partitioned = [p for p in parameters if zero.is_partitioned(p)]
    with zero.gathered(partitioned, written=False) if partitioned else nullcontext():
        yield [p.detach().full_tensor() if isinstance(p, DTensor) else p.data for p in parameters]  # type: ignore[attr-defined]


def whole_parameters(
    model: nn.Module, names: Iterable[str] | None = None, *, masters: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of the parameters called `names`, all by default, in the model's order; tied ones once.

    A tensor is valid until the next one is asked for: copy what is kept. Every process must take all of them. With
    `masters` parameters that ZeRO trains in 16 bits come as their fp32 master copies.
    """
    wanted = None if names is None else set(names)
    chosen = [(k, p) for k, p in model.named_parameters() if wanted is None or k in wanted]
    for chunk in _chunks(chosen):
        with whole_tensors([p for _, p in chunk]) as tensors:
            for (name, parameter), tensor in zip(chunk, tensors, strict=True):
                master = zero.master(parameter) if masters else None
                yield name, tensor if master is None else master


def set_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """`parameter` becomes `value`, wherever its parts are (the fp32 master copy of ZeRO too)."""
    value = value.detach()
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            own = value.to(parameter.device, parameter.dtype)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(own, mesh, placements, src_data_rank=None))
        elif zero.is_partitioned(parameter):
            with zero.gathered([parameter], written=True):  # rank 0's value is kept
                parameter.copy_(value)
        else:
            parameter.copy_(value)
    zero.set_master(parameter, value)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the safetensors of `folder` into the parameters of `model`, by name. UserError where they do not fit."""
    own = dict(model.named_parameters())
    found: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            held = set(stored.keys())
            for name in (name for name in own if name in held):  # the same order in every process
                set_whole(own[name], stored.get_tensor(name))
                found.add(name)
    if missing := sorted(own.keys() - found):
        raise UserError(
            f"the weights in {folder} lack {len(missing)} of the model's {len(own)} parameters, the first is "
            f"{missing[0]!r}: choose the folder of a model of this kind"
        )


def _chunks(pairs: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    chunk: list[tuple[str, nn.Parameter]] = []
    elements = 0
    for name, parameter in pairs:
        size = whole_shape(parameter).numel()
        if chunk and elements + size > AT_ONCE:
            yield chunk
            chunk, elements = [], 0
        chunk.append((name, parameter))
        elements += size
    if chunk:
        yield chunk
