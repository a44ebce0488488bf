"""TFB's search for the largest noise, against the 5-step bisection of the paper's code: forwards for the same sigma.

    python scripts/bench/tfb.py             # 3 adapters, 500 anchors, S = 10: about two minutes on 1 core

A forward is one example through one adapter. Of ours everything is counted, also the outputs without noise; of the
bisection the draws alone. Both see the same draws. The bisection keeps the feasible end of [.001, .015], the bracket of
the paper's code, so its sigma lies less than .00044 below what 500 anchors bear. The adapters are of rank 8 on small
random Llamas, trained on labels of which a tenth are noise; a row takes the given labels, or the adapter's own. `value`
is the largest ratio. A search is as cheap as its criterion is smooth: where the labels leave hardly any excess to
balance, it takes one or two more evaluations of all anchors, at .2 each.
"""

from __future__ import annotations

from typing import Any

import torch
from command import bench_parser
from peak_memory import report
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_reason.weights import Choice, Example, Job, Training
from vlm_reason.weights.methods.map import MAP
from vlm_reason.weights.methods.tfb import TFB, chosen, labelled, nll_excess
from vlm_reason.weights.noisy_adapter import NoisyAdapter

BAR = 0.5
LOW, HIGH, STEPS = 0.001, 0.015, 5
ANCHORS, DRAWS, BOUND = 500, 10, 0.003


def trained(seed: int) -> Job:
    """A job whose model holds an adapter trained on 800 sequences with 4 labels."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.05, max_position_embeddings=64,
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]
    )
    model = get_peft_model(LlamaForCausalLM(config).eval(), lora)
    training = Training(epochs=4, batch_size=16, learning_rate=3e-3)
    job = Job(model, [sequence(n) for n in range(800)], Choice((3, 5, 7, 9)), training, seed=seed)
    MAP().fit(job)
    return job


def sequence(n: int) -> Example:
    ids = torch.randint(10, 64, (6 + n % 4,)).tolist()
    label = (ids[0] // 14 + (ids[-1] > 40)) % 4
    return Example(str(n), tuple(ids), label if torch.rand(()) > 0.1 else int(torch.randint(4, ())))


def bisection(job: Job, anchors: list[Example], labels: Any) -> tuple[float, int]:
    """(sigma, forwards with noise): STEPS halvings of [LOW, HIGH], the end that kept to the bound; 0 if none did."""
    noisy = NoisyAdapter(job, anchors, DRAWS)
    zero = noisy.at_mean()
    excess = nll_excess(zero, labelled(noisy.examples, zero, labels), job.likelihood)
    low, high, feasible, before = LOW, HIGH, 0.0, noisy.forwards
    for _ in range(STEPS):
        middle = (low + high) / 2
        if excess(noisy.outputs(middle, 0, len(anchors))) <= BOUND:
            low = feasible = middle
        else:
            high = middle
    forwards = noisy.forwards - before
    noisy.restore()
    return feasible, forwards


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--adapters", type=int, default=3)
    args = parser.parse_args()
    for labels in ("given", "predicted"):
        ours, theirs, trail = [], [], []
        for seed in range(args.adapters):
            job = trained(seed)
            method = TFB(bound=BOUND, anchors=ANCHORS, draws=DRAWS, labels=labels)  # type: ignore[arg-type]
            theirs.append(bisection(job, chosen(method, job), labels))
            details = method.fit(job)[1].details
            ours.append((details["sigma"], details["example_forwards"]))
            trail.append([(round(s, 5), rows, round(x, 5)) for s, rows, x in details["trail"]])
        ratios = [a / b for (_, a), (_, b) in zip(ours, theirs, strict=True)]
        detail = {
            "adapters": args.adapters, "anchors": ANCHORS, "draws": DRAWS, "ratios": [round(r, 3) for r in ratios],
            "forwards": {"search": [n for _, n in ours], "bisection": [n for _, n in theirs]},
            "sigma": {"search": [round(s, 5) for s, _ in ours], "bisection": [round(s, 5) for s, _ in theirs]},
            "resolution_of_bisection": (HIGH - LOW) / 2**STEPS, "trail": trail,
        }  # fmt: skip
        report("tfb", f"forwards_labels_{labels}", max(ratios), BAR, detail)


if __name__ == "__main__":
    main()
