"""FLOPs, parameters and bytes of the cost model against torch's own counters on real models."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen3Config, Qwen3ForCausalLM

from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters, trainable
from vlm_reason.planning.hardware import DEVICES
from vlm_reason.planning.memory import activation_bytes
from vlm_reason.planning.model_size import ModelSize, model_size, size_of_config
from vlm_reason.planning.step_cost import Setup, train_flops

TOKENS, ROWS = 24, 3
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def build(family: str, **changes: object):
    config_class, model_class = FAMILIES[family]
    config = config_class(**{**SHAPE, "tie_word_embeddings": True, **changes})
    return size_of_config(config, family), model_class(config)


def counted(model, backward: bool) -> int:
    ids = torch.randint(0, 64, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        if backward:
            hidden.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    size, model = build(family)
    assert size.total == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2)
    assert size.body == matrices
    assert size.head == model.get_output_embeddings().weight.numel()
    assert size.kv_bytes(2) == 2 * 6 * 2 * 16 * 2
    assert size.qk_norm == (family == "qwen3")


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("mlp.down_proj",)])
def test_adapter_parameters_are_peft_s(targets) -> None:
    size, model = build("llama")
    config = AdapterConfig(r=3, target_modules=targets)
    wrapped = add_adapters(model, config)
    assert size.adapter_parameters(config) == sum(
        p.numel() for p in adapter_parameters(wrapped, "reasoner").values()
    )


def test_unknown_targets_are_named() -> None:
    with pytest.raises(UserError, match=r"'query',\) names no layer .* q_proj"):
        build("llama")[0].adapter_parameters(AdapterConfig(target_modules=("query",)))


def test_an_expert_counts_where_a_token_is_routed_to_it() -> None:
    shape = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    size = size_of_config(config, "mixtral")
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 32 * 96
    assert size.body == 6 * (attention + router + 2 * expert)


def test_sliding_windows_bound_what_is_attended_to() -> None:
    size = size_of_config(
        Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=4), "windowed"
    )
    assert size.windows == (None, None, None, None, 8, 8)
    assert size.attention_flops(100) == 4 * 64 * (4 * 100 + 2 * 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_torch_s(family: str) -> None:
    """Eager attention computes every pair, so a token attends to TOKENS of them."""
    size, model = build(family)
    assert counted(model, backward=False) == size.forward_flops(ROWS * TOKENS, TOKENS)


def test_training_flops_of_full_weights_are_torch_s() -> None:
    size, model = build("llama")
    assert counted(model, backward=True) == train_flops(size, ROWS * TOKENS, TOKENS, 0, adapter=0)


def test_training_flops_of_lora_are_torch_s() -> None:
    """Two passes over frozen matrices, three over the rest. Nothing below the first layer's adapters needs a gradient:
    the input gradients of its q, k and v, frozen and A, are all that the model counts too much."""
    size, model = build("llama")
    r = 4
    adapted = add_adapters(model, AdapterConfig(r=r))
    trainable(adapted, ["reasoner"])
    adapter = size.adapter_parameters(AdapterConfig(r=r))
    expected = train_flops(size, ROWS * TOKENS, TOKENS, 0, adapter)
    below = 2 * ROWS * TOKENS * (32 * (64 + 32 + 32) + 3 * 32 * r)
    assert counted(adapted.get_base_model(), backward=True) == expected - below


def test_full_recompute_is_one_more_forward_pass() -> None:
    size, _ = build("llama")
    plain = train_flops(size, 100, 50, 10, 0)
    more = train_flops(size, 100, 50, 10, 0, "full")
    assert more - plain == pytest.approx(size.forward_flops(100, 50))
    assert plain == 3 * size.forward_flops(100, 50) + 4 * 2 * 10 * size.head


# ----------------------------------------------------------------------------------------------------- memory


def setup_of(size: ModelSize, dtype: str, lora: bool, recompute: str = "none") -> Setup:
    config = AdapterConfig(r=4)
    adapter = size.adapter_parameters(config) if lora else 0
    adapted = size.adapted(config) if lora else ()
    return Setup(size, DEVICES["h100"], dtype, adapter, adapted, "padded", 4096, 4096, recompute)


def kept_bytes(model) -> int:
    """Bytes that autograd keeps, parameters aside, by storage."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        decoder = model.get_decoder()
        decoder(torch.randint(0, 64, (ROWS, TOKENS)), use_cache=False)
    return sum(storages.values())


@pytest.mark.parametrize(
    ("family", "dtype", "lora"), list(product(FAMILIES, ["float32", "bfloat16"], [False, True]))
)
def test_activations_are_those_that_autograd_keeps(family: str, dtype: str, lora: bool) -> None:
    """Between models of 2 and 6 layers, so that what is not a layer's drops out."""
    kept, foreseen = {}, {}
    for layers in (2, 6):
        size, model = build(family, num_hidden_layers=layers, attn_implementation="sdpa")
        model = model.to(getattr(torch, dtype))
        if lora:
            model = add_adapters(model, AdapterConfig(r=4))
            trainable(model, ["reasoner"])
            model = model.train().get_base_model()
        kept[layers] = kept_bytes(model.train())
        foreseen[layers] = activation_bytes(setup_of(size, dtype, lora), ROWS * TOKENS)
    assert foreseen[6] - foreseen[2] == pytest.approx(kept[6] - kept[2], rel=0.01)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    size, _ = build("llama")
    plain = setup_of(size, "bfloat16", lora=True)
    one = activation_bytes(plain, 10) / 6
    checkpointed = dataclasses.replace(plain, recompute="full")
    assert activation_bytes(checkpointed, 10) == pytest.approx(one + 10 * 6 * 32 * 2)


WHOLE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llama"},
            "does not say hidden_size, num_hidden_layers, num_attention_heads, vocab_size:",
        ),
        (
            {"model_type": "gpt2", "n_embd": 64, "vocab_size": 99},
            "does not say n_layer, n_head: a plan needs the",
        ),
        (
            {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99},
            "num_attention_heads",
        ),
        (
            {"model_type": "llama", **WHOLE, "num_hidden_layers": 0},
            "its num_hidden_layers is 0, where a transformer",
        ),
        ({"model_type": "llama", **WHOLE, "num_attention_heads": 0}, "cannot load the model in "),
    ],
)
def test_a_config_without_sizes_is_one_clear_line(tmp_path, config: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as refused:
        model_size(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_family_whose_text_part_has_its_defaults(tmp_path) -> None:
    """LLaVA's config.json leaves out what Llama has by default."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_size(str(tmp_path)).hidden == 4096
