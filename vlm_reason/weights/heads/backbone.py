"""Last hidden states of a frozen model, and what the model itself makes of them, from one run an example.

`Backbone` runs the model once for every example it has not seen, whatever is fitted on what comes out, however often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...errors import UserError
from ...scoring.enter import unwrap
from ..examples import Batch, Example, in_batches, make_batch
from ..likelihoods import Likelihood


@dataclass(frozen=True)
class States:
    """hidden [B, H]: the final hidden state at the last token, in the model's dtype; rejected [B, H]: of the other half
    of preference pairs; outputs [B, C]: f of the likelihood, the model's own."""

    hidden: Tensor
    rejected: Tensor | None
    outputs: Tensor


def states(model: nn.Module, batch: Batch, likelihood: Likelihood) -> States:
    """One run of the model (two for pairs), with gradient where the model's weights have one."""
    with _captured(model) as seen:
        outputs = likelihood.outputs(model, batch)
    halves = [batch] if batch.rejected is None else [batch, batch.rejected]
    if len(seen) != len(halves) or any(len(h) != len(b) for h, b in zip(seen, halves, strict=False)):
        raise UserError(
            f"a last layer reads the model's hidden states once an example; {type(likelihood).__name__} ran its "
            f"decoder {len(seen)} times for {len(halves)}"
        )
    last = [h[torch.arange(len(h), device=h.device), b.last] for h, b in zip(seen, halves, strict=True)]
    return States(last[0], last[1] if len(last) > 1 else None, outputs)


@contextmanager
def _captured(model: nn.Module) -> Iterator[list[Tensor]]:
    """The final hidden states [B, T, H] of every run of the decoder inside the block."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    handle = unwrap(model).base_model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class Backbone:
    """A model that stays as it is. `states_of` is on the CPU and in fp32, and runs nothing twice."""

    def __init__(self, model: PeftModel, likelihood: Likelihood, tokens: int = 4096) -> None:
        self.model, self.likelihood, self.tokens = model, likelihood, tokens
        self._known: dict[tuple, States] = {}

    @torch.no_grad()
    def states_of(self, examples: Sequence[Example]) -> States:
        """Rows in the order of `examples`, the model in eval mode meanwhile."""
        new = list({_key(e): e for e in examples if _key(e) not in self._known}.values())
        if new:
            self._run(new)
        found = [self._known[_key(e)] for e in examples]
        pairs = [s.rejected for s in found if s.rejected is not None]
        rejected = torch.stack(pairs) if pairs else None
        return States(
            torch.stack([s.hidden for s in found]), rejected, torch.stack([s.outputs for s in found])
        )

    def _run(self, examples: Sequence[Example]) -> None:
        by_name = {str(n): e for n, e in enumerate(examples)}
        named = [Example(n, e.ids, e.target, e.rejected) for n, e in by_name.items()]
        training = self.model.training
        self.model.eval()
        try:
            for batch in in_batches(named, self.tokens):
                found = states(self.model, batch.to(device_of(self.model)), self.likelihood)
                for row, name in enumerate(batch.ids):
                    rejected = None if found.rejected is None else _kept(found.rejected[row])
                    one = States(_kept(found.hidden[row]), rejected, _kept(found.outputs[row]))
                    self._known[_key(by_name[name])] = one
        finally:
            self.model.train(training)


def targets_of(examples: Sequence[Example]) -> Tensor:
    return make_batch(examples).target


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _kept(row: Tensor) -> Tensor:
    return row.detach().float().cpu().clone()


def _key(example: Example) -> tuple:
    return example.id, example.ids, example.rejected
