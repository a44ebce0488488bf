"""Stored token ids as the pieces of text they stand for, so that each piece can carry its log-probability.

A character may be spread over several tokens: those are one piece, and its log-probability is their sum. Pieces
that do not add up to the stored text are not shown (the tokenizer is another than the one that sampled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ...errors import UserError

Decode = Callable[[Sequence[int]], str]
Piece = tuple[str, float]
"""Text and log-probability in nats."""

LONGEST = 8
"""Tokens a character may be spread over (4 bytes, and room for a space in front)."""


def pieces(text: str, ids: Sequence[int], logps: Sequence[float], decode: Decode) -> list[Piece] | None:
    """`text` cut at its tokens; None when the ids do not spell it."""
    found: list[Piece] = []
    start = 0
    while start < len(ids):
        end = start + 1
        words = decode(ids[start:end])
        while "\ufffd" in words and end < len(ids) and end - start < LONGEST:
            end += 1
            words = decode(ids[start:end])
        found.append((words, sum(logps[start:end])))
        start = end
    return found if "".join(words for words, _ in found) == text else None


def decoder_of(folder: str | Path, tokenizer: str | None) -> Decode | None:
    """The decoder that spells the ids of the samples in `folder`: of `tokenizer` (a name or folder) where
    given, else of the model that the config.yaml beside the samples names; None where neither is there."""
    name = tokenizer or _model_of(Path(folder))
    if name is None:
        return None
    from ...models.load import load_tokenizer

    try:
        loaded = load_tokenizer(name)
    except UserError:
        if tokenizer is not None:
            raise
        return None
    memory: dict[tuple[int, ...], str] = {}

    def decode(ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in memory:
            text = loaded.decode(list(key), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            memory[key] = text if isinstance(text, str) else "".join(text)
        return memory[key]

    return decode


def _model_of(folder: Path) -> str | None:
    """The model that the resolved config beside the samples names."""
    for path in (folder / "config.yaml", folder / "samples" / "config.yaml"):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(config, dict) and isinstance(config.get("model"), str):
            return str(config["model"])
    return None
