"""Log-probabilities from a padded batch: for models that no prefix tree can express, and the tests' reference.

Sequences are padded on the right and no padding mask is passed: under causal attention nothing after a token can reach
it, and an unmasked causal batch takes the fastest attention kernel of every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .enter import entered
from .forest import Batch, TokenPair, Wanted
from .head import head_logprobs
from .tree import Reader, at_wanted


def score_padded(
    model: nn.Module,
    sequences: Sequence[TokenPair],
    temperature: float = 1.0,
    top_p: float = 1.0,
    wanted: Wanted | None = None,
    read: Reader = head_logprobs,
) -> tuple[Tensor, Tensor]:
    """log p(target | context) token by token, as `logprobs.score_sequences` says."""
    device = next(model.parameters()).device

    def values(inputs: Sequence[tuple[int, ...]], mask: Tensor) -> Tensor:
        width = max(map(len, inputs))
        input_ids = torch.zeros(len(inputs), width, dtype=torch.long)
        for n, ids in enumerate(inputs):
            input_ids[n, : len(ids)] = torch.tensor(ids)
        input_ids = input_ids.to(device)
        wanted_at = mask.nonzero().tolist()
        rows = torch.tensor([n * width + len(sequences[n][0]) + t - 1 for n, t in wanted_at], device=device)
        targets = torch.tensor([sequences[n][1][t] for n, t in wanted_at], device=device)
        position = torch.arange(width, device=device).unsqueeze(0)

        def body(causal: PreTrainedModel) -> Tensor:
            hidden = causal.get_decoder()(
                input_ids=input_ids, position_ids=position, use_cache=False
            ).last_hidden_state  # [N, S, H]
            return read(causal, hidden.flatten(0, 1).index_select(0, rows), targets, temperature, top_p)

        return entered(model, body)

    return at_wanted(sequences, wanted, device, values)


def padded_batches(lengths: Sequence[int], token_budget: int) -> list[Batch]:
    """`microbatches` with the padded tokens of each."""
    return [Batch(b, max(lengths[i] for i in b) * len(b)) for b in microbatches(lengths, token_budget)]


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
