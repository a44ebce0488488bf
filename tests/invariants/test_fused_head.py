"""The fused LM head against the plain computation: values, gradients, chunks, scales and caps, what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vlm_reason.scoring import head
from vlm_reason.scoring.head import FusedLogProbs, Logits, head_logits, head_logprobs

LAWS = [Logits(), Logits(temperature=0.7), Logits(scale=0.3), Logits(cap=2.0), Logits(1.7, 3.0, 1.3)]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, law: Logits) -> Tensor:
    x = nn.functional.linear(hidden, weight, bias) * law.scale
    x = x if law.cap is None else law.cap * torch.tanh(x / law.cap)
    return (x / law.temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def inputs(rows: int = 7, vocabulary: int = 11, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return make(rows, width), make(vocabulary, width), make(vocabulary), torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("chunk", [1, 11 * 3, 10_000])
@pytest.mark.parametrize("trained", ["hidden", "weight and bias", "all", "hidden and bias"])
def test_gradcheck(law: Logits, chunk: int, trained: str) -> None:
    hidden, weight, bias, targets = inputs()
    hidden.requires_grad_("hidden" in trained or trained == "all")
    weight.requires_grad_("weight" in trained or trained == "all")
    bias.requires_grad_("bias" in trained or trained == "all")
    torch.testing.assert_close(
        FusedLogProbs.apply(hidden, weight, bias, targets, law, chunk),
        plain(hidden, weight, bias, targets, law),
        rtol=1e-10,
        atol=1e-10,
    )
    assert torch.autograd.gradcheck(
        lambda *leaves: FusedLogProbs.apply(*leaves, targets, law, chunk), (hidden, weight, bias)
    )


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_equals_the_plain_computation(law: Logits, dtype: torch.dtype, frozen: bool) -> None:
    hidden, weight, _, targets = (x.detach() for x in inputs(40, 300, 24))
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
    upstream = torch.randn(40)
    logps = FusedLogProbs.apply(*leaves, None, targets, law, 300 * 8)
    assert logps.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = plain(*exact, None, targets, law)
    (logps * upstream).sum().backward()
    (expected * upstream).sum().backward()
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert float((logps - expected).detach().abs().max()) < (1e-5 if dtype == torch.float32 else 0.1)
    for ours, theirs in zip(leaves[: 1 if frozen else 2], exact, strict=False):
        assert ours.grad.dtype == dtype
        assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < tolerance
    assert leaves[1].grad is None or not frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_logits_never_exist_together(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    """Of 500 rows, no operation of forward or backward makes a tensor of more than 8 rows of logits."""
    monkeypatch.setattr(head, "CHUNK", 8 * 64)
    tiny_llama.lm_head.weight.requires_grad_(not frozen)
    hidden = torch.randn(500, 32, requires_grad=True)
    with torch.profiler.profile(
        record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        head_logprobs(tiny_llama, hidden, torch.randint(64, (500,))).sum().backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes if 64 in shape]
    assert [8, 64] in shapes
    assert all(
        shape in ([64], [64, 32], [32, 64]) or max(set(shape) - {64}, default=0) <= 8 for shape in shapes
    )


def test_saves_no_logits_and_no_second_pass_when_the_head_is_frozen(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.lm_head.weight.requires_grad_(False)
    hidden = torch.randn(20, 32, requires_grad=True)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        logps = head_logprobs(tiny_llama, hidden, torch.randint(64, (20,)))
    assert saved == [(20, 32)]  # the Jacobian
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logps.sum().backward()
    assert not [e.key for e in profile.key_averages() if "mm" in e.key]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_hooked_head_is_entered_as_a_module(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, top_p: float
) -> None:
    """Its weights may only be there within its forward; values and gradients are the same, chunk by chunk."""
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.randint(64, (20,))
    targets[:] = head_logits(tiny_llama, hidden).argmax(-1)
    expected = head.log_law(head_logits(tiny_llama, hidden), 0.9, top_p).gather(-1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    rows: list[int] = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    monkeypatch.setattr(head, "CHUNK", 8 * 64)
    logps = head_logprobs(tiny_llama, hidden, targets, 0.9, top_p)
    assert rows == [8, 8, 4]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(logps.sum(), hidden)[0], gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            head_logprobs(tiny_llama, hidden, targets, 0.9, top_p), expected, rtol=0, atol=1e-5
        )


def test_temperature_zero_is_the_untempered_law(tiny_llama: LlamaForCausalLM) -> None:
    hidden, targets = torch.randn(6, 32), torch.randint(64, (6,))
    torch.testing.assert_close(
        head_logprobs(tiny_llama, hidden, targets, 0.0, 0.5), head_logprobs(tiny_llama, hidden, targets)
    )
