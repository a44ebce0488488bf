"""BatchEnsemble on LoRA: the members as adapters are what each row of a training batch went through."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.chain_parts import Stopped, examples, same_trees, state_of, stop_after, tiny_job
from vlm_reason.errors import UserError
from vlm_reason.weights import Choice, Job, Origin
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.particles import Particles
from vlm_reason.weights.methods.batch_ensemble import BatchEnsemble, RankOneFactors, members_of

LIKELIHOOD = Choice((3, 5, 7))


def trained_like(job: Job) -> RankOneFactors:
    """Factors of 3 members on an adapter whose B is not 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in adapter_tensors(job.model).values():
            p.add_(0.3 * torch.randn_like(p))
    return RankOneFactors.around_one(job, 3, 0.5)


def test_each_row_goes_through_its_member(tiny_llama: Any) -> None:
    job = tiny_job(copy.deepcopy(tiny_llama))
    factors = trained_like(job)
    rows, which = examples(7), torch.tensor([2, 0, 1, 1, 2, 0, 2])
    with torch.no_grad(), factors.in_rows(job.model, which):
        together = LIKELIHOOD.outputs(job.model, make_batch(rows))
    plain = LIKELIHOOD.outputs(job.model, make_batch(rows)).detach()
    posterior = Particles({}, factors.trees(job), Origin())
    for member, tree in enumerate(posterior.trees()):
        posterior.write(job.model, tree)
        with torch.no_grad():
            alone = LIKELIHOOD.outputs(job.model, make_batch(rows))
        torch.testing.assert_close(together[which == member], alone[which == member], rtol=1e-5, atol=1e-5)
        assert float((alone - plain).abs().max()) > 0.05  # the factors do something


def test_an_adapter_on_the_lm_head(tiny_llama: Any) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    job = Job(model.eval(), examples(), LIKELIHOOD)
    factors, rows = trained_like(job), examples(4)
    with torch.no_grad(), factors.in_rows(model, torch.tensor([2, 0, 1, 2])):
        together = LIKELIHOOD.outputs(model, make_batch(rows))
    posterior = Particles({}, factors.trees(job), Origin())
    for row, member in enumerate((2, 0, 1, 2)):
        posterior.write(model, posterior.trees()[member])
        alone = LIKELIHOOD.outputs(model, make_batch([rows[row]])).detach()
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_a_member_s_update_is_its_rank_one_times_the_shared_one(tiny_llama: Any) -> None:
    job = tiny_job(tiny_llama)
    factors = trained_like(job)
    shared = state_of(job)
    for i, tree in enumerate(factors.trees(job)):
        for name, s in factors.inputs.items():
            a, b = name + ".lora_A.weight", name + ".lora_B.weight"
            r = factors.outputs[name][i]
            expected = torch.outer(r, s[i]) * (shared[b] @ shared[a])
            torch.testing.assert_close(tree[b] @ tree[a], expected.detach(), rtol=1e-4, atol=1e-5)
    assert len(factors.inputs) == 4
    again = RankOneFactors.around_one(job, 3, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), factors.parameters(), strict=True))
    values = torch.cat([p.detach().flatten() for p in factors.parameters()])
    assert float(values.mean()) == pytest.approx(1, abs=0.06) and float(values.std()) == pytest.approx(
        0.5, abs=0.05
    )
    assert len({float(v) for v in values}) > 0.95 * len(values)


def test_rows_are_spread_over_members_by_example_and_step() -> None:
    names = [f"p{n}" for n in range(600)]
    counts = Counter(members_of(names, 3, seed=1, step=4).tolist())
    assert all(150 < counts[m] < 250 for m in range(3))
    assert torch.equal(members_of(names[5:9], 3, 1, 4), members_of(names, 3, 1, 4)[5:9])
    assert not torch.equal(members_of(names, 3, 1, 5), members_of(names, 3, 1, 4))
    assert not torch.equal(members_of(names, 3, 2, 4), members_of(names, 3, 1, 4))


def test_members_learn_apart_and_resume(tiny_llama: Any, tmp_path: Path) -> None:
    method = BatchEnsemble(members=3)
    job = tiny_job(copy.deepcopy(tiny_llama), 2)
    before = RankOneFactors.around_one(job, 3, 0.5)
    straight, report = method.fit(job)
    assert isinstance(straight, Particles) and len(straight) == 3 and report.details == {"members": 3}
    assert report.train_nll is not None
    assert same_trees([state_of(job)], [straight.mean()])
    assert set(straight.uncertain()) == set(straight.mean())
    ratio = [
        straight.trees()[k][name + ".lora_A.weight"] / s[k].detach()
        for name, s in list(before.inputs.items())[:1]
        for k in (0, 1)
    ]
    assert float((ratio[0] - ratio[1]).abs().max()) > 1e-3  # the factors have moved, each its own way
    stopped = tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path)
    stop_after(8)
    with pytest.raises(Stopped):
        method.fit(stopped)
    again, _ = method.fit(tiny_job(copy.deepcopy(tiny_llama), 2, output_dir=tmp_path))
    assert isinstance(again, Particles) and same_trees(again.trees(), straight.trees())


def test_what_it_cannot_do_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="members must be at least 2, got 1"):
        BatchEnsemble(members=1)
    with pytest.raises(UserError, match="spread must be > 0"):
        BatchEnsemble(spread=0.0)
    dora = get_peft_model(
        tiny_llama, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True)
    )
    with pytest.raises(UserError, match="no plain LoRA linear layer"):
        BatchEnsemble().fit(Job(dora, examples(), LIKELIHOOD))


def test_a_saved_member_is_an_ordinary_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    job = tiny_job(copy.deepcopy(tiny_llama), 0.5)
    posterior, _ = BatchEnsemble(members=2).fit(job)
    rows = make_batch(examples(5))
    draws = posterior.predictive(job.model, examples(5), LIKELIHOOD, 2, keep_logits=True).logits
    assert draws is not None
    for folder, logits in zip(posterior.export_samples(2, tmp_path / "m", seed=0), draws, strict=True):
        stock = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder)
        with torch.no_grad():
            torch.testing.assert_close(LIKELIHOOD.outputs(stock, rows), logits.float(), rtol=1e-4, atol=1e-4)
