"""Addresses of vLLM servers: what listens where, and what answers there that is no vLLM server."""

from __future__ import annotations

import json
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlm_reason.cli.serve import _address
from vlm_reason.engines import server as one_server
from vlm_reason.engines.base import EngineLost
from vlm_reason.engines.make import server_address
from vlm_reason.engines.server import Server
from vlm_reason.errors import UserError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:8000", ("a", 8000)),
        ("https://gpu-3.cluster/", ("gpu-3.cluster", None)),
        ("http://[::1]:81", ("::1", 81)),
    ],
)
def test_host_and_port_of_a_url(url: str, address: tuple[str, int | None]) -> None:
    assert server_address(url) == address


@pytest.mark.parametrize("url", ["http://[::1", "a:8000", "http://a:x", "http://a:99999"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(UserError, match="is not of the form http://host:port"):
        server_address(url)


@pytest.mark.parametrize(
    ("urls", "options", "address"),
    [
        ((), {}, ("127.0.0.1", 8000)),
        (("http://a:1", "http://b:2"), {}, ("a", 1)),
        (("http://a:1", "http://b:2"), {"index": 1}, ("b", 2)),
        (("http://a:1", "http://b:2"), {"index": 1, "host": "0.0.0.0", "port": 7}, ("0.0.0.0", 7)),
    ],
)
def test_where_a_server_listens(urls: tuple[str, ...], options: dict, address: tuple[str, int]) -> None:
    assert _address(urls, Namespace(**{"index": 0, "host": None, "port": None, **options})) == address


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": 4}, "--index 4: engine.urls has 0 entries"),
        ({"index": -1}, "--index -1: engine.urls has 0 entries"),
        ({"port": 0}, "--port must be from 1 to 65535, got 0"),
        ({"port": 70000}, "--port must be from 1 to 65535, got 70000"),
    ],
)
def test_where_no_server_can_listen(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _address((), Namespace(**{"index": 0, "host": None, "port": None, **options}))


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """The url of an HTTP server that says the same to every GET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>It works!</html>", "is no vLLM server: /version has no 'version'"),
        (200, b"[]", "is no vLLM server: /version has no 'version'"),
        (200, b"", "is no vLLM server: /version has no 'version'"),
        (200, json.dumps({"version": "0.1.2"}).encode(), "is version 0.1.2, and this package works with"),
        (404, b"no such page", "is no vLLM server: it has no /version; start one with `vlm-reason serve"),
        (401, b"who are you?", "refused /version: who are you[?]"),
    ],
)
def test_what_is_no_vllm_server_is_named(status: int, body: bytes, message: str) -> None:
    with answering(status, body) as url, pytest.raises(UserError, match=message) as caught:
        Server(url, 1, retry_seconds=0.0, stall_seconds=1.0).check()
    assert url in str(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(one_server, "STATUS_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(EngineLost, match=r"is gone: /version failed for \d s \(ReadTimeoutError\)"):
            Server(url, 1, retry_seconds=0.1, stall_seconds=1.0).check()
