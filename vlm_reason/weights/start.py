"""A posterior to begin with: one that was saved, or a point mass on any LoRA adapter that PEFT wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from .artefact import ADAPTER, ADAPTER_CONFIG, CONFIG, check_rank, read_json, read_tensors
from .families.diagonal import DiagonalGaussian
from .posterior import Origin, Posterior


def load_start(folder: str | Path) -> Posterior:
    """The posterior in `folder`, or all weight on the stock PEFT adapter there (of an unknown base model). UserError
    for a folder with neither, for NaN, and for tensors that are not of the rank the config says."""
    folder = Path(folder).expanduser()
    if (folder / CONFIG).is_file():
        return Posterior.load(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{str(folder)!r} holds no adapter: {ADAPTER_CONFIG} is missing")
    if (folder / "adapter_model.bin").is_file() and not (folder / ADAPTER).is_file():
        raise UserError(
            f"{str(folder)!r} holds a pickled adapter_model.bin, which may run code when it is read: load it with PEFT "
            "and save it again as safetensors"
        )
    config = read_json(folder / ADAPTER_CONFIG)
    mean = read_tensors(folder / ADAPTER)
    check_rank(config, mean, folder)
    return DiagonalGaussian(config, mean, {}, Origin())


def base_model_of(folder: str | Path) -> str:
    """Name of the base model that adapter_config.json gives. UserError where it gives none."""
    folder = Path(folder).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{str(folder)!r} holds no adapter: {ADAPTER_CONFIG} is missing")
    config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{ADAPTER_CONFIG} in {str(folder)!r} names no base model: give model=...")
    return str(name)
