"""What lean_lora relies on in PEFT's LoRA layer, and that it computes what PEFT computes."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear

from vlm_reason.compat.peft import draws_as_adapters, is_lean, lean_lora
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters, use_adapter

IDS = torch.tensor([[5, 9, 17, 4, 8, 30, 41], [7, 7, 12, 60, 3, 22, 19]])


def with_weights(model, dtype):
    wrapped = add_adapters(model.to(dtype), AdapterConfig(r=4, alpha=8)).eval()
    generator = torch.Generator().manual_seed(3)
    for name in ("reasoner", "posterior"):
        for parameter in adapter_parameters(wrapped, name).values():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped


@torch.no_grad()
@pytest.mark.parametrize("adapter", ["reasoner", "posterior", None])
def test_fp32_equals_peft(tiny_llama, adapter):
    model = with_weights(tiny_llama, torch.float32)
    with use_adapter(model, adapter):
        expected = model(IDS).logits
        with lean_lora(model):
            assert is_lean(model) is (adapter is not None)
            assert torch.allclose(model(IDS).logits, expected, atol=2e-5)
        assert not is_lean(model)
        assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_bf16_is_as_close_to_the_exact_law_as_peft_is(tiny_llama):
    import copy

    exact = with_weights(copy.deepcopy(tiny_llama).to(torch.bfloat16).float(), torch.float64)
    model = with_weights(tiny_llama, torch.bfloat16)
    truth = exact(IDS).logits.log_softmax(-1)

    def error() -> float:
        return float((model(IDS).logits.double().log_softmax(-1) - truth).abs().mean())

    peft = error()
    with lean_lora(model):
        lean = error()
    assert lean < 1.5 * peft


def test_other_kinds_of_adapter_are_left_to_peft(tiny_llama):
    model = get_peft_model(tiny_llama, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with lean_lora(model):
        assert not is_lean(model)


def test_an_error_inside_restores_every_layer(tiny_llama):
    model = with_weights(tiny_llama, torch.float32)
    with pytest.raises(RuntimeError), lean_lora(model):
        raise RuntimeError
    assert not is_lean(model)


def test_the_layer_still_has_the_parts_the_short_path_reads():
    source = inspect.getsource(Linear.forward)
    for part in (
        "self.disable_adapters",
        "self.merged",
        "self.active_adapters",
        "self.lora_variant",
        "self.base_layer",
    ):
        assert part in source, (
            f"peft's LoRA forward no longer reads {part}: look at vlm_reason/compat/peft.py"
        )
    assert "lora_B(lora_A(dropout(x))) * scaling" in source


def test_draws_become_adapters_of_one_batch_and_go_again(tiny_llama):
    """PEFT's mixed batches, entered without its forward: a private name."""
    model = get_peft_model(
        tiny_llama, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    ).eval()
    own = get_peft_model_state_dict(model)
    draws = {f"draw{k}": {key: value * (k + 2) for key, value in own.items()} for k in range(2)}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS).logits
        with draws_as_adapters(model, "default", draws) as in_use, in_use(["draw1", "draw0"]):
            mixed = model.get_base_model()(IDS).logits
        assert torch.equal(model(IDS).logits, before)
        set_peft_model_state_dict(model, draws["draw1"])
        assert torch.allclose(model(IDS).logits[0], mixed[0], atol=1e-4)
        assert not torch.allclose(before[0], mixed[0], atol=1e-2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
    assert list(model.peft_config) == ["default"]
