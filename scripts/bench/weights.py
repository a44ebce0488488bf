"""IVON's step against AdamW's on the parameters of a LoRA adapter: time, and memory above parameters and gradients.

    python scripts/bench/weights.py                  # 16.8M parameters, fp32: about half a minute on 2 cores

The parameters are those of rank-16 adapters on the query and value projections of a 7B Llama with 32 layers, twice over
(q, k, v, o: 256 matrices of 16 x 4096 = 16.8M). `time` is the fastest of our steps over the fastest of
`torch.optim.AdamW(foreach=True)`'s, in alternation in one process; fastest, because what another process takes away is
no property of either. `memory` is the peak while an optimiser is made and does two steps, above what the process held
with parameters and gradients in place, in units of P (bytes of the parameters); each in a process of its own.

Where the package ivon-opt can be imported (its licence is the GPL: we neither depend on it nor install it), a third row
is how many times faster our step is than its: block of a draw, and step. `pip install --no-deps --target FOLDER
ivon-opt`, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from command import bench_parser
from peak_memory import peak_above, peak_in_a_process_of_its_own, report
from torch import Tensor

from vlm_reason.weights import IVON

TIME_BAR, MEMORY_BAR, PEER_BAR = 1.3, 5.2, 2.0
PEER = "ivon"  # the module that the package ivon-opt installs
MATRICES, RANK, WIDTH = 256, 16, 4096


def ivon(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return IVON(parameters, lr=0.03, ess=1e7, hess_init=3e-4, weight_decay=1e-6, clip_radius=1e-3)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


class Peer:
    """ivon-opt: the draw is in place inside a block, at whose end it takes the gradients."""

    def __init__(self, parameters: list[Tensor]) -> None:
        import ivon as package

        self.own = package.IVON(
            parameters, lr=0.03, ess=1e7, hess_init=3e-4, weight_decay=1e-6, clip_radius=1e-3
        )

    def step(self) -> None:
        with self.own.sampled_params(train=True):
            pass
        self.own.step()


SIDES: dict[str, Callable[[list[Tensor]], Any]] = {"ivon": ivon, "adamw": adamw}
if importlib.util.find_spec(PEER) is not None:
    SIDES["ivon-opt"] = Peer


def adapter(matrices: int) -> list[Tensor]:
    """A: 16 x 4096 and B: 4096 x 16 in turn, with gradients."""
    torch.manual_seed(0)
    parameters = []
    for n in range(matrices):
        shape = (RANK, WIDTH) if n % 2 == 0 else (WIDTH, RANK)
        p = torch.nn.Parameter(torch.randn(shape) * 0.02)
        p.grad = torch.randn(shape) * 1e-3
        parameters.append(p)
    return parameters


def two_steps(side: str, parameters: list[Tensor]) -> None:
    optimizer = SIDES[side](parameters)
    optimizer.step()
    optimizer.step()


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--matrices", type=int, default=MATRICES)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        two_steps(args.memory_of, adapter(1))  # what a first step imports is no cost of a weight
        parameters = adapter(args.matrices)
        print(peak_above(lambda: two_steps(args.memory_of, parameters)))
        return
    optimizers = {side: make(adapter(args.matrices)) for side, make in SIDES.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.repetitions + 1):
        for side, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[side].append(time.perf_counter() - start)
    seconds = {side: times[1:] for side, times in seconds.items()}  # the first allocates
    elements = args.matrices * RANK * WIDTH
    common = {"parameters": elements, "dtype": "float32", "threads": torch.get_num_threads()}
    report(
        "weights", "ivon_step_time", min(seconds["ivon"]) / min(seconds["adamw"]), TIME_BAR,
        {**common, "seconds": {s: [round(x, 4) for x in t] for s, t in seconds.items()}},
    )  # fmt: skip
    if "ivon-opt" in SIDES:
        report(
            "weights", "ivon_opt_over_ivon_step_time", min(seconds["ivon-opt"]) / min(seconds["ivon"]), PEER_BAR,
            common, at_least=True,
        )  # fmt: skip
    peak = {side: peak_in_a_process_of_its_own(side) / (4 * elements) for side in SIDES}
    report(
        "weights", "ivon_step_memory", peak["ivon"], MEMORY_BAR,
        {**common, "unit": "P, bytes of the parameters", "peak": {s: round(x, 2) for s, x in peak.items()}},
    )  # fmt: skip


if __name__ == "__main__":
    main()
