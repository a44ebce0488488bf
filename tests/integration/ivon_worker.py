"""What tests/integration/test_ivon_traces.py launches: one run of a recipe with `optim: ivon` a mode of parallelism.

torchrun --nproc_per_node 2 tests/integration/ivon_worker.py CONFIG MODE...      modes: one, ddp, fsdp2
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.integration.sharded_worker import clean_environment
from vlm_reason.cli.optim import optimization_of
from vlm_reason.config import RunConfig, from_dict, load_config
from vlm_reason.traces.run import run_training

if __name__ == "__main__":
    torch.set_num_threads(1)
    for mode in sys.argv[2:]:
        out = Path(sys.argv[1]).parent / mode
        overrides = [f"output_dir={out}", *(["trainer.fsdp2=true"] if mode == "fsdp2" else [])]
        config = from_dict(RunConfig, load_config(sys.argv[1], overrides))
        with clean_environment():
            run_training(config, False, optimization_of(config))
    if dist.is_initialized():
        dist.destroy_process_group()
