"""A tiny model, adapters that move it, and suites over sums: what the tests of the harness share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model

from vlm_reason.store import SampleRecord

TEMPLATE = {"base": "steps", "prior": "{question}=", "posterior": "{question}={hint}=", "cue": "a:"}


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model, made to prefer digits and the end of a line, so that a good part of what it says is a number: one
    dimension of the embedding is the same for all tokens, and the head reads a preference off it."""
    liked = tokenizer.convert_tokens_to_ids([*"0123", "\n"])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.5
        model.lm_head.weight[liked, 0] += torch.tensor([0.7, 0.7, 0.7, 0.7, 1.0])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model_folder: Path, seed: int, scale: float = 0.5, rank: int = 2) -> Path:
    """A stock PEFT adapter of the tiny model with weights drawn from `seed`: a particle of a posterior."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "o_proj"]
        )
        wrapped = get_peft_model(base, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=scale)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def write_sums(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"id": f"p{i}", "question": f"{i}+{i + 1}", "answer": str(2 * i + 1)}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def suite_data(
    folder: Path, model: Path, members: Sequence[Path] = (), problems: int = 6, **keys: Any
) -> dict[str, Any]:
    """The mapping of a suite with two tasks, `low` and `high`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder / "low.jsonl", problems)
    write_sums(folder / "high.jsonl", problems, start=40)
    entry = {"template": TEMPLATE, "verifier": "number"}
    return {
        "suite": "sums",
        "model": str(model),
        "members": [str(m) for m in members],
        "data": str(folder),
        "sampling": {"traces": 4, "temperature": 1.0, "max_trace_tokens": 12, "max_answer_tokens": 4},
        "tasks": {
            "low": {"task": {"kind": "jsonl", "name": "low.jsonl"}, **entry},
            "high": {"task": {"kind": "jsonl", "name": "high.jsonl"}, **entry},
        },
        "output_dir": str(folder / "out"),
        **keys,
    }  # fmt: skip


def write_suite(folder: Path, model: Path, members: Sequence[Path] = (), **keys: Any) -> Path:
    data = suite_data(folder, model, members, **keys)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def record(problem: int, k: int, correct: bool, proposal: str, weights: str, canonical: str) -> SampleRecord:
    """A judged sample of one token."""
    return SampleRecord(
        key=f"{problem:08x}{k:08x}{zlib.crc32(weights.encode()):016x}",
        problem_id=f"p{problem}", question=f"{problem}?", reference="1", prompt_ids=(1,), trace_ids=(2,),
        trace_text="t", trace_logps=(-1.0,), finish="stop", seed=k, temperature=1.0, top_p=1.0, proposal=proposal,
        saw_answer=False, weights=weights, engine="e", k=k, m=1, answer_ids=(3,), answer_text=canonical,
        answer_logps=(-1.0,), answer_finish="stop", correct=correct, score=1.0, parsed=canonical, failed=False,
        canonical=canonical,
    )  # fmt: skip
