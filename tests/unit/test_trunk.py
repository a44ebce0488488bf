"""The frozen layers run once: what is trained and predicted above them is what the whole model would have given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, add_adapters
from vlm_reason.weights import Choice, Example, Job, Training
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.methods.map import MAP
from vlm_reason.weights.trunk import above_trunk, first_adapted_layer

LABELS = Choice((3, 5, 7))
UPPER = AdapterConfig(r=2, alpha=4, target_modules=("q_proj", "v_proj"), layers=(1,))


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 64, (4 + n % 5,), generator=generator).tolist() for n in range(count)]
    return [Example(str(n), tuple(row), n % 3) for n, row in enumerate(rows)]


def trained(model: Any, data: list[Example] | tuple[Example, ...]) -> dict[str, torch.Tensor]:
    wrapped = add_adapters(model, UPPER, ("default",))
    MAP().fit(Job(wrapped, data, LABELS, Training(epochs=3, batch_size=4, learning_rate=1e-2)))
    values = {key: p.detach().clone() for key, p in adapter_tensors(wrapped).items()}
    wrapped.unload()
    return values


def test_training_above_the_trunk_gives_the_adapter_of_the_whole_model(tiny_llama: Any) -> None:
    data = examples()
    top, (own,) = above_trunk(tiny_llama, 1, [data], tokens=20)
    assert [e.target for e in own] == [e.target for e in data]
    half, whole = trained(top, own), trained(tiny_llama, data)
    assert half.keys() == whole.keys() and all("layers.1." in key for key in half)
    assert max(float(v.abs().max()) for k, v in whole.items() if "lora_B" in k) > 1e-3
    for key, value in whole.items():
        torch.testing.assert_close(half[key], value, atol=1e-6, rtol=1e-5)


def test_the_model_below_is_left_as_it_was_and_its_weights_are_shared(tiny_llama: Any) -> None:
    embedding, layers = tiny_llama.get_input_embeddings(), list(tiny_llama.model.layers)
    top, _ = above_trunk(tiny_llama, 1, [examples(3)])
    assert tiny_llama.get_input_embeddings() is embedding and list(tiny_llama.model.layers) == layers
    assert top.model.layers[1].mlp.up_proj.weight is tiny_llama.model.layers[1].mlp.up_proj.weight
    assert len(top.model.layers) == len(layers)


def test_the_layers_below_never_run_again(tiny_llama: Any) -> None:
    top, (own,) = above_trunk(tiny_llama, 1, [examples(4)])
    calls: list[int] = []
    tiny_llama.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    top(input_ids=torch.tensor([own[0].ids]))
    assert not calls


def test_several_parts_and_preference_pairs_keep_their_places(tiny_llama: Any) -> None:
    pair = Example("pair", (4, 5, 6), 0, rejected=(4, 5, 9))
    top, (first, second) = above_trunk(tiny_llama, 1, [examples(2), [pair]])
    assert len(first) == 2 and second[0].id == "pair" and len(second[0].rejected) == 3
    with torch.no_grad():
        for own, before in ((second[0].ids, pair.ids), (second[0].rejected, pair.rejected)):
            got = top(input_ids=torch.tensor([own])).logits
            torch.testing.assert_close(got, tiny_llama(input_ids=torch.tensor([before])).logits)


@pytest.mark.parametrize(
    "adapter, first",
    [
        (UPPER, 1),
        (AdapterConfig(target_modules="all-linear"), 0),
        (AdapterConfig(target_modules=("q_proj",)), 0),
        (AdapterConfig(target_modules=r".*\.layers\.1\..*v_proj"), 1),
    ],
)
def test_the_first_adapted_layer(tiny_llama: Any, adapter: AdapterConfig, first: int) -> None:
    assert first_adapted_layer(tiny_llama, adapter) == first


def test_a_trunk_that_is_the_whole_model_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="before one of the 2 decoder layers, got 2"):
        above_trunk(tiny_llama, 2, [examples(2)])
