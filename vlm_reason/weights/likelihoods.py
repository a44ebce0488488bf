"""p(y | f): from what a model gives for a batch (outputs f) to a probability of the target.

    Choice         f [B, C]: logits of C label tokens behind the prompt       y ~ Categorical(softmax(f / T))
    Tokens         f [B, 1]: sum of log p of the tokens from `target` on      token language model
    Regression     f [B, 1]: w . h of the last hidden state                   y ~ N(f, noise^2)
    BradleyTerry   f [B, 1]: w . (h of the preferred - h of the rejected)     y = 1 ~ Bernoulli(sigmoid(f))

`model` may give k rows a row of the batch (draws in rows, see per_row.py): k B rows of f then, draw by draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..scoring.enter import unwrap
from ..scoring.head import head_logits, head_logprobs, logits_of
from .examples import Batch, Ids


class Likelihood(Protocol):
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """f [k B, C], fp32, with gradient where the model's weights have one."""

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        """log p(y | f) [..., B] of f [..., B, C], nats."""

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Targets [B] drawn from p(y | f)."""

    def hessian(self, f: Tensor) -> Tensor:
        """-d^2 log p(y | f) / df^2, expected under p: [..., C, C]; positive semidefinite."""

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        """-d log p(y | f) / df [..., B, C]; p - onehot(y) for Choice."""


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The final hidden state (what the LM head reads) at each row's last token, [k B, H], in the model's dtype."""
    hidden = _hidden(model, batch)
    last = batch.last.repeat(len(hidden) // len(batch))
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    """[k B, T, H]"""
    decoder = unwrap(model).base_model
    return decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Choice:
    """label_ids: C token ids. Only their rows of the LM head are multiplied, in fp32."""

    label_ids: Ids

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        causal = unwrap(model)
        hidden = last_hidden(model, batch)
        head = causal.get_output_embeddings()
        rows = torch.tensor(self.label_ids, device=hidden.device)
        if type(head) is nn.Linear:
            bias = None if head.bias is None else head.bias[rows].float()
            x = F.linear(hidden.float(), head.weight[rows].float(), bias)
        else:  # an adapter on the head
            x = head(hidden)[:, rows].float()
        logits = logits_of(causal)
        x = x * logits.scale
        return x if logits.cap is None else torch.tanh(x / logits.cap) * logits.cap

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        target = batch.target.long().expand(f.shape[:-1])
        return f.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(f.softmax(-1), 1, generator=generator).squeeze(-1)

    def hessian(self, f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return f.softmax(-1) - F.one_hot(batch.target.long(), f.shape[-1])


@dataclass(frozen=True)
class Tokens:
    """log p of ids[target:] given what stands before, summed. `f` is that sum itself, so its Hessian in f is 0: the
    curvature of this likelihood is in the logits, and families that need it take sampled labels instead."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        causal, hidden = unwrap(model), _hidden(model, batch)
        row, place, ids = self._wanted(hidden, batch)
        logp = head_logprobs(causal, hidden[row, place - 1], ids)
        return logp.new_zeros(len(hidden)).index_add(0, row, logp)[:, None]

    def sampled(
        self, model: nn.Module, batch: Batch, generators: Sequence[torch.Generator], samples: int
    ) -> tuple[Tensor, list[Tensor]]:
        """(f [B, 1], `samples` times log p [B] of other tokens in the places of the target's, each drawn from the
        model's own law behind what stands there in the batch). generators: one a row, on the CPU."""
        causal, hidden = unwrap(model), _hidden(model, batch)
        row, place, ids = self._wanted(hidden, batch)
        states = hidden[row, place - 1]
        drawn = torch.empty(samples, len(ids), dtype=torch.long)
        with torch.no_grad():
            for n, generator in enumerate(generators):
                mine = row == n
                for part in mine.nonzero().squeeze(-1).split(256):
                    p = head_logits(causal, states[part]).float().softmax(-1).cpu()
                    drawn[:, part.cpu()] = torch.multinomial(p, samples, True, generator=generator).mT
        labels = [ids, *drawn.to(ids.device)]
        sums = [
            states.new_zeros(len(hidden), dtype=torch.float32).index_add(
                0, row, head_logprobs(causal, states, one).float()
            )
            for one in labels
        ]
        return sums[0][:, None], sums[1:]

    def _wanted(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(row, position, id) of every token of the targets, rows of `hidden` [k B, T, H]."""
        copies = len(hidden) // len(batch)
        at = torch.arange(batch.input_ids.shape[1], device=hidden.device)
        wanted = (at >= batch.target[:, None].clamp(min=1)) & (at <= batch.last[:, None])
        wanted, ids = wanted.repeat(copies, 1), batch.input_ids.repeat(copies, 1)
        row, place = wanted.nonzero(as_tuple=True)
        return row, place, ids[row, place]

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        return f[..., 0]

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        raise NotImplementedError("targets of a token likelihood are sampled token by token, by an engine")

    def hessian(self, f: Tensor) -> Tensor:
        return torch.zeros(*f.shape, 1, device=f.device)

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return -torch.ones_like(f)


@dataclass(frozen=True)
class Regression:
    """weight [H]: a fixed read-out of the final hidden state; noise: standard deviation of y."""

    weight: Tensor
    noise: float = 1.0

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return (last_hidden(model, batch).float() @ self.weight.to(batch.input_ids.device))[:, None]

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        z = (f[..., 0] - batch.target) / self.noise
        return -0.5 * z.square() - math.log(self.noise * math.sqrt(2 * math.pi))

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        return f[..., 0] + self.noise * torch.randn(f.shape[:-1], generator=generator)

    def hessian(self, f: Tensor) -> Tensor:
        return torch.full((*f.shape, 1), self.noise**-2, device=f.device)

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return (f - batch.target[..., None]) / self.noise**2


@dataclass(frozen=True)
class BradleyTerry:
    """Preference pairs (Bradley and Terry 1952); weight [H] reads a reward out of the final hidden state."""

    weight: Tensor

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        if batch.rejected is None:
            raise UserError(f"example {batch.ids[0]!r} has no rejected sequence: preferences are between two")
        weight = self.weight.to(batch.input_ids.device)
        better, worse = last_hidden(model, batch), last_hidden(model, batch.rejected)
        return ((better.float() - worse.float()) @ weight)[:, None]

    def log_prob(self, f: Tensor, batch: Batch) -> Tensor:
        return F.logsigmoid(f[..., 0])

    def sample(self, f: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(f[..., 0].sigmoid(), generator=generator)

    def hessian(self, f: Tensor) -> Tensor:
        p = f.sigmoid()
        return (p * (1 - p))[..., None]

    def residual(self, f: Tensor, batch: Batch) -> Tensor:
        return f.sigmoid() - 1
