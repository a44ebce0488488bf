"""Tokens per second of the `hf` engine against plain `model.generate` on the same prompts.

    python scripts/bench/sampling.py            # built-in model, bf16, batch 64: about three minutes on 2 cores
    python scripts/bench/sampling.py --model Qwen/Qwen2.5-0.5B-Instruct

Two rows: 64 distinct few-shot arithmetic problems, and 8 problems with 8 samples each. Both sides draw the same number
of tokens (nothing stops early) at temperature 1, in alternating repetitions; `value` is the ratio of the medians.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time

import torch
from command import bench_parser
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vlm_reason.engines.base import Law, SampleRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.models.load import load_model

BAR = 0.95
HEADER = (
    "Solve the sum step by step, then give the answer.\n\n"
    "Question: 12 + 7 - 5\nReasoning: 12 + 7 = 19. 19 - 5 = 14.\nAnswer: 14\n\n"
    "Question: 40 - 13\nReasoning: 40 - 13 = 27.\nAnswer: 27\n\n"
)


def problems(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    draw = lambda: str(rng.randint(1, 99))  # noqa: E731
    return [
        f"{HEADER}Question: {' + '.join(draw() for _ in range(rng.randint(2, 3)))}\nReasoning:"
        for _ in range(count)
    ]


def time_engine(engine: HFEngine, prompts: list[tuple[int, ...]], tokens: int, repetition: int) -> float:
    requests = [SampleRequest(p, 1000 * repetition + i, tokens, Law()) for i, p in enumerate(prompts)]
    start = time.perf_counter()
    completions = engine.sample(requests)
    seconds = time.perf_counter() - start
    assert all(len(c.ids) == tokens for c in completions)
    return len(prompts) * tokens / seconds


@torch.no_grad()
def time_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[int, ...]], tokens: int
) -> float:
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=None,
    )  # fmt: skip
    start = time.perf_counter()
    batch = tokenizer.pad({"input_ids": [list(p) for p in prompts]}, return_tensors="pt").to(model.device)
    output = model.generate(**batch, generation_config=config)
    seconds = time.perf_counter() - start
    assert output.shape[1] == batch["input_ids"].shape[1] + tokens
    return len(prompts) * tokens / seconds


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    engine = HFEngine(model, tokenizer, batch_size=args.batch)
    rows = {
        "distinct_prompts": problems(args.batch, seed=0),
        "8_samples_a_prompt": [p for p in problems(args.batch // 8, seed=1) for _ in range(8)],
    }
    for row, texts in rows.items():
        prompts = [tuple(ids) for ids in tokenizer(texts).input_ids]
        time_engine(engine, prompts, 2, 0)  # warm up
        time_generate(model, tokenizer, prompts, 2)
        ours, plain = [], []
        for repetition in range(args.repetitions):
            ours.append(time_engine(engine, prompts, args.tokens, repetition))
            plain.append(time_generate(model, tokenizer, prompts, args.tokens))
            print(
                f"{row} {repetition}: engine {ours[-1]:.1f}, generate {plain[-1]:.1f} tok/s", file=sys.stderr
            )
        ratio = statistics.median(ours) / statistics.median(plain)
        detail = {
            "model": args.model, "dtype": args.dtype, "device": str(model.device), "threads": torch.get_num_threads(),
            "batch": args.batch, "prompt_tokens": sum(map(len, prompts)), "new_tokens": args.tokens,
            "engine_tokens_per_second": [round(x, 1) for x in ours],
            "generate_tokens_per_second": [round(x, 1) for x in plain],
        }  # fmt: skip
        result = {"bench": "sampling", "row": row, "value": round(ratio, 3), "unit": "ratio", "bar": BAR}
        print(json.dumps({**result, "ok": ratio >= BAR, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
