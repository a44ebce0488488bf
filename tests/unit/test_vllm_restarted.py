"""A server that is started anew inside a window, spoken to over HTTP: it has lost the adapters, and gets them again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from vlm_reason.engines import vllm_server
from vlm_reason.engines.base import EngineLost
from vlm_reason.engines.replies import ReplyCache
from vlm_reason.engines.server import NotServed, Server
from vlm_reason.engines.vllm import Call
from vlm_reason.engines.vllm_server import Servers

SERVED = "reasoner@3-aa"


class Speaker(ThreadingHTTPServer):
    """What vLLM's server answers to adapters, weights and completions. After `forgets_after` completions it is as if
    started anew: adapters and weights are gone. A completion's token is the seed that was asked for, + 100 under
    weights that were loaded."""

    daemon_threads = True

    def __init__(self, forgets_after: int, loads: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.forgets_after, self.loads = forgets_after, loads
        self.models: dict[str, str] = {}
        self.loaded: list[tuple[str, str]] = []
        self.answered = self.starts = 0
        self.version = "default"
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reply(self, path: str, body: dict) -> tuple[int, object]:
        with self.lock:
            if path == "/v1/models":
                return 200, {"data": [{"id": name} for name in ("base", *self.models)]}
            if path == "/weight_info":
                return 200, {"weight_version": self.version}
            if path == "/update_weight_version":
                self.version = body["new_version"]
            if path in ("/collective_rpc", "/reset_prefix_cache", "/update_weight_version"):
                self.loaded.append((path, self.version))
                return 200, {}
            if path == "/metrics":
                return (
                    200,
                    f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {self.starts}.5e+09\n",
                )
            if path == "/v1/load_lora_adapter":
                if not self.loads:
                    return 404, {"error": {"message": "Not Found"}}
                self.models[body["lora_name"]] = body["lora_path"]
                self.loaded.append((body["lora_name"], body["lora_path"]))
                return 200, "ok"
            assert path == "/v1/completions"
            if self.answered == self.forgets_after:
                self.forgets_after, self.models, self.version, self.starts = (
                    -1,
                    {},
                    "default",
                    self.starts + 1,
                )
            if body["model"] not in ("base", *self.models):
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            self.answered += 1
            token = body["seed"] + (0 if self.version == "default" else 100)
            choice = {"token_ids": [token], "logprobs": {"token_logprobs": [-0.5]}}
            return 200, {"model": body["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Speaker

    def answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, reply = self.server.reply(self.path, json.loads(text) if text else {})
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def speaking() -> Iterator[list[Speaker]]:
    started: list[Speaker] = []
    yield started
    for server in started:
        server.shutdown()
        server.server_close()


def named(server: Server) -> int:
    server.base = "base"
    return 100


def backend_at(
    started: list[Speaker],
    monkeypatch,
    folder: Path,
    forgets_after: int,
    loads: bool = True,
    rank: int = 0,
    adapters: bool = True,
) -> Servers:
    """`Servers` of one server, which serves the adapter (or none). Its checks of a real one are passed over."""
    server = Speaker(forgets_after)
    started.append(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Server, "check", named)
    monkeypatch.setattr(vllm_server, "rank", lambda: 0)
    folders = {SERVED: folder / SERVED} if adapters else {}
    if rank:  # rank 0 has posted it
        Servers([server.url], 4, 0.0, 5.0, folder).serve_adapters(folders)
        monkeypatch.setattr(vllm_server, "rank", lambda: rank)
    backend = Servers([server.url], 4, 0.0, 5.0, folder)
    backend.serve_adapters(folders)
    server.loads = loads
    return backend


@pytest.mark.parametrize("rank", [0, 1])
def test_lost_adapters_come_back_inside_a_window(speaking, monkeypatch, tmp_path: Path, rank: int) -> None:
    """Whichever process finds them missing: every request is answered under the adapter, which is posted once more."""
    backend = backend_at(speaking, monkeypatch, tmp_path, forgets_after=5, rank=rank)
    calls = [Call((1, 2), 4, seed=i, adapter=SERVED) for i in range(16)]
    outputs = backend.generate(calls, None)
    assert [(o.ids, o.logps) for o in outputs] == [((i,), (-0.5,)) for i in range(16)]
    assert speaking[0].loaded == [(SERVED, str(tmp_path / SERVED))] * 2
    assert speaking[0].answered == 16 and len(backend.replies) == 16


def test_a_server_that_cannot_take_them_again_is_lost_and_what_was_sampled_kept(
    speaking, monkeypatch, tmp_path: Path
) -> None:
    backend = backend_at(speaking, monkeypatch, tmp_path, forgets_after=5, loads=False)
    calls = [Call((1, 2), 4, seed=i, adapter=SERVED) for i in range(16)]
    with pytest.raises(EngineLost, match=rf"server at {speaking[0].url} lost the adapter '{SERVED}'"):
        backend.generate(calls, None)
    assert len(backend.replies) == speaking[0].answered == 5


def test_other_ranks_know_what_is_served_and_post_nothing(speaking, monkeypatch, tmp_path: Path) -> None:
    backend_at(speaking, monkeypatch, tmp_path, forgets_after=-1, rank=1)
    assert speaking[0].loaded == [(SERVED, str(tmp_path / SERVED))]


def test_a_model_nobody_asked_it_to_serve_is_the_users_to_mend(speaking, monkeypatch, tmp_path: Path) -> None:
    backend = backend_at(speaking, monkeypatch, tmp_path, forgets_after=-1)
    with pytest.raises(NotServed, match=r"The model `other@1` does not exist\.$"):
        backend.generate([Call((1, 2), 4, adapter="other@1")], None)
    assert len(speaking[0].loaded) == 1


def test_no_text_of_lost_weights_is_taken_for_one_of_the_policy(
    speaking, monkeypatch, tmp_path: Path
) -> None:
    """All weights are served under one name: the answers of a server that lost them look like any other's. What was
    sampled around the restart is forgotten, and asked for again under the weights."""
    backend = backend_at(speaking, monkeypatch, tmp_path, forgets_after=9, adapters=False)
    backend.load_weights("reasoner@3", iter([("w", torch.ones(2))]))
    loaded = speaking[0].version
    assert loaded.startswith("reasoner@3-")
    before = [Call((1, 2), 4, seed=i) for i in range(4)]
    backend.generate(before, None)
    calls = [Call((1, 2), 4, seed=i) for i in range(20)]
    outputs = backend.generate(calls, None)
    assert [o.ids for o in outputs] == [(100 + i,) for i in range(20)]
    assert speaking[0].version == loaded and len(backend.replies) == 20
    assert speaking[0].answered == 4 + 16 + 16  # the four of the call before were right, and are kept
    kept = ReplyCache(tmp_path / "replies-0.jsonl")
    assert [kept.get(call, loaded) for call in calls] == outputs
