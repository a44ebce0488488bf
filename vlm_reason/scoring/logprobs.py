"""Log-probabilities of given tokens: the one routine behind the engine's `score` and the trainer's loss.

    log p(target_t | context, target_<t) = log softmax(h_t W^T / temperature)[target_t]

in fp32. A batch runs as a forest of prefix trees wherever the model's attention can express one (tree.py says when),
padded otherwise; only rows that predict a wanted target meet the LM head (head.py). Cut large batches with `batches`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .enter import unwrap as unwrap
from .forest import Batch, TokenPair, Wanted, forest_batches
from .head import head_logits as head_logits
from .head import head_logprobs as head_logprobs
from .head import head_logprobs_and_best as head_logprobs_and_best
from .head import log_law as log_law
from .padded import microbatches as microbatches
from .padded import padded_batches, score_padded
from .tree import Reader, inputs_of, score_tree, wanted_mask, way


def score_sequences(
    model: nn.Module,
    sequences: Sequence[TokenPair],
    temperature: float = 1.0,
    top_p: float = 1.0,
    wanted: Wanted | None = None,
    read: Reader = head_logprobs,
) -> tuple[Tensor, Tensor]:
    """log p(target | context) token by token for N sequences, under the model's active adapter.

    Returns `logps` [N, T] fp32, nats, 0 where masked, and `mask` [N, T] bool; T = longest target. `wanted[n][t]` False
    leaves target t of sequence n out: it costs no LM-head row, and no forward where nothing wanted follows.
    Differentiable when gradients are enabled. The batch is run as given. With `top_p` < 1 a target outside the nucleus
    has -inf. Temperature 0 means the untempered law (see `engines.base.Law`). ValueError for an empty context.

    With gradient checkpointing, call `backward` inside the same `use_adapter` and `tree_attention` blocks: the
    recomputation uses whichever adapter and attention are active then.

    `read`: what is read off the hidden states in place of `head_logprobs`; [R, C] values make `logps` [N, T, C].
    """
    score = score_padded if way(model) == "padded" else score_tree
    return score(model, sequences, temperature, top_p, wanted, read)


def batches(
    model: nn.Module, sequences: Sequence[TokenPair], token_budget: int, wanted: Wanted | None = None
) -> list[Batch]:
    """Cut N sequences into what `score_sequences` runs at once: at most `token_budget` forwarded tokens, shared
    prefixes counted once, sequences of one prompt together while they fit. Every sequence appears once; one longer
    than the budget is a batch of its own."""
    keep = wanted_mask(sequences, wanted)
    inputs = [inputs_of(pair, row) for pair, row in zip(sequences, keep, strict=True)]
    how = way(model)
    if how == "padded":
        return padded_batches([len(ids) for ids in inputs], token_budget)
    contexts = [len(context) for context, _ in sequences]
    return forest_batches(inputs, contexts, token_budget, share=how != "packed")


def context_length(model: nn.Module) -> int | None:
    """Tokens the model was built for; None if its config does not say."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
