"""One vLLM server: HTTP with retries, and a watch over whether it makes tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from ..compat.vllm import Output, check_version
from ..compat.vllm_worker import METHOD
from ..errors import UserError
from .base import EngineLost
from .connections import Connections
from .vllm import Call

LONGEST_PAUSE = 8.0
"""Seconds between two attempts to reach a server, at most."""

LOADING_TIMEOUT = 1800.0
"""Seconds until weights are loaded, from whatever disk they are on."""

STATUS_TIMEOUT = 30.0
"""Seconds until a server says what it is and serves, which it does at once however full its queue is."""

COMPLETIONS = "/v1/completions"
START_ONE = "start one with `vlm-reason serve CONFIG`, and give its address without a path"


class NotServed(UserError):
    """The server does not know the model that a request asks for: another run's, or it was started anew."""


class Server:
    """The server at `url`. It is given up when it stays away for `retry_seconds`, or makes no token for
    `stall_seconds` while requests wait for it.

    stop: nobody waits for this server any longer, so what fails is not tried again.
    """

    def __init__(self, url: str, threads: int, retry_seconds: float, stall_seconds: float) -> None:
        self.url = url
        self.retry_seconds, self.stall_seconds = retry_seconds, stall_seconds
        self.base = ""
        self.stop = threading.Event()
        self._connections = Connections(url, threads + 1)  # and one that watches
        self._closed = False
        self._stalled = False
        self._unchanged = False  # known to have the weights it was started with, as nobody else replaces them
        self._lock = threading.Lock()
        self._in_flight = 0
        self._tokens = 0.0
        self._looked = self._progress = time.monotonic()

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
        greedy = self.complete(Call((1, 2, 3), 1, temperature=0.0), self.stall_seconds)
        found = []
        for temperature in (1.0, 0.5):
            body = {**self._body(Call((1, 2, 3), 1, temperature=temperature, seed=0)), "logit_bias": {}}
            body |= {"logprob_token_ids": [greedy.ids[0]], "logprobs": 1}
            reply = self.call("POST", COMPLETIONS, body, self.stall_seconds)
            found.append(sorted(reply["choices"][0]["logprobs"]["top_logprobs"][0].values()))
        if found[0] == found[1]:
            raise UserError(
                f"the server at {self.url} reports log-probabilities before temperature and top-p: start it with "
                "`vlm-reason serve`, or with --logprobs-mode processed_logprobs"
            )

    def check_serving(
        self, adapters: set[str], weights: tuple[str, Path] | None, restore: Callable[[Server], None]
    ) -> None:
        """The versions that are about to be sampled are the ones that are there; restored once if they are not.
        UserError where that is not possible, or adapters would be served beside weights that another run left."""
        if weights is None and not self._unchanged:
            self._check_unchanged()
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

    def started(self) -> float | None:
        """When its process was started (Unix seconds), None where it does not say: it is away, for one."""
        try:
            response = self._connections.request("GET", "/metrics", None, STATUS_TIMEOUT / 6)
        except urllib3.exceptions.HTTPError:
            return None
        lines = response.data.decode(errors="replace").splitlines()
        return next((float(x.split()[1]) for x in lines if x.startswith("process_start_time_seconds ")), None)

    def started_again(self, before: float | None) -> bool:
        """Is it another process than the one of which `started` was `before`?"""
        now = None if before is None else self.started()
        return now is not None and now != before

    # ---- requests ------------------------------------------------------------------------------------------

    def complete(self, call: Call, seconds: float | None = None) -> Output:
        """By default it takes as long as it takes; `watch`, called now and then, ends it where no token is made."""
        body = self._body(call)
        with self._in_hand():
            reply = self.call("POST", COMPLETIONS, body, seconds)
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

    def _check_unchanged(self) -> None:
        try:
            loaded = str(self.call("GET", "/weight_info")["weight_version"])
        except EngineLost:
            raise
        except UserError:  # a server whose weights cannot be replaced does not have the question
            loaded = ""
        if "@" in loaded and not loaded.startswith("base@"):
            raise UserError(
                f"the server at {self.url} holds weights that another run trained ({loaded!r}): start it again"
            )
        self._unchanged = True

    def _models(self) -> set[str]:
        return {model["id"] for model in self.call("GET", "/v1/models")["data"]}

    def serve_adapters(self, folders: Mapping[str, Path]) -> None:
        there = self._models()
        for name in sorted(there - set(folders)):
            if "@" in name:  # an earlier version's
                self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        for name, folder in folders.items():
            if name not in there:
                try:
                    self.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
                except UserError:
                    if (
                        name not in self._models()
                    ):  # else another process was first: the name says its content
                        raise

    def load_weights(self, served: str, folder: Path) -> None:
        body = {"method": METHOD, "kwargs": {"weights_path": str(folder)}}
        self.call("POST", "/collective_rpc", body)
        self.call("POST", "/reset_prefix_cache")
        self.call("POST", "/update_weight_version", {"new_version": served})

    # ---- progress ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Requests are about to be sent, and watched."""
        self._stalled = False
        self._progress = time.monotonic()
        self.stop.clear()
        if self._closed:  # by another thread
            self.stop.set()

    @contextmanager
    def _in_hand(self) -> Iterator[None]:
        with self._lock:
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                self._progress = time.monotonic()

    def watch(self) -> None:
        """Break off the requests of a server that has made no token for `stall_seconds` although it was asked for some,
        by its own counters; an answer counts, too."""
        if self._stalled or self._closed:  # a request may have been between two connections
            self._connections.shut()
            return
        now = time.monotonic()
        if not self._in_flight or now - self._progress < self.stall_seconds / 4:
            return
        if now - self._looked >= min(self.stall_seconds / 4, 10.0):
            self._looked = now
            if self._has_moved():
                self._progress = now
        if now - self._progress >= self.stall_seconds:
            self._stalled = True
            self._connections.shut()

    def _has_moved(self) -> bool:
        """Whether it has read or written tokens since it was asked last. One that cannot be reached is not stuck but
        away, which is for `retry_seconds` to judge."""
        try:
            response = self._connections.request("GET", "/metrics", None, STATUS_TIMEOUT / 6)
        except urllib3.exceptions.ReadTimeoutError:
            return False
        except urllib3.exceptions.HTTPError:
            return True
        before = self._tokens
        self._tokens = sum(
            float(line.rsplit(" ", 1)[1])
            for line in response.data.decode(errors="replace").splitlines()
            if line.startswith(("vllm:prompt_tokens_total{", "vllm:generation_tokens_total{"))
        )
        return self._tokens != before

    def give_up(self) -> None:
        self.stop.set()
        self._connections.shut()

    def close(self) -> None:
        self._closed = True
        self.give_up()

    # ---- HTTP ----------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = LOADING_TIMEOUT,
    ) -> Any:
        """The decoded answer, which may take `seconds` (a GET's may not take that long). Connection failures and the
        server's own errors are tried again for `retry_seconds`; EngineLost after that, and for a server that is stuck.
        UserError for what the server refuses, NotServed for a completion of a model that it does not have."""
        first_failure: float | None = None
        pause = 0.25
        limit = STATUS_TIMEOUT if method == "GET" else seconds
        while True:
            try:
                response = self._connections.request(method, path, body, limit)
                if response.status < 500:
                    return self._answer(path, response)
                trouble = f"HTTP {response.status} {response.data[:200].decode(errors='replace')}"
            except urllib3.exceptions.HTTPError as error:
                trouble = type(error).__name__
                if path == COMPLETIONS and isinstance(error, urllib3.exceptions.ReadTimeoutError):
                    self._stalled = True
            if self._stalled:
                raise EngineLost(
                    f"the server at {self.url} is stuck: it answers, but has made no token for "
                    f"{self.stall_seconds:g} s (engine.stall_seconds); start it again and repeat the command: what "
                    "was sampled is kept"
                )
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if now - first_failure >= self.retry_seconds or self.stop.is_set():
                raise EngineLost(
                    f"the server at {self.url} is gone: {path} failed for {now - first_failure:.0f} s ({trouble}); "
                    "start it again and repeat the command: what was sampled is kept"
                )
            self.stop.wait(pause)
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
            if response.status == 404 and path != COMPLETIONS:
                hint = "; start it with `vlm-reason serve`, which lets adapters and weights be loaded while it runs"
            refused = NotServed if response.status == 404 and path == COMPLETIONS else UserError
            raise refused(f"the server at {self.url} refused {path}: {' '.join(text.split())[:300]}{hint}")
        try:
            return json.loads(response.data) if response.data else None
        except ValueError:
            return response.data.decode(errors="replace")
