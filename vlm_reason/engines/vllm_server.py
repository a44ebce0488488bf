"""vLLM on OpenAI-compatible servers: one or many, here or elsewhere, started by `vlm-reason serve` or otherwise.

Requests go out as token ids, one HTTP call each with its own seed. Which server gets a request follows from where it
stands among the others, and the answer from the request alone, so two servers give one server's samples. Weights travel
as files in a folder that the servers see under the same path.

A server that does not answer is tried again with growing pauses. When it stays away the run ends with an error that
names it; what had been sampled is in the reply cache, and the next start asks only for the rest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import urllib3
from torch import Tensor
from tqdm import tqdm

from ..compat.vllm import Output, check_version
from ..compat.vllm_worker import METHOD
from ..errors import UserError
from .base import EngineLost
from .replies import ReplyCache
from .sync import prune, write_weights
from .vllm import Call

LONGEST_PAUSE = 8.0
"""Seconds between two attempts to reach a server, at most."""

ANSWER_TIMEOUT = 1800.0
"""Seconds one answer may take, waiting in the server's queue included."""

STATUS_TIMEOUT = 30.0
"""Seconds until a server says what it is and serves, which it does at once however full its queue is."""


START_ONE = "start one with `vlm-reason serve CONFIG`, and give its address without a path"


class Servers:
    """The `Backend` of mode `server`. `folder`: weights and replies; the servers read the weights there."""

    own_process = False

    def __init__(self, urls: Sequence[str], concurrency: int, retry_seconds: float, folder: Path) -> None:
        self._concurrency = concurrency
        self._folder = folder
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._writes = rank == 0
        self.replies = ReplyCache(folder / f"replies-{rank}.jsonl")
        self._adapters: dict[str, Path] = {}
        self._weights: tuple[str, Path] | None = None
        self._servers = [Server(url.rstrip("/"), concurrency, retry_seconds) for url in urls]
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
        for server in used:
            server.check_serving(set(self._adapters), self._weights, self._restore)

        dealt = self._dealt(calls)
        stop = threading.Event()
        bar = tqdm(total=len(calls), initial=len(outputs), desc=progress, unit="seq", file=sys.stderr,
                   disable=progress is None, leave=False, mininterval=0.5)  # fmt: skip

        def ask(i: int) -> tuple[int, Output]:
            output = dealt[i].complete(calls[i], stop)
            self.replies.put(calls[i], calls[i].adapter or under, output)
            bar.update()
            return i, output

        with bar, ThreadPoolExecutor(len(used) * self._concurrency) as pool:
            futures = [pool.submit(ask, i) for i in waiting]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C: only those in flight end
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
            failed = next((f for f in done if not f.cancelled() and f.exception() is not None), None)
            if failed is not None:
                stop.set()
                pool.shutdown(cancel_futures=True)  # those in flight end, and their replies are kept
                failed.result()
            outputs.update(future.result() for future in futures)
        return [outputs[i] for i in range(len(calls))]

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
        self._adapters = dict(folders)
        for server in self._servers:
            server.serve_adapters(self._adapters)

    def load_weights(self, served: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        hasher = hashlib.blake2b(digest_size=4)
        hashed = _hashed(tensors, hasher)
        if self._writes:
            write_weights(self._folder, served, hashed)
        else:
            for _ in hashed:  # every process takes part in gathering them
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
        for server in self._servers:
            server.pool.clear()


class Server:
    """One server: HTTP with retries."""

    def __init__(self, url: str, concurrency: int, retry_seconds: float) -> None:
        self.url = url
        self.retry_seconds = retry_seconds
        self.base = ""
        self.pool = urllib3.PoolManager(
            maxsize=concurrency,
            block=False,
            retries=False,
        )

    # ---- what it is ----------------------------------------------------------------------------------------

    def check(self) -> int:
        """The server's context. UserError for another version of vLLM, or log-probabilities of another law."""
        check_version(str(self._status("/version", "version")), f"vLLM at {self.url}")
        models = self._status("/v1/models", "data")
        served = next((m for m in models if m.get("parent") is None), None)
        if served is None:
            raise UserError(f"the server at {self.url} serves no model")
        self.base = served["id"]
        self._check_processed_logprobs()
        return int(served["max_model_len"])

    def _status(self, path: str, key: str) -> Any:
        reply = self.call("GET", path)
        if not isinstance(reply, dict) or key not in reply:
            raise UserError(
                f"what answers at {self.url} is no vLLM server: {path} has no {key!r}; {START_ONE}"
            )
        return reply[key]

    def _check_processed_logprobs(self) -> None:
        """A token's log-probability at temperature 0.5 must differ from that at 1, as only processed ones do."""
        greedy = self.complete(Call((1, 2, 3), 1, temperature=0.0))
        found = []
        for temperature in (1.0, 0.5):
            body = {**self._body(Call((1, 2, 3), 1, temperature=temperature, seed=0)), "logit_bias": {}}
            body |= {"logprob_token_ids": [greedy.ids[0]], "logprobs": 1}
            top = self.call("POST", "/v1/completions", body)["choices"][0]["logprobs"]["top_logprobs"][0]
            found.append(sorted(top.values()))
        if found[0] == found[1]:
            raise UserError(
                f"the server at {self.url} reports log-probabilities before temperature and top-p: start it with "
                "`vlm-reason serve`, or with --logprobs-mode processed_logprobs"
            )

    def check_serving(
        self, adapters: set[str], weights: tuple[str, Path] | None, restore: Callable[[Server], None]
    ) -> None:
        """The versions that are about to be sampled are the ones that are there; restored once if they are not."""
        for attempt in range(2):
            missing = sorted(adapters - self._models())
            loaded = self.call("GET", "/weight_info")["weight_version"] if weights is not None else None
            if not missing and (weights is None or loaded == weights[0]):
                return
            if attempt == 0:
                restore(self)
        raise UserError(
            f"the server at {self.url} does not serve {missing[0] if missing else weights and weights[0]!r} after it "
            "was loaded there: is another run using it? One server serves one run at a time"
        )

    # ---- requests ------------------------------------------------------------------------------------------

    def complete(self, call: Call, stop: threading.Event | None = None) -> Output:
        body = self._body(call)
        reply = self.call("POST", "/v1/completions", body, stop)
        if reply["model"] != body["model"]:
            raise UserError(f"the server at {self.url} answered as {reply['model']!r} for {body['model']!r}")
        choice = reply["choices"][0]
        prompt = None
        if call.prompt_logps:
            own = zip(call.prompt_ids, choice["prompt_logprobs"], strict=True)
            prompt = tuple(None if entry is None else entry[str(token)]["logprob"] for token, entry in own)
        return Output(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), prompt)

    def _body(self, call: Call) -> dict[str, Any]:
        fields = {
            "model": call.adapter or self.base,
            "prompt": list(call.prompt_ids),
            "return_token_ids": True,
            **call.parameters(),
        }
        return {key: value for key, value in fields.items() if value is not None}

    # ---- weights -------------------------------------------------------------------------------------------

    def _models(self) -> set[str]:
        return {model["id"] for model in self.call("GET", "/v1/models")["data"]}

    def serve_adapters(self, folders: Mapping[str, Path]) -> None:
        there = self._models()
        for name in sorted(there - set(folders)):
            if "@" in name:  # an earlier version's
                self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        for name, folder in folders.items():
            if name not in there:
                self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def load_weights(self, served: str, folder: Path) -> None:
        body = {"method": METHOD, "kwargs": {"weights_path": str(folder)}}
        self.call("POST", "/collective_rpc", body)
        self.call("POST", "/reset_prefix_cache")
        self.call("POST", "/update_weight_version", {"new_version": served})

    # ---- HTTP ----------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """The decoded answer. Connection failures and the server's own errors are tried again for `retry_seconds`;
        EngineLost after that. UserError for what the server refuses."""
        first_failure: float | None = None
        pause = 0.25
        limit = urllib3.Timeout(connect=10.0, read=STATUS_TIMEOUT if method == "GET" else ANSWER_TIMEOUT)
        while True:
            try:
                response = self.pool.request(method, self.url + path, json=body, timeout=limit)
                if response.status < 500:
                    return self._answer(path, response)
                trouble = f"HTTP {response.status} {response.data[:200].decode(errors='replace')}"
            except urllib3.exceptions.HTTPError as error:
                trouble = type(error).__name__
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if now - first_failure >= self.retry_seconds or (stop is not None and stop.is_set()):
                raise EngineLost(
                    f"the server at {self.url} is gone: {path} failed for {now - first_failure:.0f} s ({trouble}); "
                    "start it again and repeat the command: what was sampled is kept"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _answer(self, path: str, response: urllib3.BaseHTTPResponse) -> Any:
        if response.status == 404 and path == "/version":
            raise UserError(f"what answers at {self.url} is no vLLM server: it has no {path}; {START_ONE}")
        if response.status >= 400:
            text = response.data.decode(errors="replace")
            try:
                text = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                pass
            hint = ""
            if response.status == 404 and path != "/v1/completions":
                hint = "; start it with `vlm-reason serve`, which lets adapters and weights be loaded while it runs"
            raise UserError(f"the server at {self.url} refused {path}: {' '.join(text.split())[:300]}{hint}")
        try:
            return json.loads(response.data) if response.data else None
        except ValueError:
            return response.data.decode(errors="replace")


def _hashed(tensors: Iterator[tuple[str, Tensor]], hasher: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield name, tensor
