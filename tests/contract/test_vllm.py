"""What compat/vllm.py relies on in vLLM and does not find in its documentation. No engine is started."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect

import pytest
import torch

from vlm_reason.compat.vllm import (
    LEAST_TEMPERATURE,
    LORA_RANKS,
    SERVER_MODULE,
    TESTED,
    check_version,
    installed_version,
    lora_rank,
)
from vlm_reason.compat.vllm_lora import REPLACED
from vlm_reason.engines.vllm import Call
from vlm_reason.errors import UserError

pytest.importorskip("vllm")


def test_the_version_is_the_one_this_was_written_against() -> None:
    found = installed_version()
    assert found is not None
    check_version(found, "vLLM here")
    with pytest.raises(
        UserError, match=rf"vLLM there is version 0\.31\.1, and this package works with {TESTED}\.x"
    ):
        check_version("0.31.1", "vLLM there")


def test_sampling_params_take_our_keywords_and_mean_what_we_mean() -> None:
    from vllm import SamplingParams

    call = Call((1, 2), 7, temperature=0.5, top_p=0.9, seed=2**62 + 5, stop=("x",), stop_ids=(3,))
    params = SamplingParams(**call.parameters(), flat_logprobs=True)
    assert (params.seed, params.max_tokens, params.stop, params.stop_token_ids) == (2**62 + 5, 7, ["x"], [3])
    assert params.ignore_eos and params.include_stop_str_in_output and params.n == 1
    assert params.skip_reading_prefix_cache is False
    greedy = SamplingParams(**dataclasses.replace(call, temperature=0.0).parameters())
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)  # the greedy law has no nucleus


def test_prompt_logprobs_are_never_read_from_the_prefix_cache() -> None:
    from vllm import SamplingParams

    params = SamplingParams(**Call((1, 2), 1, temperature=0.0, prompt_logps=True).parameters())
    assert params.prompt_logprobs == 0 and params.skip_reading_prefix_cache is True


def test_small_temperatures_are_raised() -> None:
    from vllm import SamplingParams

    assert SamplingParams(temperature=LEAST_TEMPERATURE / 2).temperature == LEAST_TEMPERATURE
    assert SamplingParams(temperature=LEAST_TEMPERATURE).temperature == LEAST_TEMPERATURE


def test_ranks_of_lora() -> None:
    import typing

    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == LORA_RANKS
    assert [lora_rank(r) for r in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(UserError, match="at most 512, got 513"):
        lora_rank(513)


def test_weights_are_reloaded_from_an_iterator_or_a_folder() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    names = inspect.signature(GPUModelRunner.reload_weights).parameters
    assert {"weights_iterator", "weights_path"} <= set(names)
    assert "model_runner.reload_weights" in inspect.getsource(Worker.reload_weights)


def test_adapters_are_added_and_removed_by_number() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    request = LoRARequest("reasoner@1-00", 3, "/nowhere")
    assert (request.name, request.adapter_id, request.path) == ("reasoner@1-00", 3, "/nowhere")
    assert {"add_lora", "remove_lora"} <= set(dir(LLMEngine))


def test_flat_logprobs_hold_the_own_token_first() -> None:
    from vllm.logprobs import FlatLogprobs

    names = {f.name for f in dataclasses.fields(FlatLogprobs)}
    assert {"start_indices", "end_indices", "token_ids", "logprobs"} <= names


def test_the_server_module_and_the_paths_we_call() -> None:
    assert importlib.util.find_spec(SERVER_MODULE) is not None
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    fields = set(CompletionRequest.model_fields)
    assert {"return_token_ids", "logprob_token_ids", *Call((1,), 1).parameters()} <= fields
    paths = {
        "vllm.entrypoints.serve.lora.api_router": ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        "vllm.entrypoints.serve.dev.rpc.api_router": ("/collective_rpc",),
        "vllm.entrypoints.serve.dev.cache.api_router": ("/reset_prefix_cache",),
        "vllm.entrypoints.rl.online.api_router": ("/update_weight_version", "/weight_info"),
        "vllm.entrypoints.serve.instrumentator.basic": ("/version",),
    }
    for module, expected in paths.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        source = open(spec.origin).read()
        for path in expected:
            assert f'"{path}"' in source


def test_our_lora_kernels_take_the_place_of_vllms() -> None:
    """Same names, same parameters, same numbers where every token has an adapter; a token without one is left alone,
    which is what vLLM's own get wrong."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from vlm_reason.compat import vllm_lora

    fresh = importlib.util.find_spec("vllm.lora.ops.torch_ops.lora_ops")
    assert fresh is not None and fresh.loader is not None
    theirs = importlib.util.module_from_spec(fresh)
    fresh.loader.exec_module(theirs)
    for name in REPLACED:
        ours = list(inspect.signature(getattr(vllm_lora, name)).parameters)
        assert ours == list(inspect.signature(getattr(theirs, name)).parameters)
        assert hasattr(lora_ops, name) and hasattr(punica_cpu, name)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 10, generator=generator)
    a = torch.randn(3, 1, 4, 10, generator=generator)
    b = torch.randn(3, 1, 8, 4, generator=generator)
    for slots in ([0, 1, 1, 2, 0, 2], [1] * 6):
        index = torch.tensor(slots)
        down, expected = torch.zeros(6, 4), torch.zeros(6, 4)
        vllm_lora.bgmv_shrink(x, a, down, index, 0.5)
        theirs.bgmv_shrink(x, a, expected, index, 0.5)
        assert torch.allclose(down, expected, atol=1e-6)
        y, wanted = torch.ones(6, 20), torch.ones(6, 20)
        vllm_lora.bgmv_expand_slice(down, b, y, index, 5, 8)
        theirs.bgmv_expand_slice(expected, b, wanted, index, 5, 8)
        assert torch.allclose(y, wanted, atol=1e-5)
        y, wanted = torch.ones(6, 8), torch.ones(6, 8)
        vllm_lora.bgmv_expand(down, b, y, index)
        theirs.bgmv_expand(expected, b, wanted, index)
        assert torch.allclose(y, wanted, atol=1e-5)

    mixed = torch.tensor([0, -1, 1, -1, 2, 2])
    down, y = torch.full((6, 4), 9.0), torch.ones(6, 8)
    vllm_lora.bgmv_shrink(x, a, down, mixed, 1.0)
    vllm_lora.bgmv_expand(down, b, y, mixed)
    assert torch.equal(y[[1, 3]], torch.ones(2, 8))
    assert torch.allclose(y[4], 1 + b[2, 0] @ (a[2, 0] @ x[4]), atol=1e-5)


def test_the_plugin_is_registered() -> None:
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert "vlm_reason.compat.vllm_lora:register" in {plugin.value for plugin in plugins}
