"""Seconds of a weight sync to vLLM, adapter-only against merged, and what each costs in sampling afterwards.

    python scripts/bench/sync.py                # built-in model, bf16, rank 16: about four minutes on 2 cores

Adapter-only writes two PEFT folders and loads them as LoRA ids; merged computes W + s B A of one adapter and reloads
the whole model. The first is the faster sync, and sampling under it is slower, since every linear layer has its update
to compute for every token: which of the two wins depends on the tokens sampled between two syncs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from command import bench_parser

from vlm_reason.engines.launch import enter_environment


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Seconds of each sync up to the first request being possible, and tokens a second of the samples behind it."""
    import torch
    from sampling import problems

    from vlm_reason.engines.base import Law, SampleRequest
    from vlm_reason.engines.make import make_engine
    from vlm_reason.engines.vllm import VLLMEngine
    from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters
    from vlm_reason.models.load import load_model

    base, tokenizer = load_model(args.model, dtype=args.dtype)
    model = add_adapters(base, AdapterConfig(r=args.rank))
    options = {"kind": "vllm", "batch_size": args.batch, "max_model_len": 1024, "sync": kind}
    engine = make_engine(model, tokenizer, options, Path(tempfile.mkdtemp()))
    assert isinstance(engine, VLLMEngine)
    prompts = [tuple(ids) for ids in tokenizer(problems(args.batch, seed=0)).input_ids]
    seconds, speeds = [], []
    for version in range(args.repetitions + 1):
        with torch.no_grad():
            for parameter in adapter_parameters(model, "reasoner").values():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        start = time.perf_counter()
        engine.sync(model, version)
        if kind == "merged":  # merged weights are loaded when they are first asked for
            engine._load_merged("reasoner")
        synced = time.perf_counter()
        requests = [
            SampleRequest(p, 1000 * version + i, args.tokens, Law("reasoner")) for i, p in enumerate(prompts)
        ]
        written = sum(len(c.ids) for c in engine.sample(requests))
        done = time.perf_counter()
        print(
            f"{kind} {version}: sync {synced - start:.3f} s, {written / (done - synced):.1f} tok/s",
            file=sys.stderr,
        )
        if version:  # the first is to warm up
            seconds.append(synced - start)
            speeds.append(written / (done - synced))
    return {
        "seconds": seconds,
        "speeds": speeds,
        "threads": torch.get_num_threads(),
        "device": str(base.device),
    }


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--only", choices=("adapter", "merged"), help="measure one side and print it (used by itself)"
    )
    args = parser.parse_args()
    if args.only:
        enter_environment({"kind": "vllm"})
        print(json.dumps(measure(args.only, args)))
        return
    sides = {}
    for kind in ("adapter", "merged"):  # a process each: one engine holds the machine's memory
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sides[kind] = json.loads(done.stdout.splitlines()[-1])
    detail = {
        "model": args.model, "dtype": args.dtype, "rank": args.rank, "batch": args.batch, "new_tokens": args.tokens,
        "threads": sides["adapter"]["threads"], "device": sides["adapter"]["device"],
        **{f"{kind}_sync_seconds": [round(x, 3) for x in side["seconds"]] for kind, side in sides.items()},
        **{f"{kind}_tokens_per_second": [round(x, 1) for x in side["speeds"]] for kind, side in sides.items()},
    }  # fmt: skip
    for row, key in (
        ("merged_sync_seconds_vs_adapter", "seconds"),
        ("adapter_tokens_per_second_vs_merged", "speeds"),
    ):
        medians = {kind: statistics.median(side[key]) for kind, side in sides.items()}
        over, under = ("merged", "adapter") if key == "seconds" else ("adapter", "merged")
        result = {
            "bench": "sync",
            "row": row,
            "value": round(medians[over] / medians[under], 3),
            "unit": "ratio",
        }
        print(json.dumps({**result, "bar": None, "ok": True, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
