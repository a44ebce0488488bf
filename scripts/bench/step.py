"""One optimiser step of ours against one of TRL's GRPOTrainer, on the same token ids.

    python scripts/bench/step.py                # built-in model, fp32, 2 threads: about six minutes on 2 cores
    python scripts/bench/step.py --shapes 96x32 --repetitions 3

Both sides do the same work: forward and backward of `- sum_k A_k sum_t log p(z_kt | x, z_k<t) / (K T)` for K = 8 traces
of one prompt, gradient clipping and AdamW, LoRA on all linear layers, no generation, no gradient checkpointing, same
weights and dtype. TRL's side is a real GRPOTrainer whose `training_step` is given the batch it would have generated
(loss `dr_grpo`, beta 0, on policy, so its ratio is 1 and its gradient the one above, fused head on); ours is what
TraceTrainer runs: `cut_batches` and `backward_batches`. Before anything is timed the two gradients are compared.

A row `PxT` is a prompt of P and traces of T tokens; nothing but the prompt is shared. `time` is TRL's median over ours,
in alternating repetitions of one process. `memory` is our peak over TRL's, each counted above the loaded model
(adapters, optimiser and trainer built, nothing run) over two steps in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from command import bench_parser
from peak_memory import peak_above, peak_in_a_process_of_its_own, report
from torch import Tensor, nn

from vlm_reason.models.adapters import REASONER, AdapterConfig, add_adapters, trainable
from vlm_reason.models.load import load_model
from vlm_reason.traces.recipe import Phase
from vlm_reason.traces.rows import Row
from vlm_reason.traces.step import backward_batches, cut_batches
from vlm_reason.types import Coefficients

K = 8
SHAPES = {"96x32": (96, 32), "48x64": (48, 64)}
TIME_BARS = {"96x32": 1.8, "48x64": 1.3}
MEMORY_BARS = {"96x32": 0.7}
PHASE = Phase("bench", lambda scores, state: (Coefficients(), state), trains=(REASONER,))
Step = Callable[[bool], float]
"""Run forward and backward, then the optimiser if asked; the loss."""


class Ids:
    """The prompt, its K traces and their advantages."""

    def __init__(self, shape: str, vocabulary: int) -> None:
        rng = random.Random(shape)
        self.prompt_length, self.trace_length = SHAPES[shape]
        draw = lambda n: tuple(rng.randrange(100, vocabulary) for _ in range(n))  # noqa: E731
        self.prompt = draw(self.prompt_length)
        self.traces = [draw(self.trace_length) for _ in range(K)]
        self.advantages = [rng.gauss(0, 1) for _ in range(K)]


def ours(args: argparse.Namespace, shape: str) -> tuple[Step, dict[str, nn.Parameter]]:
    base, _ = load_model(args.model, dtype=args.dtype, device="cpu")
    ids = Ids(shape, base.config.vocab_size)
    model = add_adapters(base, AdapterConfig(r=args.rank, alpha=2 * args.rank))
    trainable(model, [REASONER])
    model.train()
    parameters = {k.replace(f".{REASONER}.", "."): p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)
    rows = [
        Row(REASONER, ids.prompt, z, (a,) * len(z)) for z, a in zip(ids.traces, ids.advantages, strict=True)
    ]

    def step(update: bool) -> float:
        batches = cut_batches(model, rows, args.token_budget)
        cost = backward_batches(
            model, batches, PHASE, K * ids.trace_length, lambda part, last: part.backward()
        )
        finish(optimizer, list(parameters.values()), update)
        return float(cost.loss)

    return step, parameters


def trls(args: argparse.Namespace, shape: str) -> tuple[Step, dict[str, nn.Parameter]]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    class Fed(GRPOTrainer):
        """Trains on the batch it is given, instead of generating one."""

        def _prepare_inputs(self, generation_batch):
            return generation_batch

    model, tokenizer = load_model(args.model, dtype=args.dtype, device="cpu")
    ids = Ids(shape, model.config.vocab_size)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=K, num_generations=K, max_completion_length=ids.trace_length,
        loss_type="dr_grpo", beta=0.0, learning_rate=1e-5,
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"
    )
    trainer = Fed(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_dict({"prompt": ["x"] * K}), processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which is not entered here
    wrapped = trainer.model
    parameters = {k.replace(".default.", "."): p for k, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)
    prompt, traces = torch.tensor([ids.prompt] * K), torch.tensor(ids.traces)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt),
        "completion_ids": traces, "completion_mask": torch.ones_like(traces),
        "advantages": torch.tensor(ids.advantages), "num_items_in_batch": torch.tensor(traces.numel()),
    }  # fmt: skip

    def step(update: bool) -> float:
        loss = trainer.training_step(wrapped, inputs, None)
        finish(optimizer, list(parameters.values()), update)
        return float(loss)

    return step, parameters


SIDES = {"ours": ours, "trl": trls}


def finish(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], update: bool) -> None:
    """Clip, update, forget the gradient; without `update` the gradient is left to be read."""
    if update:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def gradient_gap(args: argparse.Namespace, shape: str) -> tuple[dict[str, Step], float]:
    """Both steps from the same adapter weights (not the initial B = 0, where half of the gradient vanishes), and
    |g - g'| / |g'| over all adapter parameters."""
    made = {side: make(args, shape) for side, make in SIDES.items()}
    (_, a), (_, b) = made["ours"], made["trl"]
    if a.keys() != b.keys():
        raise SystemExit(f"the two sides train different parameters: {sorted(a.keys() ^ b.keys())[:4]}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in a:
            value = torch.randn(a[name].shape, generator=generator) * 0.02
            a[name].copy_(value)
            b[name].copy_(value)
    losses = {side: step(False) for side, (step, _) in made.items()}
    gradients: dict[str, Tensor] = {
        side: torch.cat([parameters[k].grad.flatten() for k in a]) for side, (_, parameters) in made.items()
    }
    for _, parameters in made.values():
        for parameter in parameters.values():
            parameter.grad = None
    gap = float((gradients["ours"] - gradients["trl"]).norm() / gradients["trl"].norm())
    print(f"{shape}: losses {losses}, relative gradient difference {gap:.2e}", file=sys.stderr)
    return {side: step for side, (step, _) in made.items()}, gap


def time_steps(steps: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for repetition in range(repetitions + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            step(True)
            if repetition:  # the first warms up
                seconds[side].append(time.perf_counter() - start)
        if repetition:
            print(f"  {', '.join(f'{s} {t[-1]:.2f} s' for s, t in seconds.items())}", file=sys.stderr)
    return seconds


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step, _ = SIDES[args.memory_of](args, args.shapes[0])
        print(peak_above(lambda: (step(True), step(True))))
        return
    for shape in args.shapes:
        steps, gap = gradient_gap(args, shape)
        if args.dtype == "float32" and gap > 1e-3:
            raise SystemExit(
                f"{shape}: the two sides do not have the same gradient (relative difference {gap:.1e})"
            )
        seconds = time_steps(steps, args.repetitions)
        del steps
        gc.collect()
        common = {
            "model": args.model, "dtype": args.dtype, "threads": torch.get_num_threads(), "k": K,
            "prompt_tokens": SHAPES[shape][0], "trace_tokens": SHAPES[shape][1], "lora_rank": args.rank,
        }  # fmt: skip
        median = {side: statistics.median(t) for side, t in seconds.items()}
        report(
            "step", f"time_{shape}", median["trl"] / median["ours"], TIME_BARS[shape],
            {**common, "gradient_gap": gap, "seconds": {s: [round(x, 3) for x in t] for s, t in seconds.items()}},
            at_least=True,
        )  # fmt: skip
        peak = {side: peak_in_a_process_of_its_own(side, "--shapes", shape) for side in SIDES}
        report(
            "step", f"memory_{shape}", peak["ours"] / peak["trl"], MEMORY_BARS.get(shape),
            {**common, "peak_mib": {s: round(b / 2**20, 1) for s, b in peak.items()}},
        )  # fmt: skip


if __name__ == "__main__":
    main()
