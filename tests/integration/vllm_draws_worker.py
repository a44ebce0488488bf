"""Two exported draws as LoRA ids of one vLLM, for tests/integration/test_predictive_builtin.py. Prints one JSON object.

python vllm_draws_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from vlm_reason.compat.vllm import InProcess, Settings, lora_rank
from vlm_reason.engines.base import Law, ScoreRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.models.builtin import ensure_builtin
from vlm_reason.models.load import load_model
from vlm_reason.weights import DiagonalGaussian, Origin
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.predictive import generate

TEXTS = ("The capital of France is", "Question: Which gas do plants take in from the air?\nAnswer:")
STEPS = 8


def main(folder: Path) -> None:
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).eval()
    mean = {k: torch.randn_like(v) * 0.05 for k, v in adapter_tensors(model).items()}
    sigma = {k: torch.full_like(v, 0.05) for k, v in mean.items()}
    posterior = DiagonalGaussian(peft_config_dict(model, "default"), mean, sigma, Origin())
    posterior.write(model, posterior.mean())
    prompts = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    alone = generate(posterior, model, prompts, 2, STEPS, seed=3).ids
    folders = posterior.export_samples(2, folder / "draws", seed=3)

    llm = InProcess(
        Settings(
            folder=str(ensure_builtin()), dtype="float32", max_model_len=128, max_num_seqs=8, tensor_parallel_size=1,
            external_launcher=False, cache_bytes=1 << 28, memory_share=None, eager=True, chunked_prefill=False,
            prefix_caching=True, lora_rank=lora_rank(4), adapters=3,
        )
    )  # fmt: skip
    ids = [(f"draw{s}", s + 1, str(path)) for s, path in enumerate(folders)]
    rows = [(prompt, lora) for lora in ids for prompt in prompts]
    params = {"temperature": 0.0, "max_tokens": STEPS, "ignore_eos": True, "logprobs": 1}
    served = llm.generate([r[0] for r in rows], [params] * len(rows), [r[1] for r in rows])

    own = []  # what transformers says of the tokens that vLLM wrote, under the draw that wrote them
    for number, tree in enumerate(posterior.sample(2, 3)):
        posterior.write(model, tree)
        part = served[2 * number : 2 * number + 2]
        asked = [ScoreRequest(p, out.ids, Law("default")) for p, out in zip(prompts, part, strict=True)]
        own += HFEngine(model, tokenizer).score(asked)
    posterior.write(model, posterior.mean())
    at_mean = HFEngine(model, tokenizer).score(
        [ScoreRequest(r[0], out.ids, Law("default")) for r, out in zip(rows, served, strict=True)]
    )
    # greedy log-probabilities of vLLM are those of a one-hot law: ask it again for those of the same tokens as a prompt
    params = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
    whole = [(*r[0], *out.ids) for r, out in zip(rows, served, strict=True)]
    again = llm.generate(whole, [params] * len(rows), [r[1] for r in rows])
    theirs = [out.prompt_logps[len(r[0]) :] for r, out in zip(rows, again, strict=True)]  # type: ignore[index]

    def apart(a, b) -> float:  # type: ignore[no-untyped-def]
        return max(abs(x - y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))

    texts = [list(out.ids) for out in served]
    print(
        json.dumps({
            "served": [texts[:2], texts[2:]],
            "alone": [[list(text) for text in draw] for draw in alone],
            "apart": apart(theirs, own),
            "between_draws": apart(own, at_mean),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
