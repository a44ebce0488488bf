"""The engine that a config's `engine` section describes."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..compat.vllm import Settings, check_installed, has_prompt_logps, lora_rank, server_arguments
from ..config import convert, from_dict
from ..errors import UserError
from ..models.adapters import POSTERIOR, REASONER, AdapterConfig
from ..models.load import load_model_config
from ..scoring.logprobs import unwrap
from .base import Engine
from .hf import HFEngine
from .launch import prepared
from .sync import adapter_names, check_sync, policy_weights, write_weights


@dataclass(frozen=True)
class EngineConfig:
    """kind: `hf` samples with transformers in this process. batch_size: rows decoded together; score_tokens: padded
    tokens scored together. Neither changes results."""

    kind: Literal["hf"] = "hf"
    batch_size: int = 64
    score_tokens: int = 8192

    def __post_init__(self) -> None:
        _at_least_one(self, "batch_size", "score_tokens")


@dataclass(frozen=True)
class VLLMConfig:
    """kind `vllm`. batch_size: sequences decoded together; score_tokens: as for `hf`, of the model that scores.

    mode       colocate: in the training process; server: on the OpenAI-compatible servers at `urls`
    sync       how weights travel: adapter, merged, full; auto: adapter if there are adapters, else full
    score      hf: the model in training scores; vllm: vLLM does, where it is exact
    tensor_parallel_size, data_parallel_size   processes to one copy of the model; copies (of a server that we start;
               tensor_parallel_size > 1 needs mode server)
    max_model_len   tokens of prompt and text together, default the model's own
    memory     share of the GPU's memory (without one, of the machine's) for weights and cache; default by what is free
    eager      no compilation and no CUDA graphs; default: on a CPU only
    prefix_caching  keep the keys and values of prompts that begin alike
    concurrency     requests in flight to one server; retry_seconds: how long a server may be away; stall_seconds: how
               long it may have requests in hand and make no token
    """

    kind: Literal["vllm"] = "vllm"
    batch_size: int = 256
    score_tokens: int = 8192
    mode: Literal["colocate", "server"] = "colocate"
    urls: tuple[str, ...] = ()
    sync: Literal["auto", "adapter", "merged", "full"] = "auto"
    score: Literal["hf", "vllm"] = "hf"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_model_len: int | None = None
    memory: float | None = None
    eager: bool | None = None
    prefix_caching: bool = True
    concurrency: int = 64
    retry_seconds: float = 60.0
    stall_seconds: float = 300.0

    def __post_init__(self) -> None:
        _at_least_one(self, "batch_size", "score_tokens", "tensor_parallel_size", "data_parallel_size")
        _at_least_one(self, "concurrency", "max_model_len")
        if self.memory is not None and not 0 < self.memory < 1:
            raise UserError(f"engine.memory is a share of the memory, in (0, 1), got {self.memory}")
        if not 0 <= self.retry_seconds < math.inf:
            raise UserError(f"engine.retry_seconds must be >= 0, got {self.retry_seconds}")
        if not 0 < self.stall_seconds < math.inf:
            raise UserError(f"engine.stall_seconds must be > 0, got {self.stall_seconds}")
        if (self.mode == "server") != bool(self.urls):
            raise UserError(
                "engine.mode server needs engine.urls, as in [http://host:8000] (vlm-reason serve CONFIG starts one)"
                if self.mode == "server"
                else "engine.urls are for engine.mode server; mode colocate runs vLLM in the training process"
            )
        for url in self.urls:
            server_address(url)


_OF_VLLM_ONLY = {f.name for f in fields(VLLMConfig)} - {f.name for f in fields(EngineConfig)}


def _at_least_one(config: EngineConfig | VLLMConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"engine.{name} must be >= 1, got {value}")


def server_address(url: str) -> tuple[str, int | None]:
    """Host and port of an entry of `urls`. UserError for what is no http(s) url."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname, parts.port
    except ValueError:  # of a port that is no number from 0 to 65535, of brackets that do not match
        pass
    raise UserError(f"engine.urls: {url!r} is not of the form http://host:port")


def engine_config(options: Mapping[str, Any]) -> EngineConfig | VLLMConfig:
    """UserError for an unknown kind or key, naming the nearest."""
    if convert(Literal["hf", "vllm"], options.get("kind", "hf"), "engine.kind") == "vllm":
        return from_dict(VLLMConfig, options, "engine")
    foreign = next((key for key in options if key in _OF_VLLM_ONLY), None)
    if foreign is not None:
        raise UserError(
            f"engine.{foreign} is a setting of vLLM, and engine.kind is 'hf': set engine.kind=vllm or leave it out"
        )
    return from_dict(EngineConfig, options, "engine")


def check_engine(options: Mapping[str, Any], adapters: bool, processes: int = 1) -> EngineConfig | VLLMConfig:
    """`engine_config`, and whether it goes with what is trained: all that can be said before a model is loaded."""
    config = engine_config(options)
    if isinstance(config, VLLMConfig):
        if config.mode == "colocate" and config.tensor_parallel_size > 1:
            raise UserError(
                f"engine.tensor_parallel_size {config.tensor_parallel_size} needs engine.mode server (vlm-reason "
                "serve CONFIG starts one): in mode colocate, processes that share an engine would have to call it "
                "equally often"
            )
        check_sync(config.sync, adapters, processes)
    return config


def make_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    folder: Path | None = None,
    runs_model: bool = True,
) -> Engine:
    """The engine over `model`. folder: where an engine with weights of its own may write, a temporary one by default
    (mode server: it must be visible to the servers under the same path). runs_model: whether it may run `model`
    (`needs_model` says whether it would). Raises UserError for an unknown kind or key, naming the nearest, and for vLLM
    that is missing or of another version."""
    config = engine_config(options)
    if isinstance(config, EngineConfig):
        return HFEngine(model, tokenizer, config.batch_size, config.score_tokens)
    folder = folder or Path(tempfile.mkdtemp(prefix="vlm-reason-engine-"))
    return _make_vllm(model, tokenizer, config, folder, runs_model)


def needs_model(config: EngineConfig | VLLMConfig, temperature: float, top_p: float) -> bool:
    """Whether the engine would run the model of this process for texts sampled under this law: `hf` always; vLLM when
    it does not score, or has no log-probabilities of that law."""
    return (
        isinstance(config, EngineConfig) or config.score == "hf" or not has_prompt_logps(temperature, top_p)
    )


def _make_vllm(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: VLLMConfig, folder: Path, runs_model: bool
) -> Engine:
    from .vllm import Backend, VLLMEngine

    kind = config.sync
    if kind == "auto":
        kind = "adapter" if adapter_names(model) else "full"
    folder = folder.absolute()
    backend: Backend
    if config.mode == "server":
        from .vllm_server import Servers

        backend = Servers(config.urls, config.concurrency, config.retry_seconds, config.stall_seconds, folder)
    else:
        from .vllm_colocate import Colocated

        check_installed()
        if not prepared():
            note(
                "vLLM on a CPU is several times slower than it could be in a process that was not started for it: use "
                "the vlm-reason command, or start yours with vlm_reason.engines.launch.vllm_environment()"
            )
        causal = unwrap(model)
        ranks = _ranks(model) if kind == "adapter" else []
        source = model_folder(model, tokenizer, folder)
        backend = Colocated(vllm_settings(causal.config, causal.dtype, config, source, ranks))
    scorer = HFEngine(model, tokenizer, config.batch_size, config.score_tokens) if runs_model else None
    return VLLMEngine(
        backend, model, tokenizer, scorer, kind, folder, score_here=config.score == "vllm", note=note
    )


def vllm_settings(
    pretrained: PreTrainedConfig, dtype: torch.dtype, config: VLLMConfig, source: str, ranks: Sequence[int]
) -> Settings:
    """What vLLM is started with, here or as a server. ranks: of the LoRA adapters served beside the model, if any."""
    from .vllm_colocate import cache_bytes_on_cpu

    cuda = torch.cuda.is_available()
    own = getattr(pretrained.get_text_config(), "max_position_embeddings", None)
    context = config.max_model_len or own or 8192
    share = config.memory
    if cuda and share is None:
        free, total = torch.cuda.mem_get_info()
        share = round((0.5 if config.mode == "colocate" else 0.9) * free / total, 2)
    return Settings(
        folder=source,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.max_model_len,
        max_num_seqs=config.batch_size,
        tensor_parallel_size=config.tensor_parallel_size,
        external_launcher=False,
        cache_bytes=None
        if cuda
        else cache_bytes_on_cpu(pretrained, dtype, config.batch_size, context, share),
        memory_share=share if cuda else None,
        eager=config.eager if config.eager is not None else not cuda,
        chunked_prefill=cuda,
        prefix_caching=config.prefix_caching,
        lora_rank=lora_rank(max(ranks)) if ranks else None,
        adapters=len(ranks) + (not cuda),  # Settings says why
    )


def serve_command(
    name: str, dtype: str, config: VLLMConfig, adapter: AdapterConfig | None, host: str, port: int
) -> list[str]:
    """Arguments of `python` that start a server for model `name`, beside which two adapters are trained (None: its own
    weights). The weights are not loaded here."""
    check_sync(config.sync, adapter is not None)
    check_installed()
    pretrained = load_model_config(name)
    source = str(pretrained._name_or_path)
    precision = cast(torch.dtype, getattr(torch, dtype) if dtype != "auto" else pretrained.dtype)
    served_beside = adapter is not None and config.sync in ("auto", "adapter")
    ranks = [adapter.r] * len((REASONER, POSTERIOR)) if adapter is not None and served_beside else []
    return server_arguments(
        source,
        host=host,
        port=port,
        settings=vllm_settings(pretrained, precision, config, source, ranks),
        data_parallel_size=config.data_parallel_size,
        served_name="base",
    )


def model_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Where vLLM can read the model: the folder or hub id it came from; one made in memory is written to `folder`."""
    causal = unwrap(model)
    source = cast(str, getattr(causal.config, "_name_or_path", "") or "")
    if source:
        return source
    target = write_weights(folder, "base-model", policy_weights(model))
    causal.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def _ranks(model: nn.Module) -> list[int]:
    return [model.peft_config[name].r for name in adapter_names(model)]  # type: ignore[union-attr, index]


def note(text: str) -> None:
    print(f"vlm-reason: {text}", file=sys.stderr)
