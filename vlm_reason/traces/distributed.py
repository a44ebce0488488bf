"""Many processes, one run: who samples which problems, and who trains on which groups.

Everything here is a pure function of what every process knows, except `Ranks.together`, which is the one exchange of a
window. A group of K traces is never split. All processes see all groups and weigh the whole window alike, so the
coefficients, the chains and the presets' state are those of one process, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from ..engines.processes import together
from .step import Batch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size`. Without torch.distributed there is one."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> list[int]:
        """Which of n problems this process samples: every `size`-th one."""
        return list(range(self.rank, n, self.size))

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """`work` done in every process; what each of them returned, by rank. What it returns is pickled.

        When it fails in one process, it fails in all of them (`engines.processes.together`).
        """
        return [work()] if self.size == 1 else together(work)

    def agree(self, value: Any, what: str) -> None:
        """RuntimeError where `value` (small, comparable) is not the same in every process: collectives that depend on
        it would wait for one another forever."""
        values = self.together(lambda: value)
        if any(other != values[0] for other in values):
            raise RuntimeError(
                f"{what} differs between processes: {values}; all of them must run the same code, data and settings"
            )

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def deal_groups(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the groups each rank trains on, whole groups, with about equal tokens: the longest first, each to the
    rank that has least so far (Graham 1969: at most 4/3 of the best makespan). Deterministic, ties by index."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for g in sorted(range(len(tokens)), key=lambda g: (-tokens[g], g)):
        least = min(range(ranks), key=lambda r: (load[r], r))
        dealt[least].append(g)
        load[least] += tokens[g]
    return [sorted(groups) for groups in dealt]


def in_lockstep(batches: Sequence[Sequence[Batch]], rank: int) -> list[Batch]:
    """The batches of `rank`, filled up so that all ranks run the same adapters the same number of times in the same
    order: sharded weights are gathered by all ranks in every pass. A filler is the lightest batch of the adapter, run
    for nothing."""
    out: list[Batch] = []
    for adapter in sorted({batch.adapter for own in batches for batch in own}, reverse=True):
        by_rank = [[batch for batch in own if batch.adapter == adapter] for own in batches]
        lightest = min((batch for own in by_rank for batch in own), key=lambda batch: batch.tokens)
        missing = max(map(len, by_rank)) - len(by_rank[rank])
        out += by_rank[rank] + [lightest._replace(counts=False)] * missing
    return out
