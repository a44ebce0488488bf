"""TRL's fused log-probability kernel: its arguments, and that it computes what ours does (its torch form, on CPU)."""

from __future__ import annotations

import inspect

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from vlm_reason.compat.trl import fused_logprobs
from vlm_reason.scoring.head import FusedLogProbs, Logits


def test_the_arguments_we_pass_by_position() -> None:
    names = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip


@pytest.mark.parametrize("law", [Logits(), Logits(0.4, 3.0, 0.8)], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_equals_ours(law: Logits, frozen: bool) -> None:
    results = []
    for kernel in ("trl", "ours"):
        torch.manual_seed(0)
        hidden = torch.randn(30, 16, requires_grad=True)
        weight, bias = torch.randn(90, 16).requires_grad_(not frozen), torch.randn(90)
        targets = torch.randint(90, (30,))
        if kernel == "trl":
            logps = fused_logprobs(hidden, weight, bias, targets, law.temperature, law.cap, law.scale)
        else:
            logps = FusedLogProbs.apply(hidden, weight, bias, targets, law, 90 * 7)
        (logps * torch.linspace(-1, 1, 30)).sum().backward()
        results.append((logps.detach(), hidden.grad, weight.grad))
    for theirs, ours in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
