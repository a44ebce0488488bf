"""LoRA in vLLM's CPU backend, one matrix product an adapter instead of one gathered matrix a token.

    y[rows of slot s] += (x[rows of slot s] A_s^T) B_s^T          rows without an adapter are left alone

vLLM 0.32 copies A and B once for every token of the batch before it multiplies, which is most of the time of a decoding
step of a small model, and indexes the slots by -1 where a token has no adapter: such a token is given the last slot's
adapter. It also runs the (empty) adapter of the LM head, and fails there when prompt log-probabilities ask for more
rows than sequences; adapters of the LM head are refused before they get here (engines/sync.py). All mended here.

`register` is a vLLM plugin (entry point `vllm.general_plugins`), so that servers and worker processes have it too; it
does nothing on other platforms, or in processes that were not started by us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read before torch may be imported, for MARK
    import torch
    from torch import Tensor


MARK = "VLM_REASON_ENGINE_ENVIRONMENT"
"""Set in the environment of every process that we start for vLLM (engines/launch.py)."""

REPLACED = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")

HEAD = "add_lora_logits"


def register() -> None:
    """The plugin: called by vLLM in each of its processes."""
    if os.environ.get(MARK):
        install()


def install() -> None:
    """Put our functions where vLLM's CPU wrapper looks for them; once more changes nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in REPLACED:
        ours = globals()[name]
        setattr(lora_ops, name, ours)  # the prefill functions there end in these
        setattr(punica_cpu, name, ours)
    setattr(punica_cpu.PunicaWrapperCPU, HEAD, no_head_adapter)


def no_head_adapter(self: object, y: Tensor, *the_rest: object, **and_options: object) -> Tensor:
    """The logits as they are."""
    return y


def bgmv_shrink(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """output [T, >= r] = scaling * inputs [T, H] A^T, A [slots, (1,) r, H]."""
    rank = lora_b_weights.shape[-2]
    output_tensor[:, :rank] = 0
    for slot, rows in _rows_of_slots(lora_indices_tensor):
        product = _product(inputs, rows, lora_b_weights, slot, output_tensor.dtype)
        output_tensor[rows, :rank] = product.mul_(scaling)


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """output [T, O] (+)= inputs [T, r] B^T, B [slots, (1,) O', r]; O and O' may be padded differently."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(
        inputs, lora_b_weights[..., :width, :], output_tensor, lora_indices_tensor, 0, width, add_inputs
    )


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """The same into columns slice_offset .. slice_offset + slice_size of output."""
    into = output_tensor[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        into.zero_()
    for slot, rows in _rows_of_slots(lora_indices_tensor):
        into[rows] += _product(inputs, rows, lora_b_weights, slot, output_tensor.dtype)


def _product(inputs: Tensor, rows: Tensor | slice, weights: Tensor, slot: int, dtype: torch.dtype) -> Tensor:
    matrix = weights[slot]
    if matrix.dim() == 3:
        matrix = matrix.squeeze(0)
    return inputs[rows].to(dtype) @ matrix.to(dtype).t()


def _rows_of_slots(slots: Tensor) -> Iterator[tuple[int, Tensor | slice]]:
    """(slot, its rows) for the slots that some token uses; all rows as a slice where they are of one slot."""
    used = slots.unique().tolist()
    for slot in used:
        if slot >= 0:
            yield slot, slice(None) if len(used) == 1 else (slots == slot).nonzero().squeeze(-1)
