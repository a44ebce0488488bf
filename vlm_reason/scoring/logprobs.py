"""Log-probabilities of given tokens: the one routine behind the engine's `score` and the trainer's loss.

    log p(target_t | context, target_<t) = log softmax(h_t W^T / temperature)[target_t]

in fp32, for labelled positions only: the backbone runs on the padded batch, the hidden states that predict a target
are gathered, and only those rows meet the LM head (a vocabulary row costs as much as a quarter of a small model).

Sequences are padded on the right and no padding mask is passed: under causal attention nothing after a token can reach
it, and an unmasked causal batch takes the fastest attention kernel of every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

TokenPair = tuple[Sequence[int], Sequence[int]]
"""(context_ids, target_ids)"""

HEAD_ROWS = 1024
"""Rows that meet the LM head at once. More rows are done in chunks whose logits are recomputed in the backward pass:
R x V fp32 logits never exist together (4096 rows of a 152k vocabulary would be 2.5 GB, twice with the gradient)."""


def score_sequences(
    model: nn.Module,
    sequences: Sequence[TokenPair],
    temperature: float = 1.0,
    top_p: float = 1.0,
    past: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target | context) token by token for N sequences, under the model's active adapter.

    Returns `logps` [N, T] fp32, nats, 0 where masked, and `mask` [N, T] bool; T = longest target. Differentiable
    when gradients are enabled. The batch is run as given: cut it with `microbatches` first. With `top_p` < 1 a target
    outside the nucleus has -inf. Temperature 0 means the untempered law (see `engines.base.Law`).

    `past` holds what all sequences begin with, a row each; the contexts are then what follows it. It is used up.

    With gradient checkpointing, call `backward` inside the same `use_adapter` block: the recomputation uses whichever
    adapter is active then.
    """
    lengths = [len(target) for _, target in sequences]
    device = _device(model)
    mask = torch.zeros(len(sequences), max(lengths, default=0), dtype=torch.bool)
    for n, length in enumerate(lengths):
        mask[n, :length] = True
    mask = mask.to(device)
    if not any(lengths):
        return torch.zeros(mask.shape, dtype=torch.float32, device=device), mask

    input_ids, rows, targets = _pack(sequences, device)
    causal = unwrap(model)
    behind = 0 if past is None else past.get_seq_length()
    position = torch.arange(behind, behind + input_ids.shape[1], device=device).unsqueeze(0)
    hidden = causal.get_decoder()(
        input_ids=input_ids, position_ids=position, past_key_values=past, use_cache=past is not None
    ).last_hidden_state  # [N, S, H]
    picked = hidden.flatten(0, 1).index_select(0, rows)  # [R, H]
    logp = head_logprobs(causal, picked, targets, temperature, top_p)  # [R]
    return torch.zeros(mask.shape, dtype=torch.float32, device=device).masked_scatter(mask, logp), mask


def microbatches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows into batches of at most `token_budget` padded tokens (longest row times rows), longest rows first.

    Deterministic in `lengths` (ties by index). Every row appears once and is never split; a row longer than the budget
    is a batch of its own.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be >= 1, got {token_budget}")
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * width <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = max(lengths[i], 1)
    return batches


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


def head_logprobs(
    causal: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """log p(targets[r] | hidden[r]) [R] fp32 through the LM head, in chunks of `HEAD_ROWS`. hidden [R, H]."""

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        return _selected_logprobs(head_logits(causal, h), t, temperature, top_p)

    if len(targets) <= HEAD_ROWS:
        return chunk(hidden, targets)
    pairs = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in pairs])
    return torch.cat([chunk(h, t) for h, t in pairs])


def head_logits(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [R, V] as the model's own forward makes them: LM head, then the scale and soft cap some families apply."""
    head = causal.get_output_embeddings()
    config = causal.config.get_text_config()
    logits = head(hidden)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside PEFT's wrapper (whose injected adapter layers stay in effect)."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def context_length(model: nn.Module) -> int | None:
    """Tokens the model was built for; None if its config does not say."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def _selected_logprobs(logits: Tensor, targets: Tensor, temperature: float, top_p: float) -> Tensor:
    if top_p < 1.0 and temperature != 0:
        return log_law(logits, temperature, top_p).gather(-1, targets[:, None]).squeeze(-1)
    logits = (
        logits.float()
    )  # without truncation one logsumexp does; the full [R, V] log-softmax is never stored
    if temperature not in (0, 1):
        logits = logits / temperature
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _pack(sequences: Sequence[TokenPair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input ids [N, S], flat row indices [R] of the positions that predict a target, targets [R].

    The last target token is never an input: nothing follows it.
    """
    inputs = [(*context, *target)[:-1] if len(target) else () for context, target in sequences]
    width = max(map(len, inputs))
    input_ids = torch.zeros(len(inputs), width, dtype=torch.long)
    rows: list[int] = []
    targets: list[int] = []
    for n, ((context, target), ids) in enumerate(zip(sequences, inputs, strict=True)):
        if not len(target):
            continue
        if not len(context):
            raise ValueError(
                f"sequence {n} has an empty context: its first target has nothing to be conditioned on"
            )
        input_ids[n, : len(ids)] = torch.tensor(ids)
        first = n * width + len(context) - 1
        rows.extend(range(first, first + len(target)))
        targets.extend(target)
    return input_ids.to(device), torch.tensor(rows, device=device), torch.tensor(targets, device=device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
