"""A posterior over an adapter on disk: a PEFT adapter that holds the mean, and what makes it a posterior beside it.

    adapter_config.json  adapter_model.safetensors      the mean: stock PEFT loads it
    posterior.safetensors                               what the family needs, fp32, keys `<peft key>.<what>`
    posterior_config.json                               family, base model's hash, prior, lambda, version

No pickle. A folder appears whole or not at all, and none is overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..atomic import write_atomically
from ..errors import UserError

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, TENSORS = "posterior_config.json", "posterior.safetensors"
POSTERIOR = "posterior"
VERSION = 1

Tree = dict[str, Tensor]
"""One value for every tensor of an adapter, by its key in adapter_model.safetensors."""


def adapter_files(config: Mapping[str, Any], tree: Mapping[str, Tensor]) -> list[tuple[str, bytes]]:
    """What `PeftModel.from_pretrained` reads."""
    return [(ADAPTER_CONFIG, _json(config)), (ADAPTER, tensor_bytes(tree))]


def config_file(config: Mapping[str, Any]) -> tuple[str, bytes]:
    return CONFIG, _json(config)


def tensor_bytes(tree: Mapping[str, Tensor]) -> bytes:
    return save({k: v.detach().cpu().contiguous() for k, v in tree.items()}, metadata={"format": "pt"})


def write_folder(folder: str | Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """(relative path, content), under a temporary name that becomes `folder` in the end. UserError where `folder` holds
    anything already."""
    folder = new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        inner = temporary / "folder"  # mkdtemp's own folder is closed to others
        inner.mkdir()
        for name, content in files:
            write_atomically(inner / name, content)
        os.replace(inner, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def posterior_in(folder: str | Path) -> Path:
    """`folder`, or its posterior/ where it is that of a run."""
    folder = Path(folder).expanduser()
    return folder / POSTERIOR if (folder / POSTERIOR).is_dir() else folder


def new_folder(folder: str | Path) -> Path:
    """Its path. UserError where it holds anything, or is a file."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists and is not an empty folder: remove it, or name another")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    _there(path)
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return content


def read_tensors(path: Path) -> Tree:
    """fp32. UserError for a file that is missing or broken, and for values that are not finite."""
    _there(path)
    try:
        tensors = {k: v.float() for k, v in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is no safetensors file: {error}") from error
    check_finite(tensors, f"in {str(path)!r}")
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise UserError(f"{bad} of {value.numel()} values of {key!r} {where} are NaN or infinite")


def check_rank(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """UserError where a LoRA factor has another rank than adapter_config.json says."""
    if config.get("peft_type") != "LORA" or config.get("rank_pattern"):
        return
    for key, value in tensors.items():
        found = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", key)
        if found and value.ndim >= 2 and value.shape["AB".index(found[1])] != config.get("r"):
            rank = value.shape["AB".index(found[1])]
            raise UserError(
                f"{key!r} in {str(folder)!r} has rank {rank}, {ADAPTER_CONFIG} says r = {config.get('r')}"
            )


def _there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{str(path.parent)!r} holds no posterior: {path.name} is missing")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
