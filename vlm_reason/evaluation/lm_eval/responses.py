"""What the engine has said, kept on disk: a run that is repeated or was killed asks only for the rest.

Keys are content: weights, engine, token ids, law, seed. A cache that leaves any of these out answers with another
model's numbers (lm-eval's own keys a response by the text of the request alone). Append-only JSON lines, one file a
writer; a batch is on disk when `put` returns; the torn last line of a killed writer is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...engines.base import SampleRequest, ScoreRequest
from ...errors import UserError
from ...types import Completion

Scored = tuple[tuple[float, ...], bool]
"""log p of each target token, and whether greedy decoding would write the target."""


def key_of(weights: str, engine: str, request: SampleRequest | ScoreRequest) -> str:
    """32 hex digits that differ wherever the answer might. The adapter's name is left out: `weights` says it."""
    content = asdict(request)
    content["law"].pop("adapter")
    text = json.dumps([type(request).__name__, weights, engine, content], sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Responses:
    """Answers by key, in memory and, with a folder, on disk. UserError for a damaged line that is not a file's last."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, Any] = {}
        self._stream: int | None = None
        if self.folder is not None and self.folder.exists():
            for path in sorted(self.folder.glob("responses-*.jsonl")):
                self._read(path)

    def scored(self, key: str) -> Scored | None:
        found = self._known.get(key)
        return None if found is None else (tuple(found["logps"]), bool(found["greedy"]))

    def completion(self, key: str) -> Completion | None:
        found = self._known.get(key)
        if found is None:
            return None
        return Completion(
            tuple(found["ids"]), tuple(found["logps"]), found["text"], found["finish"], found["seed"]
        )

    def put(self, answers: Mapping[str, Scored | Completion]) -> None:
        rows = {
            key: asdict(value) if isinstance(value, Completion) else {"logps": value[0], "greedy": value[1]}
            for key, value in answers.items()
        }
        self._known.update(rows)
        if self.folder is None or not rows:
            return
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"responses-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._stream = os.open(
                self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666
            )
        lines = [json.dumps({"key": key, **row}, allow_nan=False) + "\n" for key, row in rows.items()]
        data = memoryview("".join(lines).encode())
        while data:
            data = data[os.write(self._stream, data) :]
        os.fsync(self._stream)

    def __len__(self) -> int:
        return len(self._known)

    def _read(self, path: Path) -> None:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    self._known[row.pop("key")] = row
                except (ValueError, KeyError) as error:
                    raise UserError(f"{path}:{number} is damaged ({error}); remove the file") from error


def distinct(requests: Sequence[Any], keys: Sequence[str], have: Any) -> dict[str, Any]:
    """The requests whose answer is not there yet, one a key, in order."""
    todo: dict[str, Any] = {}
    for key, request in zip(keys, requests, strict=True):
        if have(key) is None:
            todo.setdefault(key, request)
    return todo
