"""Optimisers whose state says what the parameters hold (IVON), where the trainer restores or drops it itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist

from tests.resume.test_resume import trainer
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters, add_adapters, reset_adapter
from vlm_reason.models.sharding import shard_fully
from vlm_reason.traces import build
from vlm_reason.traces.distributed import Ranks
from vlm_reason.traces.parallel import FullySharded, Replicated
from vlm_reason.weights import IVON


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(tiny_llama) -> tuple[list[torch.nn.Parameter], IVON, FullySharded]:
    model = add_adapters(copy.deepcopy(tiny_llama), AdapterConfig(r=2, alpha=4))
    shard_fully(model, torch.device("cpu"))
    own = list(adapter_parameters(model, "reasoner").values())
    optimizer = IVON(own, 0.1, 100, seed=3)
    return own, optimizer, FullySharded(model, optimizer, Ranks(), reduce_once=True)


def test_a_resumed_sharded_run_holds_the_draw_that_was_saved(tiny_llama, one_process):
    own, optimizer, parallel = sharded(tiny_llama)
    for step in range(3):
        for p in own:
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optimizer.step()
    saved, held = parallel.read_state(), [whole(p) for p in own]
    again, other, resumed = sharded(tiny_llama)
    assert any(not torch.equal(whole(p), h) for p, h in zip(again, held, strict=True))
    resumed.write_state(saved)
    assert other.param_groups[0]["updates"] == 3
    assert all(torch.equal(whole(p), h) for p, h in zip(again, held, strict=True))


def test_an_adapter_that_starts_anew_has_the_first_posterior_around_it(tiny_llama):
    model = add_adapters(tiny_llama, AdapterConfig(r=2, alpha=4))
    reasoner, posterior = (list(adapter_parameters(model, n).values()) for n in ("reasoner", "posterior"))
    optimizer = IVON([*reasoner, *posterior], 0.1, 100)
    for p in (*reasoner, *posterior):
        p.grad = torch.ones_like(p)
    optimizer.step()
    others = [optimizer.state[p]["mean"].clone() for p in posterior]
    reset_adapter(model, "reasoner", 5)
    first = [p.detach().clone() for p in reasoner]
    Replicated(model, optimizer, Ranks(), lambda part: None).forget("reasoner")
    assert all(torch.equal(optimizer.state[p]["mean"], v) for p, v in zip(reasoner, first, strict=True))
    assert all(torch.equal(optimizer.state[p]["mean"], v) for p, v in zip(posterior, others, strict=True))
    with optimizer.mean():
        assert all(torch.equal(p.detach(), v) for p, v in zip(reasoner, first, strict=True))


def test_star_trains_with_ivon_over_rounds(tiny_llama, tiny_tokenizer, tmp_path):
    """Its second round starts from the base, with the posterior of the first step."""
    own = trainer(tiny_llama, tiny_tokenizer, tmp_path, build("star"), window_epochs=1, save_strategy="no")
    own._optimizer_factory = lambda parameters, args: IVON(parameters, 0.01, 1e6)
    own.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 0, 1, 1]
    assert all(torch.isfinite(p).all() for p in adapter_parameters(own.model, "reasoner").values())
