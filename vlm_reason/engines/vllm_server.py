"""vLLM on OpenAI-compatible servers: one or many, here or elsewhere, started by `vlm-reason serve` or otherwise.

Requests go out as token ids, one HTTP call each with its own seed. Which server gets a request follows from where it
stands among the others, and the answer from the request alone, so two servers give one server's samples. Weights travel
as files in a folder that the servers see under the same path.

A server that does not answer is tried again with growing pauses. When it stays away, or answers its status and makes no
token, the run ends with an error that names it; what had been sampled is in the reply cache, and the next start asks
only for the rest.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..compat.vllm import Output
from ..errors import UserError
from .base import EngineLost
from .processes import rank
from .replies import ReplyCache
from .server import NotServed, Server
from .sync import prune, write_weights
from .vllm import Call

PULSE = 1.0
"""Seconds between two looks at whether servers still make tokens."""


class Servers:
    """The `Backend` of mode `server`. `folder`: weights and replies; the servers read the weights there."""

    def __init__(
        self, urls: Sequence[str], concurrency: int, retry_seconds: float, stall_seconds: float, folder: Path
    ) -> None:
        self._concurrency = concurrency
        self._folder = folder
        self._writes = rank() == 0
        self.replies = ReplyCache(folder / f"replies-{rank()}.jsonl")
        self._adapters: dict[str, Path] = {}
        self._restoring = threading.Lock()
        self._weights: tuple[str, Path] | None = None
        threads = len(urls) * concurrency
        self._servers = [Server(url.rstrip("/"), threads, retry_seconds, stall_seconds) for url in urls]
        self.context = min(server.check() for server in self._servers)

    def generate(self, calls: Sequence[Call], progress: str | None) -> list[Output]:
        under = self._weights[0] if self._weights else "base"
        outputs: dict[int, Output] = {}
        waiting: list[int] = []
        for i, call in enumerate(calls):
            known = self.replies.get(call, call.adapter or under)
            if known is None:
                waiting.append(i)
            else:
                outputs[i] = known
        if not waiting:
            return [outputs[i] for i in range(len(calls))]
        used = [server for server in self._servers if any(server is s for s in self._dealt(calls))]
        since = [server.started() if self._weights else None for server in used]
        for server in used:
            server.begin()
            server.check_serving(set(self._adapters), self._weights, self._restore)

        dealt = self._dealt(calls)
        bar = tqdm(total=len(calls), initial=len(outputs), desc=progress, unit="seq", file=sys.stderr,
                   disable=progress is None, leave=False, mininterval=0.5)  # fmt: skip

        def ask(i: int) -> tuple[int, Output]:
            output = self._complete(dealt[i], calls[i])
            self.replies.put(calls[i], calls[i].adapter or under, output)
            bar.update()
            return i, output

        try:
            with bar, ThreadPoolExecutor(len(used) * self._concurrency) as pool:
                futures = [pool.submit(ask, i) for i in waiting]
                try:
                    _until_answered(futures, used)
                except BaseException:  # Ctrl-C: what is queued or on its way is dropped, there and here
                    _drop(futures, used)
                    raise
        finally:  # weights have no name in a request: a server that was started anew answered with those it came with
            anew = [s for s, before in zip(used, since, strict=True) if s.started_again(before)]
            doubtful = [i for i in waiting if any(dealt[i] is server for server in anew)]
            self.replies.forget([(calls[i], calls[i].adapter or under) for i in doubtful])
        if doubtful:
            return self.generate(calls, progress)
        outputs.update(future.result() for future in futures)
        return [outputs[i] for i in range(len(calls))]

    def _complete(self, server: Server, call: Call) -> Output:
        """A server that was started anew between two requests gets the adapters again, once a request."""
        try:
            return server.complete(call)
        except NotServed:
            if call.adapter not in self._adapters:
                raise
        try:
            with self._restoring:  # whoever comes second finds them there
                server.serve_adapters(self._adapters)
            return server.complete(call)
        except EngineLost:
            raise
        except UserError as error:
            raise EngineLost(
                f"the server at {server.url} lost the adapter {call.adapter!r} and cannot be given it again ({error}); "
                "start it with `vlm-reason serve` and repeat the command: what was sampled is kept"
            ) from error

    def _dealt(self, calls: Sequence[Call]) -> list[Server]:
        """The server of every call. Calls with one prompt go to one server, which then runs the prompt once."""
        order: dict[tuple[int, ...], int] = {}
        for call in calls:
            order.setdefault(call.prompt_ids, len(order))
        return [self._servers[order[call.prompt_ids] % len(self._servers)] for call in calls]

    # ---- weights -------------------------------------------------------------------------------------------

    def begin_version(self, version: int) -> None:
        self.replies.begin_version(version)

    def serve_adapters(self, folders: Mapping[str, Path]) -> None:
        self._adapters = dict(
            folders
        )  # every process knows them, to give them to a server that is started anew
        if self._writes:
            for server in self._servers:
                server.serve_adapters(self._adapters)

    def load_weights(self, served: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        hasher = hashlib.blake2b(digest_size=4)
        hashed = _hashed(tensors, hasher)
        try:
            if self._writes:
                write_weights(self._folder, served, hashed)
        finally:
            for _ in hashed:  # every process takes part in gathering them, whatever went wrong in writing
                pass
        self._weights = (f"{served}-{hasher.hexdigest()}", self._folder / served)
        if self._writes:
            for server in self._servers:
                server.load_weights(*self._weights)
            prune(self._folder, [served, *self._adapters])

    def _restore(self, server: Server) -> None:
        """Give a server that was started anew what the others serve."""
        if self._weights is not None:
            server.load_weights(*self._weights)
        server.serve_adapters(self._adapters)

    def close(self) -> None:
        """Whoever samples, in whichever thread, gets an error now; the servers drop what they were asked for."""
        for server in self._servers:
            server.close()


def _until_answered(futures: Sequence[Future[Any]], servers: Sequence[Server]) -> None:
    """Wait for all; raise what the first one that failed raised, when those on their way have ended (their replies are
    kept) and the queued ones are dropped."""
    pending, failed = set(futures), None
    while pending:
        done, pending = wait(pending, PULSE, FIRST_EXCEPTION)
        if failed is None:
            failed = next((f for f in done if not f.cancelled() and f.exception() is not None), None)
            if failed is not None:
                for future in pending:
                    future.cancel()
                for server in servers:
                    server.stop.set()
        for server in servers:
            server.watch()
    if failed is not None:
        failed.result()


def _drop(futures: Sequence[Future[Any]], servers: Sequence[Server]) -> None:
    """End all requests, here and on the servers, which stop writing when their connections break."""
    for future in futures:
        future.cancel()
    while not all(future.done() for future in futures):
        for server in servers:
            server.give_up()
        wait(futures, 0.2)


def _hashed(tensors: Iterator[tuple[str, Tensor]], hasher: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield name, tensor
