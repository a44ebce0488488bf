"""Many adapters in one forward: what each says alone, which rows go where, and per-example derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlm_reason.compat.peft import draws_as_adapters, plain_lora_keys
from vlm_reason.errors import UserError
from vlm_reason.weights import Choice, DiagonalGaussian, Example, Origin, Regression, make_batch
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.jacobians import jacobians
from vlm_reason.weights.per_row import decoder_layers, draws_in_rows, in_head, row_update, stack

IDS = torch.tensor([[5, 9, 30, 7, 11], [8, 2, 60, 41, 3], [6, 6, 12, 13, 14]])


def adapted(base: nn.Module, targets: Sequence[str] = ("q_proj", "v_proj"), **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=list(targets), **options)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def posterior_of(model: PeftModel, sigma: float = 0.3, only: str = "") -> DiagonalGaussian:
    mean = adapter_tensors(model)
    spread = {key: torch.full_like(value, sigma) for key, value in mean.items() if only in key}
    return DiagonalGaussian(peft_config_dict(model, "default"), mean, spread, Origin())


def one_by_one(model: PeftModel, posterior: DiagonalGaussian, trees: Sequence[dict], **inputs: Any) -> Tensor:
    """Logits [S, B, T, V] of every draw in the adapter."""
    found = []
    for tree in trees:
        posterior.write(model, tree)
        found.append(model(**inputs).logits)
    posterior.write(model, posterior.mean())
    return torch.stack(found)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, (*ALL, "lm_head")])
@torch.no_grad()
def test_rows_are_what_draws_say_alone_and_what_peft_mixes(tiny_llama, targets) -> None:
    model = adapted(tiny_llama, targets)
    posterior = posterior_of(model)
    trees = list(posterior.sample(4, seed=3))
    want = one_by_one(model, posterior, trees, input_ids=IDS)
    assert (want[0] - want[1]).abs().max() > 1
    with draws_in_rows(model, stack(trees)) as first:
        got = model(input_ids=IDS).logits.view(want.shape)
    assert first == 0
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    names = [f"d{s}" for s in range(4)]
    with draws_as_adapters(model, "default", dict(zip(names, trees, strict=True))) as in_use:
        with in_use([name for name in names for _ in range(len(IDS))]):
            mixed = model(input_ids=IDS.repeat(4, 1)).logits.view(want.shape)
    assert (mixed - want).abs().max() < 1e-5 * want.abs().max()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(
        model(input_ids=IDS).logits, one_by_one(model, posterior, [posterior.mean()], input_ids=IDS)[0]
    )


class Watch:
    """How many rows each decoder layer is given, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[int, list[int]] = {}
        for n, layer in enumerate(decoder_layers(model)):
            layer.register_forward_pre_hook(
                lambda m, args, n=n: self.rows.setdefault(n, []).append(len(args[0]))
            )


@torch.no_grad()
def test_layers_below_the_first_uncertain_one_see_each_row_once(tiny_llama) -> None:
    model = adapted(tiny_llama, layers_to_transform=[1])
    posterior = posterior_of(model)
    trees = list(posterior.sample(5, 0))
    want = one_by_one(model, posterior, trees, input_ids=IDS)
    watch = Watch(model)
    with draws_in_rows(model, stack(trees)) as first:
        got = model(input_ids=IDS).logits.view(want.shape)
    assert first == 1 and watch.rows == {
        0: [3],
        1: [3],
    }  # a hook registered before sees what the layer is given
    assert (got - want).abs().max() < 1e-4


@torch.no_grad()
def test_certain_lower_layers_are_trunk_too(tiny_llama) -> None:
    """Adapters everywhere, but draws differ in layer 1 alone: the fixed adapter of layer 0 runs on B rows."""
    model = adapted(tiny_llama)
    posterior = posterior_of(model, only="layers.1.")
    trees = list(posterior.sample(3, 0))
    want = one_by_one(model, posterior, trees, input_ids=IDS)
    sizes: dict[str, int] = {}
    for n, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda m, args, n=n: sizes.__setitem__(str(n), len(args[0])))
    with draws_in_rows(model, stack(trees)) as first:
        got = model(input_ids=IDS).logits.view(want.shape)
    assert first == 1 and sizes == {"0": 3, "1": 9}
    assert (got - want).abs().max() < 1e-4


@torch.no_grad()
def test_an_uncertain_head_alone_runs_the_layers_once(tiny_llama) -> None:
    model = adapted(tiny_llama, ("q_proj", "lm_head"))
    posterior = posterior_of(model, only="lm_head")
    trees = list(posterior.sample(3, 0))
    want = one_by_one(model, posterior, trees, input_ids=IDS)
    watch = Watch(model)
    with draws_in_rows(model, stack(trees)) as first:
        got = model(input_ids=IDS).logits.view(want.shape)
    assert first == 2 and watch.rows == {0: [3], 1: [3]}
    assert (got - want).abs().max() < 1e-4
    assert in_head(model, posterior.uncertain()[0]) and not in_head(model, next(iter(posterior.mean())))


@pytest.mark.parametrize("rows", [1, 2, 5])
@torch.no_grad()
def test_masks_positions_and_square_batches(tiny_llama, rows: int) -> None:
    """Left padding with its mask and positions; as many rows as tokens, so that no table is taken for rows."""
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    trees = list(posterior.sample(3, 1))
    ids = torch.randint(3, 60, (rows, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    want = one_by_one(model, posterior, trees, **inputs)
    with draws_in_rows(model, stack(trees)):
        got = model(**inputs).logits.view(want.shape)
    assert (got - want)[:, mask.bool()].abs().max() < 1e-4


class Int8Linear(nn.Linear):
    """A base layer that keeps 8 bits a weight and a scale a row."""

    @staticmethod
    def of(layer: nn.Linear) -> Int8Linear:
        made = Int8Linear(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        made.weight = nn.Parameter(
            (layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        made.register_buffer("scale", scale)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.get_buffer("scale").to(x.dtype)).T


@torch.no_grad()
def test_under_a_quantised_base(tiny_llama) -> None:
    for layer in decoder_layers(tiny_llama):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear.of(getattr(layer.self_attn, name)))
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    trees = list(posterior.sample(3, 1))
    want = one_by_one(model, posterior, trees, input_ids=IDS)
    with draws_in_rows(model, stack(trees)):
        got = model(input_ids=IDS).logits.view(want.shape)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@torch.no_grad()
def test_factors_keep_fp32_under_a_bf16_base(tiny_llama) -> None:
    """A draw 1e-3 from the mean, which bf16 would round away, arrives; rows say what PEFT says of each draw."""
    model = adapted(tiny_llama.bfloat16())
    assert next(iter(adapter_tensors(model).values())).dtype == torch.float32
    a, b = torch.randn(3, 2, 32), torch.randn(3, 16, 2)
    x = torch.randn(6, 4, 32).bfloat16()
    want = torch.stack([2 * x[r].float() @ a[r // 2].T @ b[r // 2].T for r in range(6)])
    assert torch.allclose(row_update(a, b, 2.0)(x), want, rtol=1e-5, atol=1e-4)
    nudged = a * (1 + 1e-3)
    moved = row_update(nudged, b, 2.0)(x) - row_update(a, b, 2.0)(x)
    assert torch.allclose(moved, want * 1e-3, rtol=0.02, atol=1e-4)
    posterior = posterior_of(model, 0.05)
    trees = list(posterior.sample(3, 1))
    alone = one_by_one(model, posterior, trees, input_ids=IDS).float()
    with draws_in_rows(model, stack(trees)):
        got = model(input_ids=IDS).logits.float().view(alone.shape)
    assert (got - alone).abs().mean() < 0.02 * alone.std()


def test_gradients_reach_each_draw(tiny_llama) -> None:
    model = adapted(tiny_llama)
    posterior = posterior_of(model)
    trees = list(posterior.sample(2, 5))
    key = posterior.uncertain()[0]
    draws = stack(trees)
    draws[key].requires_grad_(True)
    for _ in range(2):  # two backward passes under one block
        draws[key].grad = None
        with draws_in_rows(model, draws):
            model(input_ids=IDS).logits.view(2, 3, 5, -1)[:, 1, 2, 7].sum().backward()
    for s, tree in enumerate(trees):
        posterior.write(model, tree)
        own = adapter_tensors(model)[key]
        own.requires_grad_(True)
        own.grad = None
        model(input_ids=IDS).logits[1, 2, 7].backward()
        assert torch.allclose(draws[key].grad[s], own.grad, rtol=1e-4, atol=1e-6)


def test_draws_that_do_not_fit_in_rows_are_refused(tiny_llama) -> None:
    model = adapted(tiny_llama, use_dora=True)
    draws = stack(posterior_of(model).sample(2, 0))
    with pytest.raises(UserError, match="only plain LoRA linear layers"), draws_in_rows(model, draws):
        pass
    assert plain_lora_keys(model, "default") == set()
    assert not any("forward" in vars(m) for m in model.modules())


# -------------------------------------------------------------------------------------------------------- Jacobians


def by_hand(model: PeftModel, batch: Any, likelihood: Any, keys: Sequence[str]) -> dict[str, Tensor]:
    tensors = adapter_tensors(model)
    for key in keys:
        tensors[key].requires_grad_(True)
    rows = []
    for n in range(len(batch)):
        f = likelihood.outputs(model, batch.rows([n]))[0]
        rows.append(
            [torch.autograd.grad(f[c], [tensors[k] for k in keys], retain_graph=True) for c in range(len(f))]
        )
    return {
        key: torch.stack([torch.stack([row[c][k] for c in range(len(row))]) for row in rows])
        for k, key in enumerate(keys)
    }


EXAMPLES = [Example(str(n), tuple(range(5 + n, 9 + 2 * n)), n % 3) for n in range(4)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_to_transform": [1]},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"lora_bias": True},
    ],
)
def test_jacobians_are_those_of_one_example_at_a_time(tiny_llama, options) -> None:
    model = adapted(tiny_llama, **options)
    batch, likelihood = make_batch(EXAMPLES), Choice((3, 5, 7))
    keys = list(adapter_tensors(model))
    trainable = [p.requires_grad for p in model.parameters()]
    f, found = jacobians(model, batch, likelihood)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.allclose(f, likelihood.outputs(model, batch), atol=1e-5)
    want = by_hand(model, batch, likelihood, keys)
    assert set(found) == set(keys)
    for key in keys:
        assert found[key].shape == (4, 3, *want[key].shape[2:])
        assert torch.allclose(found[key], want[key], rtol=1e-4, atol=1e-5)


def test_a_bias_of_b_stays_in_the_outputs(tiny_llama) -> None:
    model = adapted(tiny_llama, lora_bias=True)
    tensors = adapter_tensors(model)
    with torch.no_grad():
        for key, value in tensors.items():
            if key.endswith(".bias"):
                value.normal_(generator=torch.Generator().manual_seed(len(key)))
    batch, likelihood = make_batch(EXAMPLES), Choice((3, 5, 7))
    keys = [key for key in tensors if not key.endswith(".bias")]
    f, found = jacobians(model, batch, likelihood, keys)
    assert torch.allclose(f, likelihood.outputs(model, batch), atol=1e-5)
    want = by_hand(model, batch, likelihood, keys)
    assert all(torch.allclose(found[key], want[key], rtol=1e-4, atol=1e-5) for key in keys)


def test_jacobians_of_some_keys_with_one_output(tiny_llama) -> None:
    model = adapted(tiny_llama)
    likelihood = Regression(torch.randn(32))
    keys = [k for k in adapter_tensors(model) if "layers.1" in k and "lora_B" in k]
    _, found = jacobians(model, make_batch(EXAMPLES), likelihood, keys)
    want = by_hand(model, make_batch(EXAMPLES), likelihood, keys)
    assert list(found) == keys
    for key in keys:
        assert torch.allclose(found[key], want[key], rtol=1e-4, atol=1e-5)
