"""One of several training processes with vLLM between them. Prints one JSON object.

RANK=0 WORLD_SIZE=2 ... python vllm_parallel_worker.py MODEL_FOLDER TENSOR_PARALLEL_SIZE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from vlm_reason.engines.base import Law, SampleRequest, ScoreRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.engines.make import make_engine
from vlm_reason.engines.vllm import VLLMEngine
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters
from vlm_reason.models.load import load_model


def main(source: str, parallel: int, folder: Path) -> dict:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        torch.distributed.init_process_group("gloo")
    base, tokenizer = load_model(source, dtype="float32")
    model = add_adapters(base, AdapterConfig(r=4, alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name in ("reasoner", "posterior"):
        for parameter in adapter_parameters(model, name).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    options = {"kind": "vllm", "batch_size": 8, "max_model_len": 128, "tensor_parallel_size": parallel}
    engine = make_engine(model, tokenizer, options, folder)
    assert isinstance(engine, VLLMEngine)
    engine.sync(model, 3)
    laws = (Law(None), Law("reasoner"), Law("posterior"))
    everyone = [SampleRequest((5 + i % 4, 9, 17, 30), 70 + i, 10, laws[i % 3]) for i in range(13)]
    mine = everyone[rank::world]  # seven requests and six
    drawn = engine.sample(mine)
    scored = HFEngine(model, tokenizer).score(
        [ScoreRequest(r.prompt_ids, c.ids, r.law) for r, c in zip(mine, drawn, strict=True)]
    )
    difference = max(
        abs(a - b) for c, s in zip(drawn, scored, strict=True) for a, b in zip(c.logps, s, strict=True)
    )
    return {"drawn": [[c.seed, list(c.ids)] for c in drawn], "difference": difference}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))), flush=True)
    os._exit(0)  # the process groups that vLLM made are left to the system
