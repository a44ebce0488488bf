"""What of the vLLM engine needs no vLLM: configuration, what is sent at a sync, replies, the environment."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from vlm_reason.compat.vllm import Output
from vlm_reason.compat.vllm_lora import MARK
from vlm_reason.engines.launch import server_environment, vllm_environment
from vlm_reason.engines.make import VLLMConfig, check_engine, engine_config, make_engine
from vlm_reason.engines.replies import ReplyCache
from vlm_reason.engines.sync import (
    adapter_weights,
    policy_weights,
    prune,
    write_adapter,
    write_weights,
)
from vlm_reason.engines.vllm import Call
from vlm_reason.engines.vllm_colocate import cache_bytes_on_cpu
from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters, use_adapter
from vlm_reason.traces import TraceConfig, TraceTrainer, build

IDS = torch.tensor([[5, 9, 17, 4, 8, 30, 41]])


@pytest.fixture
def adapted(tiny_llama) -> PeftModel:
    model = add_adapters(tiny_llama, AdapterConfig(r=4, alpha=8))
    generator = torch.Generator().manual_seed(3)
    for name in ("reasoner", "posterior"):
        for parameter in adapter_parameters(model, name).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


# ---- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vlm"}, "engine.kind: 'vlm' is not one of 'hf', 'vllm'; did you mean 'vllm'"),
        ({"kind": "vllm", "mod": "server"}, "unknown config key 'engine.mod'; did you mean 'mode'"),
        (
            {"mode": "server"},
            "engine.mode is a setting of vLLM, and engine.kind is 'hf': set engine.kind=vllm",
        ),
        ({"batch_size": 0}, "engine.batch_size must be >= 1, got 0"),
        ({"kind": "vllm", "max_model_len": 0}, "engine.max_model_len must be >= 1, got 0"),
        ({"kind": "vllm", "retry_seconds": float("nan")}, "engine.retry_seconds must be >= 0, got nan"),
        ({"kind": "vllm", "stall_seconds": 0}, "engine.stall_seconds must be > 0, got 0"),
        *(
            (
                {"kind": "vllm", "mode": "server", "urls": [url]},
                f"engine.urls: '{url}' is not of the form http://",
            )
            for url in ("a:8000", "ftp://a:1", "http://a:x", "http://a:99999", "http://", "nonsense")
        ),
        ({"kind": "vllm", "mode": "server"}, "engine.mode server needs engine.urls"),
        ({"kind": "vllm", "urls": ["http://a:1"]}, "engine.urls are for engine.mode server"),
        ({"kind": "vllm", "tensor_parallel_size": 0}, "engine.tensor_parallel_size must be >= 1, got 0"),
        ({"kind": "vllm", "memory": 1.5}, "engine.memory is a share of the memory"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        engine_config(options)


@pytest.mark.parametrize(
    ("sync", "adapter", "processes", "message"),
    [
        (
            "full",
            AdapterConfig(r=2),
            1,
            "engine.sync full sends the model's own weights, and this one trains adapters",
        ),
        ("merged", AdapterConfig(r=2), 2, "engine.sync merged swaps whole models between requests"),
        ("adapter", None, 1, "engine.sync adapter needs adapters, and the model has none: use full"),
    ],
)
def test_a_sync_that_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, sync: str, adapter: AdapterConfig | None, processes: int, message: str
) -> None:
    monkeypatch.setattr(TraceConfig, "world_size", processes)
    args, engine = TraceConfig(output_dir=str(tmp_path / "run"), use_cpu=True), {"kind": "vllm", "sync": sync}
    with pytest.raises(UserError, match=message):
        TraceTrainer("/no/such/model", args, build("rft"), [], adapter=adapter, engine_options=engine)


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_that_share_an_engine_are_refused_before_the_model_is_loaded(processes: int) -> None:
    """Training does not call the engine equally often in each of them; the others would wait until the time-out."""
    shared = {"kind": "vllm", "tensor_parallel_size": 2}
    with pytest.raises(
        UserError, match=r"engine\.tensor_parallel_size 2 needs engine\.mode server .* in mode colocate"
    ):
        check_engine(shared, adapters=True, processes=processes)
    served = check_engine({**shared, "mode": "server", "urls": ["http://a:1"]}, True, processes)
    assert isinstance(served, VLLMConfig) and served.tensor_parallel_size == 2


def test_switching_the_kind_needs_nothing_else() -> None:
    config = engine_config({"kind": "vllm", "batch_size": 32, "score_tokens": 4096})
    assert isinstance(config, VLLMConfig)
    assert (config.mode, config.sync, config.score, config.batch_size) == ("colocate", "auto", "hf", 32)


def test_vllm_that_is_missing_is_one_clear_line(tiny_llama, tiny_tokenizer, monkeypatch) -> None:
    from vlm_reason.compat import vllm as compat

    monkeypatch.setattr(compat, "installed_version", lambda: None)
    with pytest.raises(UserError, match=r"needs vLLM, which is not installed: bash scripts/setup\.sh vllm"):
        make_engine(tiny_llama, tiny_tokenizer, {"kind": "vllm"})


def test_cache_is_what_all_sequences_need_within_the_memory_there_is(tiny_llama) -> None:
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, width, bytes
    assert cache_bytes_on_cpu(tiny_llama.config, torch.float32, 16, 512, None) == token * 16 * 512
    assert cache_bytes_on_cpu(tiny_llama.config, torch.bfloat16, 16, 512, None) == token * 16 * 512 // 2
    with pytest.raises(UserError, match=r"lower engine\.max_model_len"):
        cache_bytes_on_cpu(tiny_llama.config, torch.float32, 1, 512, 1e-9)


# ---- weights


def test_a_written_adapter_is_peft_s(adapted: PeftModel, tiny_llama, tmp_path: Path) -> None:
    plain = copy.deepcopy(adapted).unload()
    weights = adapter_weights(adapted, "reasoner")
    folder = write_adapter(tmp_path, weights.served_name(12), weights)
    assert folder.name.startswith("reasoner@12-") and [p.name for p in tmp_path.iterdir()] == [folder.name]
    back = PeftModel.from_pretrained(plain, folder)
    with torch.no_grad(), use_adapter(adapted, "reasoner"):
        assert torch.equal(back(IDS).logits, adapted(IDS).logits)


def test_names_say_version_and_content(adapted: PeftModel) -> None:
    before = adapter_weights(adapted, "reasoner")
    assert before.served_name(3) == adapter_weights(adapted, "reasoner").served_name(3)
    assert before.served_name(3) != before.served_name(4)
    with torch.no_grad():
        next(iter(adapter_parameters(adapted, "reasoner").values()))[0, 0] += 1e-6
    after = adapter_weights(adapted, "reasoner")
    assert after.served_name(3) != before.served_name(3)
    assert {k for k, v in before.tensors.items() if not torch.equal(v, after.tensors[k])} == {
        next(iter(before.tensors))
    }


def test_merged_weights_are_a_plain_model_of_the_same_law(adapted: PeftModel, tiny_llama) -> None:
    for name in ("reasoner", "posterior", None):
        plain = type(tiny_llama)(tiny_llama.config).eval()
        weights = None if name is None else adapter_weights(adapted, name)
        plain.load_state_dict(dict(policy_weights(adapted, weights)), strict=True)
        with torch.no_grad(), use_adapter(adapted, name):
            assert torch.allclose(plain(IDS).logits, adapted(IDS).logits, atol=2e-5)


def test_weights_in_files_are_the_weights(adapted: PeftModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vlm_reason.engines.sync.SHARD", 5000)
    folder = write_weights(tmp_path, "base@1", policy_weights(adapted))
    files = sorted(folder.iterdir())
    assert len(files) > 3
    read = {k: v for path in files for k, v in load_file(path).items()}
    expected = dict(policy_weights(adapted))
    assert read.keys() == expected.keys() and all(torch.equal(read[k], expected[k]) for k in read)


def test_old_versions_and_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("reasoner@1-aa", "reasoner@2-bb", ".writing-7-reasoner@3-cc", "base-model"):
        (tmp_path / name).mkdir()
    prune(tmp_path, ["reasoner@2-bb"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base-model", "reasoner@2-bb"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "has use_dora = True, which cannot be served as plain LoRA"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank_pattern"),
        ({"bias": "all"}, "trains biases"),
        ({"target_modules": ["q_proj", "lm_head"]}, "targets lm_head"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tiny_llama, settings: dict, message: str) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    model = get_peft_model(tiny_llama, config, adapter_name="reasoner")
    with pytest.raises(UserError, match=message):
        adapter_weights(model, "reasoner")


# ---- replies


def test_replies_outlive_the_process_and_die_with_their_version(tmp_path: Path) -> None:
    path = tmp_path / "replies-0.jsonl"
    asked = Call((1, 2, 3), 5, seed=9)
    cache = ReplyCache(path)
    cache.put(asked, "reasoner@4-aa", Output((7, 8), (-0.1, -1 / 3), None))
    cache.put(asked, "base", Output((9,), (-0.5,), (None, -1.0, -2.0)))
    with open(path, "a") as stream:
        stream.write('{"key": "torn')

    again = ReplyCache(path)
    again.begin_version(4)  # a run that goes on in the window it was stopped in
    assert again.get(asked, "reasoner@4-aa") == Output((7, 8), (-0.1, -1 / 3), None)
    assert again.get(asked, "base") == Output((9,), (-0.5,), (None, -1.0, -2.0))
    assert again.get(asked, "reasoner@4-bb") is None  # other weights under the same version
    assert again.get(Call((1, 2, 3), 5, seed=10), "reasoner@4-aa") is None
    again.begin_version(5)
    assert len(again) == 0 and len(ReplyCache(path)) == 0


# ---- environment


def test_the_environment_preloads_torch_s_openmp_and_keeps_what_the_user_set() -> None:
    env = vllm_environment({"OMP_WAIT_POLICY": "ACTIVE", "LD_PRELOAD": "/lib/mine.so", "X": "1"})
    assert env["X"] == "1" and env[MARK] == "1"
    if torch.cuda.is_available():
        return
    assert env["OMP_WAIT_POLICY"] == "ACTIVE"
    first, library = env["LD_PRELOAD"].split(":")
    assert first == "/lib/mine.so" and Path(library).is_file() and "libgomp" in library
    assert Path(library).is_relative_to(Path(torch.__file__).parents[1])
    assert vllm_environment({"LD_PRELOAD": "/usr/lib/libiomp5.so"})["LD_PRELOAD"] == "/usr/lib/libiomp5.so"
    assert server_environment({})["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_command_starts_itself_again_once_in_that_environment() -> None:
    program = (
        "import os, sys\n"
        "from vlm_reason.engines.launch import enter_environment\n"
        "assert 'torch' not in sys.modules\n"
        "print('start', sys.argv[1], flush=True)\n"
        "enter_environment({'kind': 'vllm'})\n"
        f"print('ready', os.environ['{MARK}'], 'libgomp' in os.environ.get('LD_PRELOAD', ''), flush=True)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in (MARK, "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", program, "x"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:3] == ["start x", "start x", "ready 1 True"], done.stderr
    hf = program.replace("{'kind': 'vllm'}", "{}").replace(
        f"os.environ['{MARK}']", f"os.environ.get('{MARK}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hf, "x"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["start x", "ready None False"], done.stderr
