"""The tree scorer against separate forward passes: values, gradients, models, windows, adapters, micro-batches."""

from __future__ import annotations

import random
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlm_reason.models.adapters import AdapterConfig, add_adapters, trainable, use_adapter
from vlm_reason.scoring import attention, tree
from vlm_reason.scoring.attention import masked_attention, tree_attention
from vlm_reason.scoring.forest import forest_batches, grow
from vlm_reason.scoring.logprobs import batches, score_sequences
from vlm_reason.scoring.padded import score_padded
from vlm_reason.scoring.tree import way

Pair = tuple[tuple[int, ...], tuple[int, ...]]

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2, max_position_embeddings=128,
)  # fmt: skip
GROUPED = dict(**SIZES, num_key_value_heads=2)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_grouped": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "qwen2_half_sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
        )
    ),
}


def ids(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.randrange(64) for _ in range(rng.randint(low, high)))


def groups(problems: int = 3, traces: int = 4, answers: int = 2, seed: int = 0) -> list[Pair]:
    """Traces behind their problem's prompt, answers behind each trace; an equal pair, and one that begins another."""
    rng = random.Random(seed)
    out: list[Pair] = []
    for _ in range(problems):
        x = ids(rng, 4, 12)
        for _ in range(traces):
            z = ids(rng, 1, 9)
            out.append((x, z))
            out.extend((x + z, ids(rng, 1, 3)) for _ in range(answers))
    x, z = out[0]
    return [*out, (x, z), (x, z[:1])]


def separately(model: PreTrainedModel, pair: Pair) -> Tensor:
    """One sequence, one forward through the model's own attention and head."""
    context, target = pair
    logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(target)[:, None]).squeeze(-1)


def left_padded(model: PreTrainedModel, pairs: list[Pair]) -> list[Tensor]:
    width = max(len(c) + len(t) for c, t in pairs)
    tokens = torch.tensor([[0] * (width - len(c) - len(t)) + [*c, *t] for c, t in pairs])
    mask = torch.tensor([[0] * (width - len(c) - len(t)) + [1] * (len(c) + len(t)) for c, t in pairs])
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    law = model(tokens, attention_mask=mask, position_ids=position).logits.float().log_softmax(-1)
    return [
        law[n, -len(t) - 1 : -1].gather(-1, torch.tensor(t)[:, None]).squeeze(-1)
        for n, (_, t) in enumerate(pairs)
    ]


def forwarded_tokens(model: PreTrainedModel, pairs: list[Pair]) -> int:
    return sum(batch.tokens for batch in batches(model, pairs, 1_000_000))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4
) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm()) <= tolerance * float(expected.norm()) + 1e-7, name


# ---- equal to separate forwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(MODELS))
def test_equals_separate_forwards(name: str, implementation: str) -> None:
    model = MODELS[name]().eval()
    model.set_attn_implementation(implementation)
    pairs = groups()
    weights = torch.randn(len(pairs), max(len(t) for _, t in pairs))
    logps, mask = score_sequences(model, pairs)
    assert way(model) == ("tree" if implementation == "sdpa" else "mask")
    ours = gradients(model, (logps * weights).sum())
    expected = [separately(model, pair) for pair in pairs]
    for row, keep, one in zip(logps, mask, expected, strict=True):
        torch.testing.assert_close(row[keep], one, rtol=0, atol=1e-5)
    loss = sum((w[: len(one)] * one).sum() for w, one in zip(weights, expected, strict=True))
    assert_same_gradients(ours, gradients(model, loss))
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama_grouped", "qwen3", "mistral_sliding"])
@torch.no_grad()
def test_equals_padded_forwards_on_either_side(name: str) -> None:
    model, pairs = MODELS[name]().eval(), groups()
    logps, mask = score_sequences(model, pairs)
    torch.testing.assert_close(logps, score_padded(model, pairs)[0], rtol=0, atol=1e-5)
    for row, keep, one in zip(logps, mask, left_padded(model, pairs), strict=True):
        torch.testing.assert_close(row[keep], one, rtol=0, atol=1e-5)


def test_values_in_bf16_are_those_of_the_padded_batch_to_its_rounding(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups()
    exact, _ = score_sequences(tiny_llama, pairs)
    low = tiny_llama.to(torch.bfloat16)
    error = [(score(low, pairs)[0] - exact).abs().mean() for score in (score_sequences, score_padded)]
    assert error[0] < 1.5 * error[1]


def test_under_autocast_it_is_the_models_own_forward_to_bf16(tiny_llama: LlamaForCausalLM) -> None:
    """Attention and head in bf16, as SDPA and linear layers are there; the backward pass runs outside of it."""
    pairs = groups()
    exact, _ = score_sequences(tiny_llama, pairs)
    truth = gradients(tiny_llama, exact.sum())
    errors = []
    for score in (score_sequences, lambda model, pairs: (separately_padded(model, pairs), None)):
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = score(tiny_llama, pairs)
        assert logps.dtype == torch.float32
        found = gradients(tiny_llama, logps.sum())
        gap = sum(float((found[k] - g).norm() ** 2) for k, g in truth.items())
        errors.append((float((logps - exact).detach().abs().mean()), gap))
    assert 0 < errors[0][0] < 1.5 * errors[1][0] and errors[0][1] < 2 * errors[1][1]


def separately_padded(model: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Every sequence by the model's own forward, right-padded with 0 into [N, T]."""
    return torch.nn.utils.rnn.pad_sequence([separately(model, pair) for pair in pairs], batch_first=True)


@pytest.mark.parametrize("kind", ["answers at every position", "one path", "nothing shared"])
def test_shapes_of_trees(tiny_llama: LlamaForCausalLM, kind: str) -> None:
    rng = random.Random(2)
    x, z = ids(rng, 9, 9), ids(rng, 20, 20)
    pairs: list[Pair] = {
        "answers at every position": [(x + z[:t], ids(rng, 3, 3)) for t in range(20)] + [(x, z)],
        "one path": [(x + z[:t], z[t : t + 2]) for t in range(18)],
        "nothing shared": [((n,), ids(rng, 1, 6)) for n in range(12)],
    }[kind]
    logps, mask = score_sequences(tiny_llama, pairs)
    ours = gradients(tiny_llama, logps.sum())
    expected, _ = score_padded(tiny_llama, pairs)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    assert_same_gradients(ours, gradients(tiny_llama, expected.sum()))


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_the_block_mask_of_flex_attention_is_the_forests(window: int | None) -> None:
    forest = grow([c + t for c, t in groups()])
    q, k, v = (torch.randn(1, heads, len(forest), 16) for heads in (4, 2, 2))
    flex = attention._flex(q, k, v, forest, window, 0.25)
    assert flex_attention is not None  # uncompiled here; compiled on CUDA
    grouped = [x[0].repeat_interleave(2, dim=0).unsqueeze(0) for x in (k, v)]
    torch.testing.assert_close(
        flex, masked_attention(q, *grouped, forest, window, 0.25)[0], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_flex_models_are_handed_a_block_mask(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups()
    expected, _ = score_sequences(tiny_llama, pairs)
    tiny_llama.set_attn_implementation("flex_attention")
    assert way(tiny_llama) == "mask"
    torch.testing.assert_close(score_sequences(tiny_llama, pairs)[0], expected, rtol=0, atol=1e-5)


def test_attention_blocks_give_the_masks_gradient() -> None:
    forest = grow([c + t for c, t in groups()])
    assert any(s.stop > s.end for s in forest.segments)
    q, k, v = (torch.randn(2, 3, len(forest), 8, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, 3, len(forest), 8)
    blocks = attention._Segmented.apply(q, k, v, 0.3, forest.segments)
    masked = masked_attention(q, k, v, forest, None, 0.3)
    torch.testing.assert_close(blocks, masked, rtol=0, atol=2e-6)
    for ours, theirs in zip(
        torch.autograd.grad((blocks * weights).sum(), (q, k, v)),
        torch.autograd.grad((masked * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- under adapters, checkpointing, other ways ---------------------------------------------------------------------


def test_adapters_and_gradient_checkpointing(tiny_llama: LlamaForCausalLM) -> None:
    model = add_adapters(tiny_llama, AdapterConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trainable(model, ["posterior"])
    model.train()
    pairs, results = groups(), []
    for score, checkpointed in ((score_padded, False), (score_sequences, False), (score_sequences, True)):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        with (
            use_adapter(model, "posterior"),
            nullcontext() if score is score_padded else tree_attention(model),
        ):
            logps, _ = score(model, pairs)
            logps.sum().backward()
        results.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert results[0] and all("posterior" in k for k in results[0])
    for other in results[1:]:
        assert_same_gradients(other, results[0])


@torch.no_grad()
def test_flash_attention_gets_single_paths(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers finds the sequences by positions that start anew; SDPA does so too, so it can stand in here."""
    pairs = groups()
    expected, _ = score_sequences(tiny_llama, pairs)
    monkeypatch.setattr(tree, "way", lambda model: "packed")
    monkeypatch.setattr(attention, "REPLACES", ())
    shapes: list[tuple[int, ...]] = []
    tiny_llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    torch.testing.assert_close(score_sequences(tiny_llama, pairs)[0], expected, rtol=0, atol=1e-5)
    assert shapes == [(1, sum(len(c) + len(t) - 1 for c, t in pairs))]


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (
            lambda: MambaForCausalLM(
                MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
            ),
            "recurrent layers",
        ),
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)),
            "attention of its own",
        ),
    ],
)
@torch.no_grad()
def test_what_no_tree_can_express_is_padded_and_said_once(model, what: str) -> None:
    made, pairs = model().eval(), groups(1)
    tree._said.clear()
    with pytest.warns(UserWarning, match=f"{type(made).__name__} has {what}"):
        logps, mask = score_sequences(made, pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_sequences(made, pairs[:1])
    for row, keep, pair in zip(logps, mask, pairs, strict=True):
        torch.testing.assert_close(row[keep], separately(made, pair), rtol=0, atol=1e-4)


def test_a_call_without_a_tree_inside_the_block_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with tree_attention(tiny_llama), pytest.raises(RuntimeError, match="must be given tree=Forest"):
        tiny_llama(torch.tensor([[3, 4]]))
    tiny_llama(torch.tensor([[3, 4]]))


# ---- what is forwarded -----------------------------------------------------------------------------------------------


def test_wanted_tokens_alone_meet_the_head(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups()
    everything, _ = score_sequences(tiny_llama, pairs)
    rng = random.Random(1)
    wanted = [[rng.random() < 0.5 for _ in t] for _, t in pairs]
    rows: list[int] = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    logps, mask = score_sequences(tiny_llama, pairs, wanted=wanted)
    assert mask.tolist() == [[*keep, *[False] * (mask.shape[1] - len(keep))] for keep in wanted]
    torch.testing.assert_close(logps, everything.masked_fill(~mask, 0.0), rtol=0, atol=1e-5)
    distinct = {
        (*c, *t[: i + 1])
        for (c, t), keep in zip(pairs, wanted, strict=True)
        for i in range(len(t))
        if keep[i]
    }
    assert rows == [len(distinct)]


def test_every_shared_token_is_forwarded_once(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups()
    shapes: list[tuple[int, ...]] = []
    tiny_llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score_sequences(tiny_llama, pairs)
    inputs = [(c + t)[:-1] for c, t in pairs]
    prefixes = {seq[:n] for seq in inputs for n in range(1, len(seq) + 1)}
    assert shapes == [(1, len(prefixes))]
    assert forwarded_tokens(tiny_llama, pairs) == len(prefixes)


def test_batches_keep_the_budget_and_the_groups(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups(12, 4, 2)
    whole = forwarded_tokens(tiny_llama, pairs)
    for budget in (60, 150, 10_000):
        cut = batches(tiny_llama, pairs, budget)
        assert sorted(i for batch in cut for i in batch.members) == list(range(len(pairs)))
        assert all(batch.tokens <= budget for batch in cut)
        for batch in cut:
            assert forwarded_tokens(tiny_llama, [pairs[i] for i in batch.members]) == batch.tokens
    assert [b.tokens for b in batches(tiny_llama, pairs, 10_000)] == [whole]
    # every group fits into 150 tokens, so none is split: no token is forwarded twice
    assert sum(b.tokens for b in batches(tiny_llama, pairs, 150)) == whole
    assert [b.members for b in batches(tiny_llama, [((1, 2), (3, 4)), ((1, 2), (3, 5))], 1)] == [[0], [1]]
    with pytest.raises(ValueError, match="token_budget must be >= 1, got 0"):
        batches(tiny_llama, pairs, 0)


def test_micro_batches_give_the_same_gradient(tiny_llama: LlamaForCausalLM) -> None:
    pairs = groups()
    expected = gradients(tiny_llama, score_padded(tiny_llama, pairs)[0].sum())
    for budget in (10_000, 40, 1):
        tiny_llama.zero_grad()
        for batch in batches(tiny_llama, pairs, budget):
            score_sequences(tiny_llama, [pairs[i] for i in batch.members])[0].sum().backward()
        assert_same_gradients({k: p.grad for k, p in tiny_llama.named_parameters()}, expected)


# ---- the forest ----------------------------------------------------------------------------------------------------


def test_a_forest_by_hand() -> None:
    forest = grow([(5, 6, 7), (5, 6, 8, 9), (4,), (5, 6), (), (5, 6, 8, 9)])
    assert forest.ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert forest.position.tolist() == [0, 0, 1, 2, 2, 3]
    assert forest.stop.tolist() == [1, 6, 6, 4, 6, 6]
    assert [p.tolist() for p in forest.paths] == [[1, 2, 3], [1, 2, 4, 5], [0], [1, 2], [], [1, 2, 4, 5]]
    assert [tuple(s) for s in forest.segments] == [(0, 1, 1), (1, 3, 6), (3, 4, 4), (4, 6, 6)]
    assert forest.trees() == [(0, 1), (1, 6)] and forest.depth == 4
    assert forest.mask(1, 6).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1],
    ]  # fmt: skip
    assert forest.mask(1, 6, window=2).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_a_forest_of_single_paths_and_an_empty_one() -> None:
    forest = grow([(5, 6, 7), (5, 6)], share=False)
    assert forest.ids.tolist() == [5, 6, 7, 5, 6] and forest.position.tolist() == [0, 1, 2, 0, 1]
    assert forest.trees() == [(0, 3), (3, 5)]
    empty = grow([(), ()])
    assert len(empty) == 0 and empty.segments == () and empty.depth == 0


def test_a_forest_attends_along_every_sequence() -> None:
    sequences = [c + t for c, t in groups(seed=5)]
    forest = grow(sequences)
    mask = forest.mask(0, len(forest))
    for sequence, path in zip(sequences, forest.paths, strict=True):
        assert forest.ids[path].tolist() == list(sequence)
        assert forest.position[path].tolist() == list(range(len(sequence)))
        for depth, row in enumerate(path):
            assert mask[row].nonzero().flatten().tolist() == sorted(path[: depth + 1].tolist())
    covered = [row for s in forest.segments for row in range(s.start, s.end)]
    assert covered == list(range(len(forest)))


def test_batches_of_a_forest_that_exceed_the_budget_fall_apart() -> None:
    inputs = [(1, 2, 3), (1, 2, 4), (1, 2, 5)]
    assert forest_batches(inputs, [2, 2, 2], 4) == [([0, 1], 4), ([2], 3)]
    assert forest_batches(inputs, [2, 2, 2], 5) == [([0, 1, 2], 5)]
    assert forest_batches(inputs, [2, 2, 2], 6, share=False) == [([0, 1], 6), ([2], 3)]
