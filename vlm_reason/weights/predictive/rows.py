"""The examples of one prediction, cut into batches that fit a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..examples import Batch, Example, make_batch

MOST_ROWS = 256


class Rows:
    """Examples, or one batch that the caller has made, by their number in the order given."""

    def __init__(self, data: Batch | Sequence[Example]) -> None:
        self.batch = data.to("cpu") if isinstance(data, Batch) else make_batch(data)  # where outputs go
        longest = self.batch.last + 1
        if self.batch.rejected is not None:
            longest = longest.maximum(self.batch.rejected.last + 1)
        self.sizes: list[int] = longest.tolist()

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def longest(self) -> int:
        return max(self.sizes)

    def batches(
        self, wanted: Sequence[int], tokens: int, most: int = MOST_ROWS
    ) -> Iterator[tuple[list[int], Batch]]:
        """(numbers, those examples), longest first; at most `tokens` tokens with the padding and `most` rows, one row
        at least."""
        queue = sorted(wanted, key=lambda n: (-self.sizes[n], n))
        while queue:
            count = min(most, MOST_ROWS, max(1, tokens // self.sizes[queue[0]]))
            yield queue[:count], self.batch.rows(queue[:count])
            queue = queue[count:]
