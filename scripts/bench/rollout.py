"""Tokens per second of the `vllm` engine against a bare `LLM.generate` on the same prompts, and against `hf`.

    python scripts/bench/rollout.py             # built-in model, bf16, 64 prompts: about four minutes on 2 cores
    python scripts/bench/rollout.py --model Qwen/Qwen2.5-0.5B-Instruct --tokens 128

All sides draw the same number of tokens a prompt (nothing stops early) at temperature 1, in alternating order; `value`
is the ratio of the medians. Time is the process's own CPU time on a CPU (its threads sleep while they wait, and what
else runs on the machine does not count) and the wall clock on a GPU; the wall clock is in `detail` either way.

The bare call asks for what an engine has to return: a seed a request and the log-probability of each token; a further
row leaves those out. One `LLM` serves the engine and the bare calls.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from command import bench_parser

from vlm_reason.engines.launch import enter_environment

BAR = 0.97


def bare(llm, prompts: list[tuple[int, ...]], tokens: int, repetition: int, logprobs: bool) -> int:
    from vllm import SamplingParams

    asked = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": True}
    if logprobs:
        asked["logprobs"] = 0
    params = [SamplingParams(**asked, seed=1000 * repetition + i) for i in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return sum(len(o.outputs[0].token_ids) for o in outputs)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=4)
    args = parser.parse_args()
    enter_environment({"kind": "vllm"})  # starts this script again where vLLM needs it

    import torch
    from sampling import problems

    from vlm_reason.engines.base import Engine, Law, SampleRequest
    from vlm_reason.engines.hf import HFEngine
    from vlm_reason.engines.make import make_engine
    from vlm_reason.engines.vllm import VLLMEngine
    from vlm_reason.models.load import load_model

    model, tokenizer = load_model(args.model, dtype=args.dtype)
    options = {"kind": "vllm", "batch_size": args.batch, "max_model_len": 1024}
    folder = Path(tempfile.mkdtemp())
    engine = make_engine(model, tokenizer, options, folder)
    assert isinstance(engine, VLLMEngine)
    hf = HFEngine(model, tokenizer, batch_size=args.batch)
    llm = engine.backend._engine.llm  # type: ignore[attr-defined]
    prompts = [tuple(ids) for ids in tokenizer(problems(args.batch, seed=0)).input_ids]

    def sample(by: Engine, repetition: int) -> int:
        requests = [
            SampleRequest(p, 1000 * repetition + i, args.tokens, Law()) for i, p in enumerate(prompts)
        ]
        return sum(len(c.ids) for c in by.sample(requests))

    sides: dict[str, Callable[[int], int]] = {
        "vllm": lambda r: sample(engine, r),
        "bare": lambda r: bare(llm, prompts, args.tokens, r, logprobs=True),
        "bare_without_logprobs": lambda r: bare(llm, prompts, args.tokens, r, logprobs=False),
        "hf": lambda r: sample(hf, r),
        "settle": lambda r: bare(llm, prompts, args.tokens, r, logprobs=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides if name != "settle"}
    walls: dict[str, list[float]] = {name: [] for name in speeds}
    seconds = time.perf_counter if torch.cuda.is_available() else time.process_time
    for repetition in range(args.repetitions + 1):
        # there and back; hf stays outside, because what comes behind it pays for the memory it leaves in disorder
        names = ["vllm", "bare", "bare_without_logprobs"][:: 1 if repetition % 2 else -1]
        for name in [*names, "hf", "settle"]:
            llm.reset_prefix_cache()  # every side starts without the others' prompts
            start, clock = time.perf_counter(), seconds()
            written = sides[name](repetition)
            speed = written / (seconds() - clock)
            wall = written / (time.perf_counter() - start)
            assert written == args.batch * args.tokens
            print(f"{name} {repetition}: {speed:.1f} tok/s ({wall:.1f} by the wall clock)", file=sys.stderr)
            if repetition and name != "settle":  # the first is to warm up
                speeds[name].append(speed)
                walls[name].append(wall)
    detail = {
        "model": args.model, "dtype": args.dtype, "device": str(model.device), "threads": torch.get_num_threads(),
        "batch": args.batch, "prompt_tokens": sum(map(len, prompts)), "new_tokens": args.tokens,
        **{f"{name}_tokens_per_second": [round(x, 1) for x in values] for name, values in speeds.items()},
        **{f"{name}_tokens_per_wall_second": [round(x, 1) for x in values] for name, values in walls.items()},
    }  # fmt: skip
    for row, other, bar in (
        ("vllm_engine_vs_bare_generate", "bare", BAR),
        ("vllm_engine_vs_bare_generate_without_logprobs", "bare_without_logprobs", None),
        ("vllm_engine_vs_hf_engine", "hf", None),
    ):
        ratio = statistics.median(speeds["vllm"]) / statistics.median(speeds[other])
        result = {"bench": "rollout", "row": row, "value": round(ratio, 3), "unit": "ratio", "bar": bar}
        print(json.dumps({**result, "ok": bar is None or ratio >= bar, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
