"""What runs through the LoRA layers of a model in one forward and back: inputs, and gradients of a function of f.

    u = A x,   v = B u,   y = W x + s v        dA = (dg/du) x^T,   dB = (dg/dv) u^T,  summed over a row's positions

Rows of a batch do not see one another, so these are the gradients of every example by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ...compat.peft import Update, lora_updates
from ...errors import UserError
from ..examples import Batch


@dataclass(frozen=True)
class Flow:
    """One LoRA layer. x [B, T, in], in the model's dtype, u [B, T, r]: its inputs; grad_u [B, T, r], grad_v
    [B, T, out]; valid [B, T]: not padding. Layers that read the same tensor have the same `source`."""

    source: str
    x: Tensor
    u: Tensor
    grad_u: Tensor
    grad_v: Tensor
    valid: Tensor

    def grad_a(self) -> Tensor:
        """[B, r, in], of every example."""
        return self.grad_u.mT @ self.x.to(self.grad_u.dtype)

    def grad_b(self) -> Tensor:
        """[B, out, r]"""
        return self.grad_v.mT @ self.u

    def grad_core(self) -> Tensor:
        """[B, r, r] with respect to R in s B R A, at R = 1."""
        return self.grad_u.mT @ self.u


class Recorder:
    """Inputs and outputs of the low-rank paths of all LoRA layers, in the order of their calls."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def update(self, name: str, layer: Any, adapter: str) -> Update:
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        scaling = float(layer.scaling[adapter])
        calls = self._calls.setdefault(name, [])

        def update(x: Tensor) -> Tensor:
            u = x.to(a.dtype) @ a.mT
            if not u.requires_grad:
                u.requires_grad_(True)
            v = u @ b.mT
            calls.append((x.detach(), u, v))
            return v * scaling

        return update

    def forget(self) -> None:
        for calls in self._calls.values():
            calls.clear()

    def flows(self, function: Tensor, batch: Batch, keep_graph: bool) -> dict[str, Flow]:
        """Layer -> what flowed, for the gradients of `function` [B], an example an entry."""
        passed = [(name, call) for name, calls in self._calls.items() for call in calls]
        leaves = [t for _, (_, u, v) in passed for t in (u, v)]
        grads = torch.autograd.grad(function.sum(), leaves, retain_graph=keep_graph, allow_unused=True)
        halves = [batch] if batch.rejected is None else [batch, batch.rejected]
        sources: dict[int, str] = {}
        parts: dict[str, list[tuple[Tensor, ...]]] = {}
        source: dict[str, str] = {}
        for n, (name, (x, u, v)) in enumerate(passed):
            done = parts.setdefault(name, [])
            if not done:
                source[name] = sources.setdefault(x.data_ptr(), name)
            gu, gv = (
                torch.zeros_like(t) if g is None else g
                for t, g in zip((u, v), grads[2 * n : 2 * n + 2], strict=True)
            )
            valid = _valid(halves[min(len(done), len(halves) - 1)], u)
            rows = tuple(_in_rows(t, len(batch), name) for t in (x, u.detach(), gu, gv))
            done.append((*rows, valid))
        return {
            name: Flow(source[name], *(_joined(pieces) for pieces in zip(*done, strict=True)))
            for name, done in parts.items()
        }


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Several calls of one layer (the halves of pairs), along positions."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def _valid(batch: Batch, u: Tensor) -> Tensor:
    """[B, T]; a layer that sees one vector an example has T = 1."""
    if u.ndim == 2:
        return torch.ones(len(u), 1, dtype=torch.bool, device=u.device)
    return torch.arange(u.shape[1], device=u.device) <= batch.last.to(u.device)[:, None]


def _in_rows(t: Tensor, rows: int, name: str) -> Tensor:
    if t.ndim not in (2, 3) or len(t) != rows:
        raise UserError(
            f"layer {name!r} has inputs of shape {tuple(t.shape)} for {rows} examples: curvature needs layers that "
            "keep examples apart, [examples, positions, width]"
        )
    return t if t.ndim == 3 else t[:, None]


@contextmanager
def recorded(model: PeftModel, adapter: str) -> Iterator[tuple[Recorder, Sequence[str]]]:
    """Inside, LoRA layers of `adapter` are recorded at every call. Gives their names too. UserError without any."""
    recorder = Recorder()
    with lora_updates(model, adapter, lambda name, layer: recorder.update(name, layer, adapter)) as names:
        if not names:
            raise UserError(f"adapter {adapter!r} has no plain LoRA linear layer: no curvature to collect")
        yield recorder, names
