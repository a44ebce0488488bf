"""Load a base model and its tokenizer: a built-in alias, a folder, or a hub id."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..compat.hub import hub_answers
from ..errors import UserError, nearest
from .builtin import BUILTINS, ensure_builtin

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = ("auto", "float32", "bfloat16", "float16")

UNREADABLE = (OSError, ValueError, StrictDataclassError, ArithmeticError)
"""What transformers raises for a model it cannot read: ConnectionError, hub and safetensors errors are among the first
two, a value of the wrong type in config.json is the third, and it divides by sizes that are 0."""


def load_model(
    name_or_path: str | Path, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode with every dropout at 0, and its tokenizer, which pads on the left.

    dtype `auto` is the one the weights are stored in. device None is the GPU if there is one. Dropout is off for good,
    also in train mode: traces must be scored under the law that sampled them. A tokenizer without a pad token pads
    with its end-of-text token (padding is masked, so the choice has no effect on results).

    Raises UserError for an unknown dtype, a folder that holds no model, or a hub that cannot be reached.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    tokenizer = load_tokenizer(name_or_path)
    source = _resolve(name_or_path)
    local = Path(source).is_dir() or not hub_answers()
    try:
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, local_files_only=local
        )
    except UNREADABLE as error:
        raise _as_user_error(error, name_or_path) from error
    disable_dropout(model)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone, padding on the left. UserError as `load_model`."""
    source = _resolve(name_or_path)
    local = Path(source).is_dir() or not hub_answers()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except UNREADABLE as error:
        raise _as_user_error(error, name_or_path) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {str(name_or_path)!r} has neither a pad nor an end-of-text token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The config of what `load_model` would load; a folder needs no more than its config.json. UserError as there."""
    source = _resolve(name_or_path)
    local = Path(source).is_dir() or not hub_answers()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, local_files_only=local)
    except UNREADABLE as error:
        raise _as_user_error(error, name_or_path) from error
    return config


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, module or attribute (`attention_dropout` of the attention layers)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (not an attribute of nn.Module)


def fingerprint_weights(model: nn.Module) -> str:
    """16 hex digits that change when any parameter changes: name, shape, dtype and two integer checksums of the bits.

    The checksums are exact sums modulo 2^64, so they agree across devices and orders of summation; hashing every byte
    of a large model on the CPU would take minutes. Not a defence against a crafted collision.
    """
    return fingerprint_parameters(model.named_parameters())


def fingerprint_parameters(named: Iterable[tuple[str, Tensor]]) -> str:
    """`fingerprint_weights` of the parameters given, under the names given; their order does not count.
    Collective where they are sharded."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        if isinstance(parameter, DTensor):  # gathered, one at a time
            parameter = parameter.detach().full_tensor()  # type: ignore[attr-defined]  # detach keeps it one
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(
            repr(_checksums(parameter.detach().contiguous().reshape(-1).view(torch.uint8))).encode()
        )
    return digest.hexdigest()


def _checksums(raw: Tensor) -> tuple[int, int]:
    """Sum, and sum weighted by place, of the bytes read as 64-bit words; chunks bound the memory."""
    whole = raw.numel() // 8 * 8
    total = weighted = 0
    for offset, part in enumerate((*raw[:whole].view(torch.int64).split(1 << 20), raw[whole:].long())):
        place = torch.arange(1, part.numel() + 1, device=part.device)
        total += int(part.sum())
        weighted += int((part * place).sum()) * (2 * offset + 1)
    return total % 2**64, weighted % 2**64


def _resolve(name_or_path: str | Path) -> str:
    name = str(name_or_path)
    if name in BUILTINS:
        return str(ensure_builtin(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = (
                "an adapter: load its base model and then the adapter"
                if (path / "adapter_config.json").is_file()
                else "no config.json"
            )
            raise UserError(f"{name!r} holds no model ({what})")
        return str(path)
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"no model folder {name!r}")
    if "/" not in name and (close := difflib.get_close_matches(name, BUILTINS, n=1, cutoff=0.8)):
        raise UserError(f"no model {name!r}; did you mean the built-in {close[0]!r}?")
    return name


def _as_user_error(error: Exception, name_or_path: str | Path) -> UserError:
    name = str(name_or_path)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines) if isinstance(error, StrictDataclassError) else lines[0]
    if Path(name).expanduser().is_dir() or name in BUILTINS:
        return UserError(f"cannot load the model in {name!r}: {reason}")
    return UserError(
        f"cannot load {name!r}: the model hub is out of reach or has no such model ({reason}); "
        f"use a local folder or the built-in {next(iter(BUILTINS))!r}"
    )
