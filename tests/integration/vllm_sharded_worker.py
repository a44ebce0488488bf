"""What tests/integration/test_vllm_server.py launches in two processes: sharded training beside a vLLM server.

    torchrun --nproc_per_node 2 tests/integration/vllm_sharded_worker.py FOLDER MODEL URL SERVER_PID

Each run leaves FOLDER/RUN/{final, served.json}: its weights, and log-probabilities of TARGETS as the server has them
after a last sync. The last run loses the server, which is killed behind its second step, and leaves lost.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.integration.sharded_worker import clean_environment, leave_out_compiled_communication, make
from vlm_reason.engines.base import EngineLost, Law, ScoreRequest
from vlm_reason.engines.vllm import VLLMEngine
from vlm_reason.traces import TraceTrainer

TARGETS = [((5, 9, 17, 4), (8, 30, 41, 12, 6)), ((7, 7, 21), (33, 10, 5, 19))]
SIZES = {
    "prompts_per_window": 4,
    "prompts_per_step": 2,
    "traces_per_prompt": 3,
    "max_trace_tokens": 12,
}
RUNS = {  # way of sharding, what is trained, engine
    "zero3-adapters": ("zero3", "vr", {}),
    "fsdp2-adapters": ("fsdp2", "vr", {"score": "vllm"}),
    "fsdp2-full": ("fsdp2", "full", {}),
    "zero3-full": ("zero3", "full", {}),
    "zero3-lost": ("zero3", "full", {}),
}


class KillAfter(TrainerCallback):
    def __init__(self, step: int, pid: int) -> None:
        self.step, self.pid = step, pid

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and dist.get_rank() == 0:
            os.killpg(self.pid, signal.SIGKILL)


def served(trainer: TraceTrainer, laws: list[str | None]) -> dict[str, Any]:
    """Rank 0: the server's log-probabilities of TARGETS under every law, after a sync of the weights as they are."""
    engine = trainer.engine
    assert isinstance(engine, VLLMEngine)
    engine.sync(trainer.model, 1000 + trainer.state.global_step)
    engine.score_here = True
    asked = [(law, ScoreRequest(*pair, Law(law))) for law in laws for pair in TARGETS]
    found: dict[str, Any] = {"copied": trainer._copy is not None}
    if trainer.ranks.main:
        for (law, _), logps in zip(asked, engine.score([r for _, r in asked]), strict=True):
            found.setdefault(law or "base", []).append(logps)
    trainer.ranks.wait()
    return found


def run(name: str, folder: Path, model: Path, url: str, pid: int) -> None:
    mode, trained, options = RUNS[name]
    out = folder / name
    lost = name.endswith("lost")
    engine = {"kind": "vllm", "mode": "server", "urls": [url], "retry_seconds": 1, "batch_size": 8, **options}
    trainer = make(model, out, mode, trained, engine, **SIZES, rounds=1 if trained == "vr" else 2,
                   save_steps=100 if lost else 2)  # fmt: skip
    if lost:
        trainer.add_callback(KillAfter(2, pid))
        said = "nothing"
        try:
            trainer.train()
        except EngineLost as error:
            said = str(error)
        (out / f"lost-{trainer.ranks.rank}.json").write_text(json.dumps(said))
        return
    trainer.train()
    found = served(trainer, [None, "reasoner", "posterior"] if trained == "vr" else ["reasoner"])
    if trainer.ranks.main:
        (out / "served.json").write_text(json.dumps(found))
    trainer.save_model(str(out / "final"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    leave_out_compiled_communication()
    for name in RUNS:
        with clean_environment():
            run(name, Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    dist.destroy_process_group()
