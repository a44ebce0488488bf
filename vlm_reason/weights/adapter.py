"""A PEFT adapter as tensors by key, and the base model it is on by its hash."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..errors import UserError, nearest
from ..models.load import fingerprint_parameters, fingerprint_weights
from .artefact import ADAPTER_CONFIG, read_json


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """PEFT key -> parameter of one adapter. UserError for an adapter the model does not have."""
    if not isinstance(model, PeftModel):
        raise UserError(f"a posterior is over a PEFT adapter; got a {type(model).__name__} without one")
    if adapter not in model.peft_config:
        raise UserError(f"the model has no adapter {adapter!r}{nearest(adapter, model.peft_config)}")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return get_peft_model_state_dict(
        model, state_dict=parameters, adapter_name=adapter, save_embedding_layers=False
    )


def base_fingerprint(model: nn.Module) -> str:
    """`fingerprint_weights` of the base model, also through the adapters that were put on it."""
    if not isinstance(model, PeftModel):
        return fingerprint_weights(model)
    return fingerprint_parameters((_name_in_base(n), p) for n, p in _base_parameters(model))


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Without those of the adapters."""
    names = model.peft_config if isinstance(model, PeftModel) else ()
    adapters = {id(p) for name in names for p in adapter_tensors(cast(PeftModel, model), name).values()}
    return ((n, p) for n, p in model.named_parameters() if id(p) not in adapters)


def name_and_dtype(model: nn.Module) -> tuple[str | None, str | None]:
    """Of the base of `model`: the name it was loaded by (of an absolute path the last part), dtype."""
    given = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    name = Path(given).name if Path(given).is_absolute() else given
    dtype = next((str(p.dtype).removeprefix("torch.") for _, p in _base_parameters(model)), None)
    return name or None, dtype


def described(base: str, about: tuple[str | None, str | None]) -> str:
    known = [part for part in about if part]
    return f"{base} ({', '.join(known)})" if known else base


def peft_config_dict(model: PeftModel, adapter: str) -> dict[str, Any]:
    """adapter_config.json as PEFT would write it, for inference."""
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[adapter].save_pretrained(folder)
        return {**read_json(Path(folder) / ADAPTER_CONFIG), "inference_mode": True}


def _name_in_base(name: str) -> str:
    name = name.removeprefix("base_model.").removeprefix("model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def same_keys(a: Iterable[str], b: Iterable[str], what: str) -> None:
    """UserError naming the first key that only one of them has."""
    wrong = sorted(set(a) ^ set(b))
    if wrong:
        raise UserError(f"{what}: {len(wrong)} tensors are in one alone, the first is {wrong[0]!r}")


def whole(tensor: Any) -> Tensor:
    """fp32 copy on the CPU; gathers a DTensor."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True)
