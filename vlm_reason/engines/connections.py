"""HTTP to one server, over connections that another thread can break.

A thread that waits for an answer is deaf to everything else until the answer or its time-out comes. Where that may be
long, whoever learns that the answer is of no use any more (Ctrl-C, a server that is stuck) breaks the connections, and
every read fails at once. vLLM then drops the requests that came over them.
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import urllib3

CONNECT_TIMEOUT = 10.0
"""Seconds until a connection stands."""


class Connections:
    """A pool of connections to `url`; at most `size` of them are kept open between requests."""

    def __init__(self, url: str, size: int) -> None:
        self._prefix = urlsplit(url).path.rstrip("/")
        self._pool = urllib3.connection_from_url(url, maxsize=size, block=False, retries=False)
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        plain = self._pool.ConnectionCls

        def connection(**settings: Any) -> Any:  # as the pool makes them, and remembered
            made = plain(**settings)
            with self._lock:
                self._live.add(made)
            return made

        self._pool.ConnectionCls = connection  # type: ignore[assignment]

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None
    ) -> urllib3.BaseHTTPResponse:
        """The whole answer. `seconds`: until it begins, None for as long as it takes. urllib3's HTTPError where there
        is none."""
        limit = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=seconds)
        return self._pool.request(method, self._prefix + path, json=body, timeout=limit)

    def shut(self) -> None:
        """Break every connection: who waits on one gets an error now. Later requests open new ones."""
        with self._lock:
            live = list(self._live)
        for connection in live:
            sock = getattr(connection, "sock", None)
            if sock is not None:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed by the other side already
                    pass
