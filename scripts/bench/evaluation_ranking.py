"""Scoring 8 rationales x 8 answers a problem in one prefix tree, against scoring every pair on its own.

    OMP_NUM_THREADS=2 python scripts/bench/evaluation_ranking.py     # built-in model, fp32: two minutes on 2 free cores

Ours is what `vlm-reason rank` runs: `score_candidates` on stored samples with the `hf` engine. Pair by pair is
transformers' own forward of x + z_n + y_a, logits of the answer only, one pair at a time or the 64 pairs as one padded
batch. All give log p(y_a | x, z_n), and the largest difference is a row of its own. Ids are random, so nothing but x
and z_n is shared: the least that a tree can save at these lengths.

A row `PxTxA` is a prompt of P, rationales of T and answers of up to A tokens. `tokens`: tokens through the decoder,
counted there. `time`: medians over alternating repetitions of one process.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from command import bench_parser
from transformers import PreTrainedModel

from vlm_reason.engines.base import Law
from vlm_reason.engines.hf import HFEngine
from vlm_reason.models.load import load_model
from vlm_reason.ranking import score_candidates
from vlm_reason.store import SampleRecord

N = 8
SHAPES = {"96x64x6": (96, 64, 6), "32x32x6": (32, 32, 6)}
TOKENS_BAR, TIME_BAR, SAME = 5.0, 3.0, 1e-4


def problem(shape: str, vocabulary: int) -> list[SampleRecord]:
    """Eight stored samples of one problem, each with an answer of its own."""
    rng = random.Random(shape)
    prompt_length, trace_length, longest = SHAPES[shape]
    draw = lambda n: tuple(rng.randrange(100, vocabulary) for _ in range(n))  # noqa: E731
    prompt = draw(prompt_length)
    records = []
    for k in range(N):
        trace, answer = draw(trace_length), draw(rng.randint(longest - 2, longest))
        records.append(
            SampleRecord(
                key=f"{k:032x}", problem_id="p", question="", reference="", prompt_ids=prompt, trace_ids=trace,
                trace_text="", trace_logps=(0.0,) * len(trace), finish="stop", seed=k, temperature=1.0, top_p=1.0,
                proposal="base/prior", saw_answer=False, weights="w", engine="e", k=k, m=1, answer_ids=answer,
                answer_text=str(answer), answer_logps=(0.0,) * len(answer), answer_finish="stop", canonical=str(k),
            )
        )  # fmt: skip
    return records


def pairs(records: list[SampleRecord]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((*r.prompt_ids, *r.trace_ids), s.answer_ids) for r in records for s in records]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, records: list[SampleRecord]) -> np.ndarray:
    found = []
    for context, answer in pairs(records):
        ids = torch.tensor([[*context, *answer[:-1]]])
        logits = model(ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found).view(N, N).numpy()


@torch.no_grad()
def padded(model: PreTrainedModel, records: list[SampleRecord]) -> np.ndarray:
    """All pairs in one batch, padded on the right, where causal attention does not see it."""
    rows = [(*context, *answer[:-1]) for context, answer in pairs(records)]
    width, keep = max(map(len, rows)), max(len(answer) for _, answer in pairs(records))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    logps = model(ids, use_cache=False, logits_to_keep=keep).logits.float().log_softmax(-1)
    found = []
    for logp, (context, answer) in zip(logps, pairs(records), strict=True):
        first = len(context) - 1 - (width - keep)
        found.append(logp[first : first + len(answer)].gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found).view(N, N).numpy()


def counted(model: PreTrainedModel, run: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
    """What `run` returns, and how many tokens went through the decoder."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    try:
        return run(), sum(seen)
    finally:
        hook.remove()


def report(row: str, value: float, unit: str, bar: float, ok: bool, detail: dict) -> None:
    digits = 2 if unit == "ratio" else 8
    result = {
        "bench": "evaluation_ranking",
        "row": row,
        "value": round(value, digits),
        "unit": unit,
        "bar": bar,
    }
    print(json.dumps({**result, "ok": ok, "detail": detail}), flush=True)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype, device="cpu")
    engine = HFEngine(model, tokenizer)
    for shape in args.shapes:
        records = problem(shape, model.config.vocab_size)

        def tree(records: list[SampleRecord] = records) -> np.ndarray:
            return score_candidates(engine, (), {"p": records}, Law())["p"].need("logp_answer", "bench")

        sides: dict[str, Callable[[], np.ndarray]] = {
            "tree": tree,
            "one_by_one": lambda records=records: one_by_one(model, records),
            "padded": lambda records=records: padded(model, records),
        }
        found = {side: counted(model, run) for side, run in sides.items()}  # warms up too
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.repetitions):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
            print(f"{shape}: {', '.join(f'{s} {t[-1]:.2f} s' for s, t in seconds.items())}", file=sys.stderr)
        gap = max(float(np.abs(found["tree"][0] - found[s][0]).max()) for s in ("one_by_one", "padded"))
        detail = {
            "model": args.model, "dtype": args.dtype, "threads": torch.get_num_threads(), "rationales": N,
            "answers": N, "tokens": {side: tokens for side, (_, tokens) in found.items()},
            "seconds": {s: [round(x, 3) for x in t] for s, t in seconds.items()},
        }  # fmt: skip
        tokens = found["one_by_one"][1] / found["tree"][1]
        report(f"tokens_{shape}", tokens, "ratio", TOKENS_BAR, tokens >= TOKENS_BAR, detail)
        for side in ("one_by_one", "padded"):
            ratio = statistics.median(seconds[side]) / statistics.median(seconds["tree"])
            report(f"time_{side}_{shape}", ratio, "ratio", TIME_BAR, ratio >= TIME_BAR, detail)
        report(f"difference_{shape}", gap, "nat", SAME, gap <= SAME or args.dtype != "float32", detail)


if __name__ == "__main__":
    main()
