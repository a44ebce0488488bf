"""What a Laplace approximation of an adapter costs: memory of the low-rank Kronecker factors, and time.

    python scripts/bench/laplace.py                  # built-in model, rank-8 LoRA on q and v: some minutes on 2 cores

`held`: bytes of the curvature (k = 10 directions of every large side), and of the posterior made of it, over the
adapter's own bytes times its rank. `posterior_peak`: the peak while the posterior and ten draws are made of the
curvature, over the same. `large_side`: the peak while rows of width 8192, as many as a batch of 512 tokens has, go into
one large side, over a dense 8192 x 8192. `fit_*`: seconds of the curvature pass over N examples of 4 classes (3 exact
backward passes) over the seconds of one epoch of MAP training on them: fastest of each, in alternation, in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from command import bench_parser
from peak_memory import peak_above, peak_in_a_process_of_its_own, report
from peft import LoraConfig, PeftModel, get_peft_model

from vlm_reason.models.load import load_model
from vlm_reason.weights import Choice, Example, Job, Training
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.curvature import (
    Accumulator,
    CoreCurvature,
    DiagonalCurvature,
    KroneckerCurvature,
    LowRank,
    collect,
)
from vlm_reason.weights.curvature.shapes import Centre, KroneckerShape
from vlm_reason.weights.posterior import Origin
from vlm_reason.weights.training import train

MEMORY_BAR, DENSE_BAR, TIME_BAR = 2.0, 0.25, 2.5
WIDE, ROWS, KEPT, RANK, LABELS = 8192, 512, 10, 8, (1, 2, 3, 4)

KINDS: dict[str, Callable[[], Accumulator]] = {
    "kronecker": lambda: KroneckerCurvature(KEPT),
    "kronecker_activations": lambda: KroneckerCurvature(KEPT, "activations"),
    "diagonal": DiagonalCurvature,
    "core": CoreCurvature,
}


def job(model_name: str, count: int, length: int) -> Job:
    """Random prompts and labels; B away from 0, as in an adapter that was trained."""
    base, _ = load_model(model_name, dtype="float32", device="cpu")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    torch.manual_seed(0)
    for key, p in adapter_tensors(model).items():
        if "lora_B" in key:
            p.data.normal_(0, 0.02)
    vocabulary = base.config.get_text_config().vocab_size
    rows = torch.randint(10, vocabulary, (count, length))
    examples = [Example(str(n), tuple(row.tolist()), n % len(LABELS)) for n, row in enumerate(rows)]
    return Job(model, examples, Choice(LABELS), Training(epochs=1, batch_size=16))


def posterior_of(job: Job, curvature: KroneckerCurvature, draws: int) -> int:
    """Bytes of its tensors."""
    mean = {k: v.detach() for k, v in adapter_tensors(job.model).items()}
    shape = KroneckerShape(curvature, Centre(peft_config_dict(job.model, "default"), mean), 1.0)
    posterior = shape.posterior(dict.fromkeys(shape.keys, 1.0), Origin())
    for _ in posterior.sample(draws, 0):
        pass
    return sum(t.numel() * t.element_size() for t in posterior.tensors().values())


def wide_rows() -> None:
    side = LowRank(WIDE, KEPT)
    for seed in range(3):
        side.add(torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(seed)))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--memory-of", choices=["large_side", "posterior"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of == "large_side":
        LowRank(32, 4).add(torch.randn(100, 32))  # what a first decomposition loads is no cost of the width
        print(peak_above(wide_rows))
        return
    work = job(args.model, args.examples, args.length)
    if args.memory_of == "posterior":
        curvature = KroneckerCurvature(KEPT)
        collect(work.model, work.train[:4], work.likelihood, curvature)
        posterior_of(work, curvature, 1)  # libraries
        print(peak_above(lambda: posterior_of(work, curvature, 10)))
        return
    adapter = sum(p.numel() * p.element_size() for p in adapter_tensors(work.model).values())
    common = {"adapter_bytes": adapter, "rank": RANK, "kept": KEPT, "threads": torch.get_num_threads()}
    for name in ("kronecker", "kronecker_activations"):
        factors = KINDS[name]()
        assert isinstance(factors, KroneckerCurvature)
        collect(work.model, work.train[:16], work.likelihood, factors)
        sums = sum(v.numel() * v.element_size() for v in factors.small.values())
        sides = sum(4 * side.numel() for side in factors.large.values())
        held = {"curvature": sums + sides, "posterior": posterior_of(work, factors, 1)}
        worst = max(held.values()) / (adapter * RANK)
        report("laplace", f"held_{name}", worst, MEMORY_BAR, {**common, "bytes": held})
    peak = peak_in_a_process_of_its_own("posterior")
    report("laplace", "posterior_peak", peak / (adapter * RANK), MEMORY_BAR, {**common, "bytes": peak})
    peak = peak_in_a_process_of_its_own("large_side")
    report(
        "laplace", "large_side_peak", peak / (4 * WIDE * WIDE), DENSE_BAR,
        {"width": WIDE, "rows": ROWS, "kept": KEPT, "bytes": peak, "rows_bytes": 4 * ROWS * WIDE},
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ("map_epoch", *KINDS)}
    for _ in range(args.repetitions):
        started = time.process_time()
        train(replace(work))
        seconds["map_epoch"].append(time.process_time() - started)
        for name, make in KINDS.items():
            started = time.process_time()
            collect(work.model, work.train, work.likelihood, make())
            seconds[name].append(time.process_time() - started)
    if not args.repetitions:
        return
    rounded = {k: [round(s, 2) for s in v] for k, v in seconds.items()}
    for name in KINDS:
        detail = {
            "examples": args.examples,
            "length": args.length,
            "classes": len(LABELS),
            "seconds": rounded,
        }
        report("laplace", f"fit_{name}", min(seconds[name]) / min(seconds["map_epoch"]), TIME_BAR, detail)


if __name__ == "__main__":
    main()
