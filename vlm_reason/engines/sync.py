"""From the weights in training to the weights that are served: what is sent, in which form, under which name.

    adapter   the LoRA matrices A, B of every adapter, served beside one base model; megabytes
    merged    W + s B A of one adapter at a time, for a server that knows no adapters; the whole model
    full      every weight, for models trained without adapters; the whole model

Training may hold its parameters in pieces (ZeRO-3, FSDP2): they are read through `models.sharding`, a few at a time, so
no process ever needs the whole model at once. What is served carries a name that says its policy
version and its content: an engine that has weights of that name has those weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import sync as flush
from ..errors import UserError
from ..models.adapters import adapter_parameters
from ..models.sharding import whole_parameters
from ..scoring.logprobs import unwrap

NamedTensors = Iterator[tuple[str, Tensor]]

SHARD = 2 << 30
"""Bytes of one safetensors file."""


def check_sync(kind: str, adapters: bool, processes: int = 1) -> None:
    """UserError for a way of sync that does not go with what is trained: `adapters`, or the model's own weights."""
    if kind == "merged" and processes > 1:
        raise UserError(
            "engine.sync merged swaps whole models between requests, which several processes cannot do in step: "
            "use sync adapter"
        )
    if kind == "full" and adapters:
        raise UserError(
            "engine.sync full sends the model's own weights, and this one trains adapters: use adapter or merged"
        )
    if kind in ("adapter", "merged") and not adapters:
        raise UserError(f"engine.sync {kind} needs adapters, and the model has none: use full")


@runtime_checkable
class Synced(Protocol):
    """An engine with weights of its own. `sync` makes it serve `model` as it is now, under the name of policy `version`
    (optimiser steps taken); with an equal version it does nothing. Collective under sharded training."""

    def sync(self, model: nn.Module, version: int) -> None: ...


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter's tensors on the CPU, whole, under PEFT's names (`...q_proj.lora_A.weight`), and its config."""

    name: str
    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @property
    def scaling(self) -> float:
        """The update is `scaling * B @ A`."""
        rank = float(self.config.r)
        return float(self.config.lora_alpha) / (rank**0.5 if self.config.use_rslora else rank)

    def digest(self) -> str:
        """8 hex digits of the content."""
        hasher = hashlib.blake2b(digest_size=4)
        hasher.update(f"{self.config.r} {self.config.lora_alpha} {self.config.use_rslora}".encode())
        for key in sorted(self.tensors):
            hasher.update(key.encode())
            hasher.update(self.tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    def served_name(self, version: int) -> str:
        """`reasoner@12-3fa4c0d1`: adapter, policy version, content. A served adapter of this name is this adapter."""
        return f"{self.name}@{version}-{self.digest()}"


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(model.peft_config) if isinstance(model, PeftModel) else ()


def adapter_weights(model: PeftModel, name: str) -> AdapterWeights:
    """A copy of adapter `name`. UserError for what cannot be served as plain LoRA: DoRA, biases, whole modules saved
    beside it, ranks or scales that differ between layers."""
    config = cast(LoraConfig, model.peft_config[name])
    _check_plain(config, name)
    tensors = {
        key.replace(f".{name}.weight", ".weight"): tensor.detach().to("cpu", copy=True)
        for key, tensor in whole_parameters(model, adapter_parameters(model, name))
    }
    return AdapterWeights(name, config, tensors)


def policy_weights(model: nn.Module, adapter: AdapterWeights | None = None) -> NamedTensors:
    """Every weight of the plain model under the names of its checkpoints, `adapter` merged in, None as the base is:

        W' = round(W + s B A)      the sum in fp32, rounded once to W's dtype

    Tied weights come once. A tensor is valid until the next one is asked for.
    """
    causal = unwrap(model)
    names = [key for key, _ in causal.named_parameters() if ".lora_" not in key]
    for key, tensor in whole_parameters(causal, names):
        plain = key.replace(".base_layer.", ".")
        yield plain, tensor if adapter is None else _merged(plain, tensor, adapter)


def write_adapter(folder: Path, served: str, weights: AdapterWeights) -> Path:
    """`folder/served`, a stock PEFT adapter, named when it is whole. One that is there already has the same content."""
    target = folder / served
    if target.is_dir():
        return target
    with _published(target) as staging:
        save_file(
            {key: tensor.contiguous() for key, tensor in weights.tensors.items()},
            staging / "adapter_model.safetensors",
        )
        config = {key: value for key, value in weights.config.to_dict().items() if not callable(value)}
        # by name, whatever the pattern that chose them: not every reader takes a regular expression
        config["target_modules"] = sorted(
            {key.split(".lora_")[0].rpartition(".")[2] for key in weights.tensors}
        )
        (staging / "adapter_config.json").write_text(json.dumps(config, default=_as_list))
    return target


def write_weights(folder: Path, served: str, tensors: Iterable[tuple[str, Tensor]]) -> Path:
    """`folder/served` with the tensors as safetensors files of about `SHARD` bytes, named when it is whole."""
    target = folder / served
    with _published(target) as staging:
        held: dict[str, Tensor] = {}
        files = size = 0
        for name, tensor in tensors:
            held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += held[name].nbytes
            if size >= SHARD:
                save_file(held, staging / f"model-{files:05d}.safetensors")
                held, size, files = {}, 0, files + 1
        if held:
            save_file(held, staging / f"model-{files:05d}.safetensors")
    return target


def prune(folder: Path, keep: Iterable[str]) -> None:
    """Remove what `folder` holds of earlier versions, and what a killed process left half written."""
    kept = set(keep)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (
            path.is_dir()
            and path.name not in kept
            and ("@" in path.name or path.name.startswith(".writing-"))
        ):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    staging = target.parent / f".writing-{os.getpid()}-{target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.iterdir():
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _merged(plain: str, weight: Tensor, adapter: AdapterWeights) -> Tensor:
    prefix = f"base_model.model.{plain.removesuffix('.weight')}"
    down = adapter.tensors.get(f"{prefix}.lora_A.weight")
    if down is None or not plain.endswith(".weight"):
        return weight
    up = adapter.tensors[f"{prefix}.lora_B.weight"]
    update = (up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)) * adapter.scaling
    return (weight.float() + update).to(weight.dtype)


def _check_plain(config: LoraConfig, name: str) -> None:
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "use_qalora"):
        if getattr(config, key, None):
            raise UserError(
                f"adapter {name!r} has {key} = {getattr(config, key)!r}, which cannot be served as plain LoRA: "
                "sample with engine kind hf, or leave it out"
            )
    if "lm_head" in (config.target_modules or ()):
        raise UserError(
            f"adapter {name!r} targets lm_head, which cannot be served beside one base model: leave it out"
        )
    if config.bias != "none":
        raise UserError(
            f"adapter {name!r} trains biases ({config.bias!r}), which cannot be served: set bias none"
        )


def _as_list(value: object) -> object:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
