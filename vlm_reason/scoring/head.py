"""Log-probabilities through the LM head without the logits.

    log p(t | h) = z_t - log sum_v exp z_v,    z = f(W h + b) / temperature,    f: the model's own scale and soft cap

[N, V] never exists, forward or backward: rows are done in chunks of `CHUNK` logits, and within a chunk one fp32 buffer
becomes exp z, then p, then the gradient. Only rows that predict a wanted token come here at all.

Where W is frozen (adapters) the gradient costs no second pass over the vocabulary: the log-probability of a row depends
on that row alone, so its Jacobian

    d log p(t | h) / d h = (W_t - sum_v p_v W_v) / temperature        (f' in between)

is computed while p is there, [N, H] in place of [N, V], and the backward pass scales its rows: two matrix products
where recomputation takes three. Where W is trained, logits are recomputed chunk by chunk. On CUDA, TRL's kernel.

Not for a head that must be entered as a module (weights gathered in its hooks, adapters on it) nor for a truncated law
(top_p < 1): these take checkpointed chunks, exact and slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..compat import trl

CHUNK = 1 << 23
"""Logits that exist at once: 32 MiB in fp32."""


@dataclass(frozen=True)
class Logits:
    """How a model makes logits of x = W h + b: z = cap tanh(scale x / cap) / temperature (no tanh without a cap)."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def of_(self, x: Tensor) -> Tensor:
        """z, in place of x."""
        if self.cap is None:
            plain = self.scale / self.temperature
            return x if plain == 1.0 else x.mul_(plain)
        return x.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx at z."""
        plain = self.scale / self.temperature
        return plain if self.cap is None else plain * (1 - (z * (self.temperature / self.cap)) ** 2)


def head_logprobs(
    causal: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """log p(targets[r] | hidden[r]) [R] fp32 through the LM head, hidden [R, H]. Temperature 0: the untempered law."""
    temperature, top_p = (1.0, 1.0) if temperature == 0 else (temperature, top_p)
    head = causal.get_output_embeddings()
    if top_p == 1.0 and _plain(head):
        return _fused(hidden, head.weight, head.bias, targets, logits_of(causal, temperature))

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        return _selected(head_logits(causal, h), t, temperature, top_p)

    rows = max(1, CHUNK // causal.config.get_text_config().vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    pairs = zip(hidden.split(rows), targets.split(rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in pairs])
    return torch.cat([chunk(h, t) for h, t in pairs])


def head_logprobs_and_best(
    causal: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """[R, 2] fp32: log p(targets[r] | hidden[r]) as `head_logprobs`, and max_v log p(v | hidden[r]). The target is what
    greedy decoding would write exactly where the two are equal (ties included). No gradient."""
    rows = max(1, CHUNK // causal.config.get_text_config().vocab_size)
    parts = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logp = log_law(head_logits(causal, h), temperature, 1.0 if temperature == 0 else top_p)
        parts.append(torch.stack([logp.gather(-1, t[:, None]).squeeze(-1), logp.amax(-1)], -1))
    return torch.cat(parts)


def head_logits(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [R, V] as the model's own forward makes them: LM head, then the scale and soft cap some families apply."""
    x = causal.get_output_embeddings()(hidden)
    logits = logits_of(causal)
    if logits.scale != 1.0:
        x = x * logits.scale
    return x if logits.cap is None else torch.tanh(x / logits.cap) * logits.cap


def logits_of(causal: PreTrainedModel, temperature: float = 1.0) -> Logits:
    """Read from the model's config: Cohere and Falcon-H1 multiply, Granite divides, HyperCLOVA X multiplies by what
    Granite divides by, Gemma 2 has a soft cap."""
    config = causal.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= 1.0 if getattr(config, name, None) is None else getattr(config, name)
    if (factor := getattr(config, "logits_scaling", None)) is not None:
        scale = scale * factor if config.model_type == "hyperclovax" else scale / factor
    return Logits(scale, getattr(config, "final_logit_softcapping", None), temperature)


def log_law(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """fp32 log-probabilities [..., V] of the law that temperature and top-p make of `logits` [..., V].

    Temperature 0 gives the untempered, untruncated law. top-p (nucleus sampling, Holtzman et al. 2020) keeps the
    smallest set of most likely tokens whose mass reaches `top_p`, all ties at its boundary included; the rest is -inf.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.log_softmax(-1)
    if temperature != 1.0:
        logits = logits / temperature
    if top_p < 1.0:
        ordered = logits.detach().softmax(-1).sort(-1, descending=True).values
        mass_before = ordered.double().cumsum(-1) - ordered
        threshold = ordered.masked_fill(mass_before >= top_p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits.detach().softmax(-1) < threshold, -torch.inf)
    return logits.log_softmax(-1)


class FusedLogProbs(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, targets [N], logits, chunk) -> [N] fp32 (fp64 of fp64)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits: Logits,
        chunk: int,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        trained = of_weight or of_bias
        ahead = of_hidden and not trained
        jacobian = torch.empty_like(hidden, memory_format=torch.contiguous_format) if ahead else None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(targets), dtype=exact)
        norms = hidden.new_empty(len(targets), dtype=exact)
        for rows in _chunks(len(targets), len(weight), chunk):
            t = targets[rows, None]
            z = logits.of_(F.linear(hidden[rows], weight, bias).to(exact))
            picked = z.gather(1, t).squeeze(1)
            slope = logits.slope(z) if ahead else 0.0
            top = z.amax(1, keepdim=True)
            total = z.sub_(top).exp_().sum(1)  # z holds exp(z - top) from here
            norms[rows] = total.log() + top.squeeze(1)
            logps[rows] = picked - norms[rows]
            if jacobian is not None:
                slope_z = _minus_p_plus_target(z.div_(total[:, None]), t).mul_(slope)
                jacobian[rows] = slope_z.to(weight.dtype) @ weight
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        elif trained:
            ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.logits, ctx.chunk = logits, chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (jacobian,) = ctx.saved_tensors
            return (jacobian * grad[:, None]).to(jacobian.dtype), None, None, None, None, None
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if of_bias else None
        for rows in _chunks(len(targets), len(weight), ctx.chunk):
            z = ctx.logits.of_(F.linear(hidden[rows], weight, bias).to(grad.dtype))
            slope = ctx.logits.slope(z)
            p = z.sub_(norms[rows, None]).exp_()
            dx = _minus_p_plus_target(p, targets[rows, None]).mul_(slope).mul_(grad[rows, None])
            if grad_hidden is not None:
                grad_hidden[rows] = dx.to(weight.dtype) @ weight
            if (
                grad_weight is not None
            ):  # summed over chunks in fp32: rounding each chunk's sum would bias the training
                grad_weight.addmm_(dx.T, hidden[rows].to(dx.dtype))
            if grad_bias is not None:
                grad_bias += dx.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


def _fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logits: Logits) -> Tensor:
    kind = hidden.device.type
    if torch.is_autocast_enabled(
        kind
    ):  # here, since the backward pass runs outside autocast and must see the same
        low = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    with torch.autocast(kind, enabled=False):
        if hidden.is_cuda:
            return trl.fused_logprobs(
                hidden, weight, bias, targets, logits.temperature, logits.cap, logits.scale
            )
        return FusedLogProbs.apply(hidden, weight, bias, targets, logits, CHUNK)


def _minus_p_plus_target(p: Tensor, t: Tensor) -> Tensor:
    """1[v = t] - p_v, in place of p."""
    return p.neg_().scatter_add_(1, t, p.new_ones(t.shape))


def _chunks(rows: int, vocabulary: int, chunk: int) -> list[slice]:
    step = max(1, chunk // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _plain(head: nn.Module | None) -> bool:
    """Whether the head is its weight: a linear layer that nothing hooks, wraps or keeps sharded outside its forward."""
    return (
        type(head) is nn.Linear
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and type(head.weight) in (nn.Parameter, Tensor)
        and len(head.weight) == head.out_features
    )


def _selected(logits: Tensor, targets: Tensor, temperature: float, top_p: float) -> Tensor:
    if top_p < 1.0:
        return log_law(logits, temperature, top_p).gather(-1, targets[:, None]).squeeze(-1)
    logits = (
        logits.float()
    )  # without truncation one logsumexp does; the full [R, V] log-softmax is never stored
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
