"""vLLM servers for tests: started by `vlm-reason serve`, on free ports, paused, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Cluster:
    """Servers of the model that `recipe` names; `start` and `wait` one before it is asked."""

    recipe: Path
    urls: list[str]
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)

    def start(self, index: int) -> None:
        command = [sys.executable, "-m", "vlm_reason", "serve", str(self.recipe), "--index", str(index)]
        with open(self._log(index), "a") as log:
            process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, start_new_session=True)
        self.processes[index] = process

    def wait(self, index: int, seconds: float = 700.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.processes[index].poll() is None, self._log(index).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.urls[index]}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"server {index} did not start")

    def kill(self, index: int) -> None:
        """The server and the processes beside it, as a machine that goes away."""
        os.killpg(self.processes[index].pid, signal.SIGKILL)
        self.processes[index].wait()

    @contextmanager
    def paused(self, index: int) -> Iterator[None]:
        """The engine behind the server stands still: it answers its status, takes requests, and completes none."""
        engine = psutil.Process(self.processes[index].pid).children(recursive=True)
        for process in engine:
            process.suspend()
        try:
            yield
        finally:
            for process in engine:
                if process.is_running():
                    process.resume()

    def running(self, index: int) -> float:
        """Requests that the server has in hand, by its own count."""
        with urllib.request.urlopen(f"{self.urls[index]}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))

    def stop(self) -> None:
        for index, process in self.processes.items():
            if process.poll() is None:
                self.kill(index)

    def _log(self, index: int) -> Path:
        return self.recipe.with_suffix(f".{index}.log")


def cluster_of(model: str, folder: Path, servers: int, **engine: Any) -> Cluster:
    """Not yet started."""
    urls = [f"http://127.0.0.1:{port}" for port in _free_ports(servers)]
    settings = {"kind": "vllm", "mode": "server", "urls": urls, **engine}
    recipe = folder / "recipe.json"
    adapter = {"r": 4, "alpha": 8}
    recipe.write_text(
        json.dumps({"model": model, "dtype": "float32", "adapter": adapter, "engine": settings})
    )
    return Cluster(recipe, urls)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def small_model(folder: Path) -> str:
    """A Llama with the tests' tokenizer and heads of width 32, the least that vLLM's kernels take; random, far from
    flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.__wrapped__().save_pretrained(folder)
    return str(folder)
