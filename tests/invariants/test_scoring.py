"""The scorer against a plain forward pass: values, gradients, padding, chunks, batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from vlm_reason.models.adapters import (
    POSTERIOR,
    AdapterConfig,
    adapter_parameters,
    add_adapters,
    trainable,
    use_adapter,
)
from vlm_reason.scoring import head
from vlm_reason.scoring.logprobs import batches, log_law, score_sequences
from vlm_reason.scoring.padded import padded_batches

Pair = tuple[tuple[int, ...], tuple[int, ...]]


def pairs(count: int = 9, seed: int = 0, longest: int = 12) -> list[Pair]:
    rng = random.Random(seed)

    def ids(low: int) -> tuple[int, ...]:
        return tuple(rng.randrange(64) for _ in range(rng.randrange(low, longest)))

    return [(ids(1), ids(0)) for _ in range(count)]


def plain(model: nn.Module, pair: Pair, temperature: float = 1.0) -> Tensor:
    """One sequence, no batch, no padding, every logit."""
    context, target = pair
    logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(target, dtype=torch.long)[:, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_a_plain_forward(tiny_llama: LlamaForCausalLM, temperature: float) -> None:
    batch = pairs()
    logps, mask = score_sequences(tiny_llama, batch, temperature)
    assert logps.dtype == torch.float32 and mask.shape == logps.shape == (9, max(len(t) for _, t in batch))
    assert mask.sum(-1).tolist() == [len(t) for _, t in batch]
    assert (logps[~mask] == 0).all()
    for row, keep, pair in zip(logps, mask, batch, strict=True):
        torch.testing.assert_close(row[keep], plain(tiny_llama, pair, temperature), rtol=0, atol=1e-5)


def test_equals_a_left_padded_forward(tiny_llama: LlamaForCausalLM) -> None:
    batch = [pair for pair in pairs() if pair[1]]
    width = max(len(c) + len(t) for c, t in batch)
    ids = torch.tensor([[0] * (width - len(c) - len(t)) + [*c, *t] for c, t in batch])
    mask = torch.tensor([[0] * (width - len(c) - len(t)) + [1] * (len(c) + len(t)) for c, t in batch])
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    law = tiny_llama(ids, attention_mask=mask, position_ids=position).logits.log_softmax(-1)
    logps, _ = score_sequences(tiny_llama, batch)
    for n, (_, target) in enumerate(batch):
        expected = law[n, -len(target) - 1 : -1].gather(-1, torch.tensor(target)[:, None]).squeeze(-1)
        torch.testing.assert_close(logps[n, : len(target)], expected, rtol=0, atol=1e-5)


def test_does_not_depend_on_order_or_company(tiny_llama: LlamaForCausalLM) -> None:
    batch = pairs()
    together, _ = score_sequences(tiny_llama, batch)
    order = random.Random(1).sample(range(9), 9)
    shuffled, _ = score_sequences(tiny_llama, [batch[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    for n, pair in enumerate(batch):
        alone, _ = score_sequences(tiny_llama, [pair])
        torch.testing.assert_close(alone[0], together[n, : len(pair[1])], rtol=0, atol=1e-5)


def test_chunks_of_the_head_change_nothing(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        tiny_llama.zero_grad()
        logps, _ = score_sequences(tiny_llama, pairs())
        (logps * torch.linspace(-1, 1, logps.shape[1])).sum().backward()
        return logps.detach(), [p.grad.clone() for p in tiny_llama.parameters()]

    whole, whole_grads = run()
    monkeypatch.setattr(head, "CHUNK", 4 * 64)
    parts, parts_grads = run()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    for ours, theirs in zip(parts_grads, whole_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(score_sequences(tiny_llama, pairs())[0], whole, rtol=0, atol=1e-6)


def test_gradients_equal_the_plain_computation(tiny_llama: LlamaForCausalLM) -> None:
    model = add_adapters(tiny_llama, AdapterConfig(r=4))
    with torch.no_grad():
        for parameter in adapter_parameters(model, POSTERIOR).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    trainable(model, [POSTERIOR])
    batch = [pair for pair in pairs() if pair[1]]
    weights = torch.randn(len(batch))
    grads: list[dict[str, Tensor]] = []
    for scored in (True, False):
        model.zero_grad()
        with use_adapter(model, POSTERIOR):
            if scored:
                loss = (weights * score_sequences(model, batch, 0.8)[0].sum(-1)).sum()
            else:
                loss = sum(w * plain(model, pair, 0.8).sum() for w, pair in zip(weights, batch, strict=True))
        loss.backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == adapter_parameters(model, POSTERIOR).keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-4, atol=1e-4)


def test_microbatched_gradients_add_up(tiny_llama: LlamaForCausalLM) -> None:
    batch = pairs(12)
    gradients = []
    for budget in (10_000, 40, 1):
        tiny_llama.zero_grad()
        for chosen, _ in batches(tiny_llama, batch, budget):
            score_sequences(tiny_llama, [batch[i] for i in chosen])[0].sum().backward()
        gradients.append(tiny_llama.model.layers[0].self_attn.q_proj.weight.grad.clone())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-4)


def test_soft_caps_and_scales_are_the_models_own() -> None:
    shared = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    models: list[PreTrainedModel] = [
        Gemma2ForCausalLM(Gemma2Config(**shared, head_dim=8, final_logit_softcapping=2.0)),
        GraniteForCausalLM(GraniteConfig(**shared, logits_scaling=3.0)),
    ]
    for model in models:
        model.eval()
        batch = [((3, 4, 5), (6, 7)), ((9,), (10, 11, 12))]
        logps, mask = score_sequences(model, batch)
        for row, keep, pair in zip(logps, mask, batch, strict=True):
            torch.testing.assert_close(row[keep], plain(model, pair), rtol=0, atol=1e-5)


def test_empty_targets_and_contexts(tiny_llama: LlamaForCausalLM) -> None:
    logps, mask = score_sequences(tiny_llama, [((3, 4), ()), ((5,), ())])
    assert logps.shape == mask.shape == (2, 0)
    assert score_sequences(tiny_llama, [])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="sequence 1 has an empty context"):
        score_sequences(tiny_llama, [((3,), (4,)), ((), (5,))])


def test_only_labelled_rows_meet_the_head(tiny_llama: LlamaForCausalLM) -> None:
    rows: list[int] = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    batch = pairs()
    score_sequences(tiny_llama, batch)
    assert rows == [sum(len(t) for _, t in batch)]


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (2.0, 0.3), (1.0, 1e-6), (0.0, 0.5)]
)
def test_laws_are_normalised(temperature: float, top_p: float) -> None:
    logits = 3 * torch.randn(20, 50)
    torch.testing.assert_close(log_law(logits, temperature, top_p).exp().sum(-1), torch.ones(20))


def test_top_p_keeps_the_smallest_set_and_ties() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)):
        p = torch.tensor([0.4, 0.3, 0.2, 0.1])[:kept]
        torch.testing.assert_close(log_law(logits, 1.0, top_p).exp()[:kept], p / p.sum())
        assert (log_law(logits, 1.0, top_p)[kept:] == -torch.inf).all()
    assert (log_law(torch.zeros(8), 1.0, 0.3) == -torch.tensor(8.0).log()).all()  # all tied: all kept


def test_scores_under_a_truncated_law(tiny_llama: LlamaForCausalLM) -> None:
    pair = ((5, 9, 30), (7, 8, 20, 21))
    law = log_law(tiny_llama(torch.tensor([pair[0] + pair[1]])).logits[0, 2:-1], 1.2, 0.6)
    expected = law.gather(-1, torch.tensor(pair[1])[:, None]).squeeze(-1)
    logps, _ = score_sequences(tiny_llama, [pair], 1.2, 0.6)
    torch.testing.assert_close(logps[0], expected, rtol=0, atol=1e-5)
    assert (logps == -torch.inf).any()
    untempered, _ = score_sequences(tiny_llama, [pair], 0.0, 0.6)
    torch.testing.assert_close(untempered[0], plain(tiny_llama, pair), rtol=0, atol=1e-5)


# --- batches ------------------------------------------------------------------------------------------------------


def rows(lengths: list[int], budget: int) -> list[list[int]]:
    return [batch.members for batch in padded_batches(lengths, budget)]


def test_padded_batches() -> None:
    assert rows([3, 9, 2, 5, 5], 10) == [[1], [3, 4], [0, 2]]
    assert rows([3, 9, 2, 5, 5], 1) == [[1], [3], [4], [0], [2]]
    assert padded_batches([3, 9, 2, 5, 5], 45) == [([1, 3, 4, 0, 2], 45)]
    assert rows([0, 0], 1) == [[0], [1]]
    assert rows([], 8) == []
    with pytest.raises(ValueError, match="token_budget must be >= 1, got 0"):
        padded_batches([1], 0)


def test_padded_batches_keep_the_budget() -> None:
    lengths = [random.Random(3).randrange(1, 60) for _ in range(200)] + [500]
    cut = padded_batches(lengths, 128)
    assert sorted(i for batch in cut for i in batch.members) == list(range(201))
    assert all(b.tokens == max(lengths[i] for i in b.members) * len(b.members) for b in cut)
    assert all(len(b.members) == 1 or b.tokens <= 128 for b in cut)
