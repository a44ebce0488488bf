"""Memory and time of the fused LM head against full logits: log-probabilities of 2k tokens and their gradient.

    python scripts/bench/head.py                # built-in model, fp32, 2 threads: about a minute on 2 cores

Both sides take the same hidden states [N, H], give log p(target) [N], and go back to the hidden states (the head is
frozen, as with adapters; `--train-head` gives it a gradient too). Full logits are what a model's own forward and
`log_softmax` in fp32 make. `memory` is our peak over theirs, each above what the process held with model and inputs in
place, in a process of its own; `time` is their median over ours, in alternating repetitions of one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from command import bench_parser
from peak_memory import peak_above, peak_in_a_process_of_its_own, report
from torch import Tensor
from transformers import PreTrainedModel

from vlm_reason.models.load import load_model
from vlm_reason.scoring.head import head_logits, head_logprobs

MEMORY_BAR = 0.25


def fused(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    return head_logprobs(model, hidden, targets)


def full(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    logps = torch.log_softmax(head_logits(model, hidden).float(), dim=-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1)


SIDES: dict[str, Callable[[PreTrainedModel, Tensor, Tensor], Tensor]] = {"fused": fused, "full": full}


def prepared(args: argparse.Namespace) -> Callable[[str], Tensor]:
    """`run(side)`: forward and backward; the gradient of the hidden states."""
    model, _ = load_model(args.model, dtype=args.dtype, device="cpu")
    model.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(args.train_head)
    torch.manual_seed(0)
    config = model.config.get_text_config()
    hidden = torch.randn(args.tokens, config.hidden_size, dtype=model.dtype)
    targets = torch.randint(config.vocab_size, (args.tokens,))
    weights = torch.randn(args.tokens)

    def run(side: str) -> Tensor:
        h = hidden.clone().requires_grad_()
        (SIDES[side](model, h, targets) * weights).sum().backward()
        model.get_output_embeddings().weight.grad = None
        assert h.grad is not None
        return h.grad

    return run


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--train-head", action="store_true")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    run = prepared(args)
    if args.memory_of:
        print(peak_above(lambda: run(args.memory_of)))
        return
    ours, theirs = run("fused").float(), run("full").float()
    common = {
        "model": args.model, "dtype": args.dtype, "threads": torch.get_num_threads(), "tokens": args.tokens,
        "train_head": args.train_head, "gradient_difference": float((ours - theirs).norm() / theirs.norm()),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.repetitions):
        for side, times in seconds.items():
            start = time.perf_counter()
            run(side)
            times.append(time.perf_counter() - start)
    peak = {side: peak_in_a_process_of_its_own(side) for side in SIDES}
    report(
        "head", "memory", peak["fused"] / peak["full"], MEMORY_BAR,
        {**common, "peak_mib": {s: round(b / 2**20, 1) for s, b in peak.items()}},
    )  # fmt: skip
    median = {side: statistics.median(t) for side, t in seconds.items()}
    report(
        "head", "time", median["full"] / median["fused"], None,
        {**common, "seconds": {s: [round(x, 3) for x in t] for s, t in seconds.items()}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
