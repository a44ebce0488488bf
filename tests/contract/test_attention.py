"""What tree attention relies on in torch and transformers."""

from __future__ import annotations

import inspect

import torch
from transformers import (
    AttentionInterface,
    BloomForCausalLM,
    LlamaForCausalLM,
    MambaForCausalLM,
    PreTrainedModel,
)

from vlm_reason.compat.transformers import attention_kind, attention_of
from vlm_reason.scoring.attention import NAME, attend, tree_attention

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def test_the_kernels_signatures() -> None:
    assert [a.name for a in FORWARD.default._schema.arguments] == [
        "query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale",
    ]  # fmt: skip
    assert [r.name for r in FORWARD.default._schema.returns] == ["output", "logsumexp"]
    assert [a.name for a in BACKWARD.default._schema.arguments] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask", "scale",
    ]  # fmt: skip


def test_the_kernel_takes_grouped_heads_by_stride_0_and_returns_the_normaliser() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 8)
    out, norm = FORWARD(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1), 0.0, False, scale=0.5)
    scores = 0.5 * q @ k.transpose(-1, -2)
    torch.testing.assert_close(norm, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


def test_the_backward_kernel_takes_a_joint_normaliser() -> None:
    """The gradient of one block of a softmax over two is its ordinary one with the joint output and normaliser."""
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    out = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), upstream)
    norm = (q @ k.transpose(-1, -2)).logsumexp(-1)
    with torch.no_grad():
        for rows in (slice(0, 2), slice(2, 6)):
            _, dk, dv = BACKWARD(upstream, q, k[:, :, rows], v[:, :, rows], out, norm, 0.0, False, scale=1.0)
            torch.testing.assert_close(dk, expected[1][:, :, rows], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dv, expected[2][:, :, rows], rtol=1e-4, atol=1e-5)


def test_the_flags_of_model_classes() -> None:
    assert PreTrainedModel._supports_attention_backend is False and PreTrainedModel._is_stateful is False
    assert LlamaForCausalLM._supports_attention_backend and MambaForCausalLM._is_stateful
    assert not BloomForCausalLM._supports_attention_backend


def test_attention_is_switched_and_switched_back(tiny_llama: LlamaForCausalLM) -> None:
    assert attention_of(tiny_llama) == "softmax" and attention_kind(tiny_llama) == "sdpa"
    with tree_attention(tiny_llama):
        assert attention_kind(tiny_llama) == NAME
        with tree_attention(tiny_llama):  # a scorer inside a training step
            assert attention_kind(tiny_llama) == NAME
        assert attention_kind(tiny_llama) == NAME
    assert attention_kind(tiny_llama) == "sdpa"
    assert AttentionInterface()[NAME] is attend
    names = list(inspect.signature(attend).parameters)
    assert names[:7] == ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]


def test_the_decoder_hands_the_tree_to_every_layer(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[object] = []
    marker = object()

    def spy(module, query, key, value, mask, dropout=0.0, scaling=None, *, tree=None, **kwargs):
        assert mask is None
        seen.append(tree)
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    tiny_llama.set_attn_implementation("spy")
    tiny_llama.get_decoder()(input_ids=torch.tensor([[3, 4]]), use_cache=False, tree=marker)
    assert seen == [marker, marker]
