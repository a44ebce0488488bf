"""vLLM in a process of its own kind: what tests/integration/test_vllm_colocate.py measures. Prints one JSON object.

python vllm_worker.py adapter|merged|full FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vlm_reason.engines.base import Law, SampleRequest, ScoreRequest, StopRule
from vlm_reason.engines.hf import HFEngine
from vlm_reason.engines.make import make_engine
from vlm_reason.engines.sync import adapter_weights, policy_weights
from vlm_reason.engines.vllm import VLLMEngine
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters, use_adapter
from vlm_reason.models.load import load_model

TEXTS = (
    "Question: 12 + 7 - 5\nReasoning:",
    "The capital of France is",
    "Question: 40 - 13\nReasoning: 40 - 13 = 27.\nAnswer:",
)
LAWS = (
    Law(None),
    Law("reasoner"),
    Law("posterior"),
    Law("reasoner", 0.7),
    Law("posterior", 0.7, 0.9),
    Law("reasoner", 0.0),
)


def set_adapters(model: nn.Module, seed: int, names: tuple[str, ...] = ("reasoner", "posterior")) -> None:
    """Adapters far enough from zero to matter: B drawn wide."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        for key, parameter in adapter_parameters(model, name).items():
            if ".lora_B." in key:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def requests(tokenizer, laws) -> list[SampleRequest]:
    """18 requests: every prompt under every law, some that stop at a line break or at the end of text."""
    prompts = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    rules = (StopRule(("\n",), (tokenizer.eos_token_id,)), StopRule((), (tokenizer.eos_token_id,), True))
    return [
        SampleRequest(prompts[i % 3], 1000 + i, 8, laws[(i // 3) % len(laws)], rules[(i // 2) % 2])
        for i in range(18)
    ]


def largest(a, b) -> float:
    return max(abs(x - y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))


def as_json(completions) -> list:
    return [[list(c.ids), list(c.logps), c.text, c.finish, c.seed] for c in completions]


def colocated(kind: str, folder: Path) -> dict:
    base, tokenizer = load_model("smollm2-135m", dtype="float32")
    model: nn.Module = add_adapters(base, AdapterConfig(r=4, alpha=8))
    set_adapters(model, 1)
    if kind == "full":  # the reasoner's merged weights as a model of their own, trained without adapters
        plain, _ = load_model("smollm2-135m", dtype="float32")
        plain.load_state_dict(dict(policy_weights(model, adapter_weights(model, "reasoner"))), strict=False)
        model = plain
    options = {"kind": "vllm", "batch_size": 16, "max_model_len": 256, "score": "vllm", "sync": kind}
    engine = make_engine(model, tokenizer, options, folder)
    assert isinstance(engine, VLLMEngine)
    hf = HFEngine(model, tokenizer)
    state = random.getstate(), torch.get_rng_state()
    engine.sync(model, 1)
    asked = [r for r in requests(tokenizer, LAWS) if kind != "full" or r.law.adapter == "reasoner"]
    drawn = engine.sample(asked)
    untouched = state[0] == random.getstate() and bool(torch.equal(state[1], torch.get_rng_state()))

    out: dict = {
        "asked": len(asked),
        "drawn": as_json(drawn),
        "version": engine.version,
        "randomness_untouched": untouched,
    }
    back = [ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(asked, drawn, strict=True)]
    scored = hf.score(back)
    out["sampled_and_scored"] = largest([c.logps for c in drawn], scored)

    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    shuffled = engine.sample([asked[i] for i in order])
    out["shuffled_alike"] = sum(shuffled[j].ids == drawn[i].ids for j, i in enumerate(order))
    cut = [c for i in range(0, len(asked), 5) for c in engine.sample(asked[i : i + 5])]
    out["cut_alike"] = sum(a.ids == b.ids for a, b in zip(cut, drawn, strict=True))

    greedy = [
        replace(r, law=Law("reasoner", 0.0), max_tokens=12) for r in asked[:8]
    ]  # every prompt, every rule
    out["greedy"] = [as_json(engine.sample(greedy)), as_json(hf.sample(greedy))]

    if (
        kind == "adapter"
    ):  # more prompt tokens than one step of vLLM takes: some prompts wait, none is cut in two
        words = tokenizer("one two three four five six seven eight nine ten").input_ids
        crowd = [SampleRequest((100 + i, *words * 10), i, 2, Law()) for i in range(21)]
        texts = engine.sample(crowd)
        crowded = [ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(crowd, texts, strict=True)]
        out["crowd"] = [
            sum(len(r.prompt_ids) for r in crowd),
            largest([c.logps for c in texts], hf.score(crowded)),
        ]

    first, again = (
        engine.score(back),
        engine.score(back),
    )  # the second time every prompt is in the prefix cache
    out["scored_by_both"] = [largest(first, scored), largest(again, scored)]

    if kind == "full":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    else:
        set_adapters(model, 2, ("reasoner",))
    few, before = asked[3:9], drawn[3:9]  # both adapters
    out["few"] = len(few)
    out["before_sync_alike"] = sum(a.ids == b.ids for a, b in zip(engine.sample(few), before, strict=True))
    engine.sync(model, 1)  # the version is served already
    out["same_version_alike"] = sum(a.ids == b.ids for a, b in zip(engine.sample(few), before, strict=True))
    engine.sync(model, 2)
    mine = [r for r in back if r.law == Law("reasoner")]
    with use_adapter(model, "reasoner"):
        new = hf.score(mine)
    out["moved"] = largest(first[: len(back)], engine.score(back))
    out["synced"] = largest(engine.score(mine), new)
    later = engine.sample(few)
    out["later_and_scored"] = largest(
        [c.logps for c in later],
        hf.score([ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(few, later, strict=True)]),
    )
    out["folders"] = sorted(p.name.split("-")[0] for p in folder.iterdir()) if folder.is_dir() else []
    return out


if __name__ == "__main__":
    print(json.dumps(colocated(sys.argv[1], Path(sys.argv[2]))))
