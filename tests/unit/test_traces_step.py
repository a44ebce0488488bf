"""A step's passes over trees against the same loss from a padded batch: loss, gradient, budget, what is forwarded."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from vlm_reason.models.adapters import AdapterConfig, add_adapters, trainable, use_adapter
from vlm_reason.scoring.padded import score_padded
from vlm_reason.traces import Phase
from vlm_reason.traces.rows import Row, rows_objective
from vlm_reason.traces.step import backward_batches, cut_batches
from vlm_reason.types import Coefficients


def phase(**values) -> Phase:
    return Phase("test", lambda s, state: (Coefficients(), state), trains=("reasoner", "posterior"), **values)


def rows(groups: int = 3, traces: int = 4, seed: int = 0) -> list[Row]:
    """As a window makes them: a trace, cue and answer a row; further answers behind it; the posterior's own prompt."""
    rng = random.Random(seed)
    ids = lambda low, high: tuple(rng.randrange(64) for _ in range(rng.randint(low, high)))  # noqa: E731
    out = []
    for _ in range(groups):
        x, hinted = ids(6, 12), ids(8, 14)
        for _ in range(traces):
            z, cue, y, other = ids(2, 9), (7, 8), ids(1, 3), ids(1, 3)
            c_z, c_y = rng.gauss(0, 1), rng.gauss(0, 1)
            for adapter, context, target, weight in (
                ("reasoner", x, z + cue + y, (c_z,) * len(z) + (0.0,) * 2 + (c_y,) * len(y)),
                ("reasoner", x + z + cue, other, (c_y,) * len(other)),
                ("posterior", hinted, z, (c_z,) * len(z)),
            ):
                old, ref = (
                    tuple(-rng.uniform(3.0, 5.0) for _ in target) for _ in range(2)
                )  # near the model's own, so that some ratios are clipped and some are not
                out.append(Row(adapter, context, target, weight, old, ref))
    return out


def padded_step(model, chosen: list[Row], which: Phase, scale: float) -> Tensor:
    loss = torch.zeros(())
    for adapter in ("reasoner", "posterior"):
        mine = [row for row in chosen if row.adapter == adapter]
        with use_adapter(model, adapter):
            logps, _ = score_padded(model, [(row.context, row.target) for row in mine])
            part = -rows_objective(mine, logps, which) / scale
            part.backward()
        loss += part.detach()
    return loss


@pytest.fixture
def model(tiny_llama):
    made = add_adapters(tiny_llama, AdapterConfig(r=4))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trainable(made, ["reasoner", "posterior"])
    return made


def gradients(model) -> dict[str, Tensor]:
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("budget", [10_000, 90, 1])
@pytest.mark.parametrize("settings", [{}, {"clip": 0.3}, {"kl": 0.2}], ids=["plain", "clip", "kl"])
def test_trees_give_the_padded_loss_and_gradient(model, settings: dict[str, float], budget: int) -> None:
    chosen, which = rows(), phase(**settings)
    random.Random(1).shuffle(chosen)
    expected = padded_step(model, chosen, which, 6.0)
    reference = gradients(model)
    last: list[bool] = []
    cut = cut_batches(model, chosen, budget)
    cost = backward_batches(model, cut, which, 6.0, lambda part, end: (last.append(end), part.backward()))
    torch.testing.assert_close(cost.loss, expected, rtol=1e-5, atol=1e-5)
    found = gradients(model)
    assert found.keys() == reference.keys() and any("posterior" in k for k in found)
    for name, gradient in reference.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
    assert last == [False] * (len(cut) - 1) + [True]
    assert sorted(map(repr, (row for batch in cut for row in batch.rows))) == sorted(map(repr, chosen))


def test_every_prompt_is_forwarded_once_for_each_adapter(model) -> None:
    chosen = rows()
    seen: list[int] = []
    decoder = model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    cut = cut_batches(model, chosen, 10_000)
    cost = backward_batches(model, cut, phase(), 1.0, lambda part, last: part.backward())
    prefixes = {
        (row.adapter, *(row.context + row.target)[:n])
        for row in chosen
        for n in range(1, len(row.context) + len(row.target))
    }
    assert cost.forwarded == sum(seen) == len(prefixes)
    assert cost.forwarded < 0.6 * sum(row.tokens for row in chosen)
    assert [batch.adapter for batch in cut] == ["reasoner", "posterior"]


def test_a_group_is_not_spread_over_batches_it_fits_into(model) -> None:
    chosen = [row for row in rows(groups=6) if row.adapter == "reasoner"]
    where: dict[tuple[int, ...], set[int]] = {}
    for i, batch in enumerate(cut_batches(model, chosen, 120)):
        assert batch.tokens <= 120
        for row in batch.rows:
            where.setdefault(row.context[:6], set()).add(i)
    assert len(where) == 6 and all(len(batches) == 1 for batches in where.values())


def test_tokens_without_a_coefficient_meet_no_head(model) -> None:
    chosen = rows()
    met: list[int] = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: met.append(len(args[0])))
    backward_batches(
        model, cut_batches(model, chosen, 10_000), phase(), 1.0, lambda part, last: part.backward()
    )
    assert sum(met) == sum(row.useful for row in chosen)
