"""S draws of an adapter in one forward against S passes one after another, on the built-in model.

    python scripts/bench/predictive.py                  # 135M parameters, fp32, S = 10: some minutes on 2 cores

Eight multiple-choice questions of 30 to 50 tokens; a diagonal Gaussian over rank-8 adapters on the query and value
projections. Both sides are whole calls of `Posterior.predictive`, drawing the weights included, in alternation; each
row is the ratio of their fastest times.

    one_question    one question a call, all 30 layers uncertain: what reading the weights once is worth
    eight           eight questions a call, all 30 layers uncertain: no layer runs less often, so next to nothing
    top_7           eight questions a call, the top 7 of 30 layers uncertain; the arithmetic's limit is 3.2
    generation      texts of 16 tokens, greedy, behind one question: draws side by side, or one after another
    same_numbers    largest difference of a probability between the two sides, in units of 1e-5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from command import bench_parser
from peak_memory import report
from peft import LoraConfig, PeftModel, get_peft_model

from vlm_reason.models.load import load_model
from vlm_reason.weights import Choice, DiagonalGaussian, Example, Origin
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.predictive import generate

SHORT_BAR, TOP_BAR = 1.3, 2.5
QUESTIONS = (
    (
        "Which gas do plants take in from the air to make food?",
        ("oxygen", "carbon dioxide", "nitrogen", "helium"),
    ),
    (
        "A magnet will most likely attract which object?",
        ("a wooden spoon", "an iron nail", "a glass jar", "a coin"),
    ),
    (
        "What happens to water when it is cooled below 0 degrees?",
        ("it boils", "it melts", "it freezes", "it burns"),
    ),
    (
        "Which organ pumps blood through the human body?",
        ("the liver", "the lungs", "the heart", "the kidney"),
    ),
    ("The Earth takes one year to travel around which body?", ("the Moon", "the Sun", "Mars", "Jupiter")),
    (
        "Which tool would best measure the mass of a small rock?",
        ("a balance", "a ruler", "a clock", "a thermometer"),
    ),
    ("An animal that eats only plants is called a", ("carnivore", "herbivore", "predator", "decomposer")),
    ("Which of these is a renewable source of energy?", ("coal", "natural gas", "wind", "oil")),
)


@dataclass(frozen=True)
class Setting:
    model: PeftModel
    posterior: DiagonalGaussian
    examples: list[Example]
    likelihood: Choice


def setting(layers: Sequence[int] | None) -> Setting:
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
        layers_to_transform=None if layers is None else list(layers),
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    mean = {k: torch.randn(v.shape, generator=generator) * 0.02 for k, v in adapter_tensors(model).items()}
    sigma = {k: torch.full_like(v, 0.02) for k, v in mean.items()}
    posterior = DiagonalGaussian(peft_config_dict(model, "default"), mean, sigma, Origin())
    examples = []
    for number, (question, choices) in enumerate(QUESTIONS):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True))
        ids = tokenizer(f"Question: {question}\n{options}\nAnswer:").input_ids
        examples.append(Example(f"q{number}", tuple(ids)))
    labels = tuple(tokenizer(f" {letter}").input_ids[0] for letter in "ABCD")
    return Setting(model, posterior, examples, Choice(labels))


def seconds(sides: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Of every repetition, in alternation; the one before them is not counted."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for repetition in range(repetitions + 1):
        for side, work in sides.items():
            start = time.perf_counter()
            work()
            if repetition:
                found[side].append(time.perf_counter() - start)
    return found


def compare(
    row: str, bar: float | None, detail: dict, sides: dict[str, Callable[[], object]], repetitions: int
) -> None:
    times = seconds(sides, repetitions)
    ratio = min(times["sequential"]) / min(times["batched"])
    rounded = {side: [round(x, 3) for x in own] for side, own in times.items()}
    report("predictive", row, ratio, bar, {**detail, "seconds": rounded}, at_least=True)


def predictions(s: Setting, examples: Sequence[Example], draws: int) -> dict[str, Callable[[], object]]:
    return {
        mode: partial(s.posterior.predictive, s.model, examples, s.likelihood, draws, mode)
        for mode in ("sequential", "batched")
    }


def difference(s: Setting, draws: int) -> float:
    one, other = (
        s.posterior.predictive(s.model, s.examples, s.likelihood, draws, mode, keep_logits=True)
        for mode in ("sequential", "batched")
    )
    assert one.logits is not None and other.logits is not None
    return float((one.logits.softmax(-1) - other.logits.softmax(-1)).abs().max())


def main() -> None:
    parser: argparse.ArgumentParser = bench_parser(__doc__)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    whole, top = setting(None), setting(range(23, 30))
    lengths = [len(e.ids) for e in whole.examples]
    common = {
        "model": "smollm2-135m", "dtype": "float32", "draws": args.draws, "threads": torch.get_num_threads(),
    }  # fmt: skip
    middle = sorted(whole.examples, key=lambda e: len(e.ids))[len(lengths) // 2]
    detail = {**common, "uncertain_layers": 30, "tokens": len(middle.ids)}
    compare("one_question", SHORT_BAR, detail, predictions(whole, [middle], args.draws), args.repetitions)
    detail = {**common, "uncertain_layers": 30, "tokens": sum(lengths)}
    compare("eight", None, detail, predictions(whole, whole.examples, args.draws), args.repetitions)
    detail = {**common, "uncertain_layers": 7, "tokens": sum(lengths), "limit": 3.2}
    compare("top_7", TOP_BAR, detail, predictions(top, top.examples, args.draws), args.repetitions)
    detail = {**common, "uncertain_layers": 30, "tokens": 16}
    texts: dict[str, Callable[[], object]] = {
        side: partial(generate, whole.posterior, whole.model, [middle.ids], args.draws, 16, rows=rows)
        for side, rows in (("sequential", 1), ("batched", args.draws))
    }
    compare("generation", None, detail, texts, args.repetitions)
    apart = max(difference(whole, args.draws), difference(top, args.draws))
    report("predictive", "same_numbers", apart / 1e-5, 1.0, {**common, "largest_difference": apart})


if __name__ == "__main__":
    main()
