"""What servers have answered so far, kept on disk until the weights change: nothing that was sampled is lost when a
server, or the run itself, dies in the middle of a window.

A key is the whole call with the content-named weights it was sampled under, so a reply is found again only for the same
question to the same weights. A JSON object a line, appended as replies come; a torn last line is dropped on reading.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..compat.vllm import Output
from .vllm import Call


class ReplyCache:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[str, Output] = {}
        self._under: dict[str, str] = {}
        self._fresh = True
        for row in _rows(path):
            self._remember(row["key"], row["under"], _output(row))

    def __len__(self) -> int:
        return len(self._found)

    def get(self, call: Call, under: str) -> Output | None:
        return self._found.get(_key(call, under))

    def put(self, call: Call, under: str, output: Output) -> None:
        key = _key(call, under)
        line = json.dumps({"key": key, "under": under, **asdict(output)}) + "\n"
        with self._lock:
            self._remember(key, under, output)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as stream:
                stream.write(line)

    def begin_version(self, version: int) -> None:
        """Forget replies of other policy versions (`name@version-content`). Those of the base, which has none, are
        kept once: what a run finds on disk when it starts is of the window it was stopped in."""
        with self._lock:
            keep = {
                key
                for key, under in self._under.items()
                if f"@{version}-" in under or (self._fresh and under.startswith("base"))
            }
            self._fresh = False
            self._keep(keep)

    def forget(self, asked: Iterable[tuple[Call, str]]) -> None:
        """Drop the replies to these calls (call, under), if there are any."""
        with self._lock:
            self._keep(self._found.keys() - {_key(call, under) for call, under in asked})

    def _keep(self, keys: Set[str]) -> None:
        if len(keys) == len(self._found):
            return
        self._found = {key: output for key, output in self._found.items() if key in keys}
        self._under = {key: under for key, under in self._under.items() if key in keys}
        rows = [{"key": k, "under": self._under[k], **asdict(o)} for k, o in self._found.items()]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _remember(self, key: str, under: str, output: Output) -> None:
        self._found[key], self._under[key] = output, under


def _key(call: Call, under: str) -> str:
    return hashlib.blake2b(repr((under, call)).encode(), digest_size=16).hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _output(row: dict[str, Any]) -> Output:
    prompt = row["prompt_logps"]
    return Output(tuple(row["ids"]), tuple(row["logps"]), None if prompt is None else tuple(prompt))
