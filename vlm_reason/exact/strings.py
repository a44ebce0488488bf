"""All traces over a small vocabulary, numbered.

A trace is a string of at most `max_tokens` symbols 0..V-1 closed by the end symbol V; at max_tokens symbols the end is
forced. String i without its end is also prefix i, so one number names both. Strings are numbered as the nodes of a
V-ary heap: the empty string is 0, appending symbol s to prefix i gives prefix i V + 1 + s. In order of length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError

MAX_STRINGS = 100_000


@dataclass(frozen=True)
class Strings:
    """vocab V >= 1 symbols besides the end; traces of at most max_tokens T >= 0 symbols. Raises UserError if there
    are more than 100,000 strings."""

    vocab: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.vocab < 1 or self.max_tokens < 0:
            raise UserError(f"need vocab >= 1 and max_tokens >= 0, got {self.vocab} and {self.max_tokens}")
        if self.count > MAX_STRINGS:
            raise UserError(
                f"{self.count} strings (vocab {self.vocab}, up to {self.max_tokens} tokens) are too many to enumerate; "
                f"at most {MAX_STRINGS}"
            )

    @property
    def end(self) -> int:
        """The end symbol."""
        return self.vocab

    @cached_property
    def count(self) -> int:
        """N, the number of strings."""
        return sum(self.vocab**t for t in range(self.max_tokens + 1))

    @cached_property
    def open_prefixes(self) -> int:
        """How many prefixes still have a choice: those shorter than max_tokens, numbers 0..open_prefixes-1."""
        return self.count - self.vocab**self.max_tokens

    def child(self, prefix: int, symbol: int) -> int:
        """The prefix with one symbol appended."""
        return prefix * self.vocab + 1 + symbol

    @cached_property
    def symbols(self) -> tuple[tuple[int, ...], ...]:
        """The symbols of each string, without the end."""
        rows: list[tuple[int, ...]] = [()]
        for i in range(1, self.count):
            rows.append((*rows[(i - 1) // self.vocab], (i - 1) % self.vocab))
        return tuple(rows)

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """Number of a string given without its end."""
        return {row: i for i, row in enumerate(self.symbols)}

    @cached_property
    def length(self) -> Tensor:
        """Tokens in each trace with its end symbol, [N]: 1 .. T+1."""
        return torch.tensor([len(row) + 1 for row in self.symbols])

    @cached_property
    def tokens(self) -> Tensor:
        """Ids with the end symbol, [N, T+1], -1 behind it."""
        table = torch.full((self.count, self.max_tokens + 1), -1)
        for i, row in enumerate(self.symbols):
            table[i, : len(row) + 1] = torch.tensor((*row, self.end))
        return table

    @cached_property
    def prefix_of(self) -> Tensor:
        """Number of the prefix before each token, [N, T+1]; 0 behind the end (see `tokens`)."""
        table = torch.zeros(self.count, self.max_tokens + 1, dtype=torch.long)
        for i, row in enumerate(self.symbols):
            prefix = 0
            for t, symbol in enumerate(row):
                table[i, t] = prefix
                prefix = self.child(prefix, symbol)
            table[i, len(row)] = prefix
        return table

    def token_logps(self, next_token: Tensor) -> Tensor:
        """log p of each token of each string, [N, T+1], from next-token log-probabilities [>= open_prefixes, V+1].

        0 for a forced end and behind the end, so that the row sums are log p(z).
        """
        chosen = (self.tokens >= 0) & (self.prefix_of < self.open_prefixes)
        picked = next_token[self.prefix_of.where(chosen, 0), self.tokens.where(chosen, 0)]
        return torch.where(chosen, picked, torch.zeros_like(picked))
