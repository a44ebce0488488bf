"""The training loop of posteriors against a loop written out, resumed and cut up; MAP, temperature, ensembles, IVON."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlm_reason.errors import UserError
from vlm_reason.weights import (
    IVON,
    Choice,
    DiagonalGaussian,
    Example,
    Job,
    Likelihood,
    Posterior,
    Training,
    suggest_settings,
)
from vlm_reason.weights.adapter import adapter_tensors, peft_config_dict
from vlm_reason.weights.callback import IVONCallback
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.particles import Particles
from vlm_reason.weights.held_out import nll_of_outputs, outputs_of_draws
from vlm_reason.weights.methods import METHODS
from vlm_reason.weights.methods.dropout import Dropout
from vlm_reason.weights.methods.ensemble import Ensemble, anew, member_seed, put
from vlm_reason.weights.methods.ivon import IVON as IVONMethod
from vlm_reason.weights.methods.map import MAP
from vlm_reason.weights.methods.rank_masks import RankMasks
from vlm_reason.weights.methods.temperature import Temperature, best_temperature, scale, split_off
from vlm_reason.weights.posterior import Origin
from vlm_reason.weights.training import (
    AdapterTrainer,
    micro_batches,
    negative_log_likelihood,
    planned_steps,
    step_members,
    train,
)

LABELS = Choice((3, 5, 7))
SHORT = Training(epochs=2, batch_size=8, learning_rate=1e-2, weight_decay=0.1, save_steps=2)


def adapted(base: Any, **keys: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **keys)
    return get_peft_model(base, config).eval()


def examples(count: int, seed: int = 0) -> list[Example]:
    """Of different lengths; the label follows from the last token, so there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 64, (4 + i % 5,), generator=g).tolist() for i in range(count)]
    return [Example(f"e{seed}.{i}", tuple(ids), ids[-1] % 3) for i, ids in enumerate(rows)]


@pytest.fixture
def job(tiny_llama: Any) -> Job:
    return Job(adapted(tiny_llama), examples(20), LABELS, SHORT, examples(30, seed=5))


def again(job: Job, **changes: Any) -> Job:
    """The same job on a model of its own."""
    return replace(job, model=copy.deepcopy(job.model), **changes)


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in adapter_tensors(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ivon_of(parameters: list[nn.Parameter], steps: int) -> IVON:
    return IVON(parameters, 0.5, 20, hess_init=20.0, beta2=0.9, seed=3)


class Stop(TrainerCallback):
    """As if killed when a step begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------- the loop


def test_training_is_the_loop_written_out(job: Job) -> None:
    """Order by epoch, mean over the step's examples, clipping over all, warm-up and linear decay, AdamW."""
    by_hand = again(job)
    trained = train(job)
    parameters = list(adapter_tensors(by_hand.model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    steps, losses = planned_steps(by_hand), []
    assert steps == trained.steps == 6
    for step in range(steps):
        rate = 1.0 if step == 0 else (steps - step) / steps  # 0.06 of 6 steps is no warm-up
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        members = step_members(step, 20, 8, 0)
        batch = make_batch([by_hand.train[i] for i in members])
        loss = negative_log_likelihood(by_hand.model, batch, LABELS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert trained.losses == pytest.approx(losses, rel=1e-5)
    assert trained.final_loss == trained.losses[-1]
    ours, theirs = weights(job.model), weights(by_hand.model)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-6)


def test_training_runs_where_the_model_is(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where transformers would choose another device: here meta, on which nothing has a value."""
    parameters, before = list(adapter_tensors(job.model).values()), weights(job.model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, report_to=[], use_cpu=True, disable_tqdm=True
    )
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("meta")))
    for p in parameters:
        p.requires_grad_(True)
    trainer = AdapterTrainer(
        job, negative_log_likelihood, parameters, torch.optim.SGD(parameters), arguments, 6, [], False
    )
    assert {p.device.type for p in job.model.parameters()} == {"cpu"}
    assert (
        trainer.training_step(job.model, {"step": 0}).device.type == "meta"
    )  # as the trainer's own total is
    assert_same(before, weights(job.model))
    ours = [p.grad for p in parameters]
    batch = make_batch([job.train[i] for i in step_members(0, 20, 8, 0)])
    theirs = torch.autograd.grad(negative_log_likelihood(job.model, batch, LABELS), parameters)
    torch.testing.assert_close(ours, list(theirs), rtol=1e-4, atol=1e-6)


def test_every_epoch_has_every_example_once_and_another_order() -> None:
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in step_members(step, 20, 8, 7)] for e in range(2)]
    assert all(sorted(order) == list(range(20)) for order in epochs) and epochs[0] != epochs[1]
    assert [len(step_members(s, 20, 8, 7)) for s in range(3)] == [8, 8, 4]
    assert step_members(0, 20, 8, 7) != step_members(0, 20, 8, 8)


def test_micro_batches_do_not_change_a_step(job: Job) -> None:
    small = again(job, training=replace(SHORT, tokens_per_microbatch=16))
    cut = micro_batches(small.train[:5], 16)  # 4 to 8 tokens long
    assert [b.ids for b in cut] == [("e0.4", "e0.3"), ("e0.2", "e0.1"), ("e0.0",)]
    a, b = train(job), train(small)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    for key, value in weights(job.model).items():
        torch.testing.assert_close(weights(small.model)[key], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [None, ivon_of], ids=["adamw", "ivon"])
def test_stopped_anywhere_and_resumed_is_uninterrupted_to_the_bit(
    job: Job, tmp_path: Path, make: Any
) -> None:
    whole = again(job)
    reference = train(whole, make_optimizer=make)
    for stop in (1, 5):
        cut = again(job, output_dir=tmp_path / f"stop{stop}")
        with pytest.raises(KeyboardInterrupt):
            train(cut, make_optimizer=make, callbacks=[Stop(stop)])
        left = sorted(p.name for p in (tmp_path / f"stop{stop}" / "train").iterdir())
        assert left == ([] if stop == 1 else ["checkpoint-4"])
        fresh = again(job, output_dir=cut.output_dir)
        resumed = train(fresh, make_optimizer=make)
        assert_same(weights(fresh.model), weights(whole.model))
        assert resumed.losses == reference.losses and resumed.steps == 6
        if make is not None:
            for a, b in zip(
                reference.optimizer.state.values(), resumed.optimizer.state.values(), strict=True
            ):
                assert all(torch.equal(a[k], b[k]) for k in ("mean", "precision", "momentum"))


def test_a_finished_stage_is_read_back_and_not_trained(job: Job, tmp_path: Path) -> None:
    kept = again(job, output_dir=tmp_path)
    first = train(kept, make_optimizer=ivon_of, name="a")
    fresh = again(job, output_dir=tmp_path)
    second = train(fresh, make_optimizer=ivon_of, name="a", callbacks=[Stop(0)])
    assert_same(weights(fresh.model), weights(kept.model))
    assert second.losses == first.losses
    means = [[s["mean"] for s in t.optimizer.state.values()] for t in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*means, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_of_another_run_is_refused(job: Job, tmp_path: Path) -> None:
    train(again(job, output_dir=tmp_path))
    for change, what in (
        ({"training": replace(SHORT, learning_rate=1e-3)}, "training ="),
        ({"train": examples(20, seed=9)}, "examples ="),
        ({"seed": 4}, "seed = 0, this run has 4"),
        ({"likelihood": Choice((5, 9, 7))}, "likelihood ="),  # another eval_task may bring another label
    ):
        with pytest.raises(UserError, match=f"{what}.*choose another output_dir"):
            train(again(job, output_dir=tmp_path, **change))
    train(again(job, output_dir=tmp_path, training=replace(SHORT, save_steps=5, tokens_per_microbatch=40)))


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    calls = []

    def loss(model: PeftModel, batch: Any, likelihood: Likelihood) -> Tensor:
        calls.append(0)
        return negative_log_likelihood(model, batch, likelihood) * (math.nan if len(calls) == 3 else 1.0)

    with pytest.raises(
        UserError, match=r"the loss is nan at step 3 of 6: lower training.learning_rate \(now 0.01\)"
    ):
        train(job, loss=loss)
    assert list(tmp_path.iterdir()) == []

    def steep(model: PeftModel, batch: Any, likelihood: Likelihood) -> Tensor:
        return (negative_log_likelihood(model, batch, likelihood) * 0).sqrt()

    with pytest.raises(UserError, match="the gradient is not finite at step 1 of 6"):
        train(job, loss=steep)


def test_stdout_stays_clean_and_the_bar_is_on_stderr(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(job, show_progress=True))
    out, err = capfd.readouterr()
    assert out == "" and "6/6" in err
    train(again(job))
    assert capfd.readouterr() == ("", "")


def test_eval_mode_unless_dropout_is_asked_for(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, lora_dropout=0.5)
    job = Job(model, examples(8), LABELS, replace(SHORT, epochs=1))
    modes: list[bool] = []

    def loss(model: PeftModel, batch: Any, likelihood: Likelihood) -> Tensor:
        modes.append(any(m.training for m in model.modules()))
        return negative_log_likelihood(model, batch, likelihood)

    train(job, loss=loss)
    train(job, loss=loss, dropout=True)
    assert modes == [False, True] and not any(m.training for m in model.modules())


def test_what_is_trained_is_fp32_and_nothing_else_moves(tiny_llama: Any) -> None:
    model = adapted(tiny_llama.bfloat16()).to(torch.bfloat16)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    train(Job(model, examples(8), LABELS, replace(SHORT, epochs=1)))
    assert {p.dtype for p in adapter_tensors(model).values()} == {torch.float32}
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_parameters_that_are_not_the_models_are_trained_clipped_and_cleared(job: Job) -> None:
    outside = nn.Parameter(torch.zeros(3))
    norms: list[float] = []

    def loss(model: PeftModel, batch: Any, likelihood: Likelihood) -> Tensor:
        return 100 * (outside - 1).square().sum()

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert outside.grad is not None
            norms.append(float(outside.grad.norm()))

    before = weights(job.model)
    train(job, loss=loss, parameters=[outside], callbacks=[Watch()],
          make_optimizer=lambda chosen, steps: torch.optim.SGD(chosen, lr=0.1))  # fmt: skip
    assert norms == pytest.approx([1.0] * 6, rel=1e-4)  # 346 without clipping, and growing without clearing
    assert_same(before, weights(job.model))
    assert outside.grad is None


class Counts(TrainerCallback):
    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total += state.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


def test_what_a_callback_has_gathered_is_in_the_checkpoint(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(again(job, output_dir=tmp_path), callbacks=[Counts(), Stop(5)])
    resumed, finished = Counts(), Counts()
    train(again(job, output_dir=tmp_path), callbacks=[resumed])
    train(again(job, output_dir=tmp_path), callbacks=[finished])
    assert float(resumed.total) == float(finished.total) == 1 + 2 + 3 + 4 + 5 + 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be > 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"warmup_share": 1.5}, r"warmup_share must be in \[0, 1\]"),
        ({"max_grad_norm": -1}, "max_grad_norm must be >= 0"),
        ({"save_steps": 0}, "save_steps must be >= 1"),
        ({"schedule": "liner"}, "unknown 'liner'; did you mean 'linear'"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SHORT, **change)


# ------------------------------------------------------------------------------------------------------ temperature


@pytest.mark.parametrize(("draws", "scaled_by"), [(1, 4.0), (1, 0.3), (6, 3.0)])
def test_temperature_is_the_minimum(draws: int, scaled_by: float) -> None:
    torch.manual_seed(2)
    data = examples(80)
    f = torch.randn(draws, 80, 3, dtype=torch.float64) + 2 * torch.nn.functional.one_hot(
        torch.tensor([int(e.target) for e in data]), 3
    )
    f = f * scaled_by
    found = best_temperature(f, data, LABELS)
    exact = minimize_scalar(
        lambda x: nll_of_outputs(f / math.exp(x), data, LABELS), bounds=(-4, 4), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert found == pytest.approx(math.exp(exact.x), rel=1e-5)
    x = torch.tensor(math.log(found), dtype=torch.float64, requires_grad=True)
    logp = LABELS.log_prob(f / x.exp(), make_batch(data))
    (slope,) = torch.autograd.grad(-logp.logsumexp(0).mean(), x)
    assert abs(float(slope)) < 1e-9


def test_temperature_of_a_point_changes_how_sure_it_is_and_no_answer(job: Job) -> None:
    plain, _ = MAP().fit(again(job))
    posterior, report = Temperature().fit(job)
    assert isinstance(posterior, DiagonalGaussian) and not posterior.uncertain()
    t = posterior.origin.output_temperature
    before = plain.predictive(job.model, job.held_out, LABELS, mode="mean", keep_logits=True)
    after = posterior.predictive(job.model, job.held_out, LABELS, mode="mean")
    assert before.logits is not None
    torch.testing.assert_close(after.probs, (before.logits[0].double() / t).softmax(-1), rtol=1e-6, atol=1e-9)
    assert torch.equal(before.probs.argmax(-1), after.probs.argmax(-1)) and t != 1.0
    assert report.method == "temperature" and report.details["of"] == "map"
    assert report.held_out_nll is not None and report.held_out_nll < report.details["nll_before"]
    target = torch.tensor([int(e.target) for e in job.held_out])
    nll = -after.probs.log().gather(1, target[:, None]).mean()
    assert report.held_out_nll == pytest.approx(float(nll), rel=1e-6)


def test_temperature_wraps_any_posterior_and_stays_on_disk(job: Job, tmp_path: Path) -> None:
    trees = [adapter_tensors(job.model), {k: v + 0.3 for k, v in adapter_tensors(job.model).items()}]
    start = Particles(MAP().fit(again(job))[0].adapter_config, trees, MAP().fit(again(job))[0].origin)
    scaled, details = scale(start, job, draws=4)
    twice, more = scale(scaled, job, draws=4)
    assert details["temperature"] == scaled.origin.output_temperature != 1.0
    assert more["temperature"] == pytest.approx(details["temperature"], rel=1e-6)  # nothing is left to scale
    assert start.origin.output_temperature == 1.0
    loaded = Posterior.load(scaled.save(tmp_path / "q"))
    assert loaded.origin.output_temperature == details["temperature"]
    given, report = Temperature(method=None, draws=4).fit(again(job, start=start))
    assert given.origin.output_temperature == details["temperature"] and report.steps == 0


def test_temperature_takes_a_share_of_the_training_examples(job: Job) -> None:
    left, out = split_off(job.train, 0.25, seed=3)
    assert (len(left), len(out)) == (15, 5) and {e.id for e in left} | {e.id for e in out} == {
        e.id for e in job.train
    }
    alone = again(job, held_out=(), seed=3)
    posterior, report = Temperature(split=0.25).fit(alone)
    assert report.examples == 15 and report.details["held_out"] == 5
    f = outputs_of_draws(MAP().fit(again(job, train=left, held_out=(), seed=3))[0], alone, out, 1)
    assert posterior.origin.output_temperature == pytest.approx(best_temperature(f, out, LABELS), rel=1e-5)


def test_temperature_says_what_it_lacks(job: Job) -> None:
    with pytest.raises(UserError, match="needs held-out examples: give held_out, or options.split"):
        Temperature().fit(again(job, held_out=()))
    with pytest.raises(UserError, match="unknown method 'mapp'; did you mean 'map'"):
        Temperature(method="mapp").fit(job)
    with pytest.raises(UserError, match="no posterior to start from"):
        Temperature(method=None).fit(job)
    with pytest.raises(UserError, match="logits of classes; Choice gives one number"):
        best_temperature(torch.zeros(2, 3, 1), job.held_out[:3], LABELS)


def test_held_out_data_that_are_all_right_end_at_the_bound() -> None:
    data = examples(10)
    f = 5.0 * torch.nn.functional.one_hot(torch.tensor([int(e.target) for e in data]), 3)[None]
    assert best_temperature(f, data, LABELS) == pytest.approx(1 / 32)
    assert best_temperature(-f, data, LABELS) == pytest.approx(32)


# --------------------------------------------------------------------------------------------------------- ensemble


def test_an_ensemble_is_its_members_trained_alone(job: Job) -> None:
    start = weights(job.model)
    posterior, report = Ensemble(3).fit(job)
    assert isinstance(posterior, Particles) and len(posterior) == 3 and report.steps == 18
    first = again(job)
    put(first, start)
    MAP().fit(first)
    assert_same(posterior.trees()[0], weights(first.model))
    a = [k for k in start if ".lora_A" in k]
    one, two, three = posterior.trees()
    assert not any(torch.equal(x[k], y[k]) for x, y in ((one, two), (two, three)) for k in a)
    alone = [Particles(posterior.adapter_config, [t], posterior.origin) for t in posterior.trees()]
    scores = [nll_of_outputs(outputs_of_draws(q, job, job.held_out, 1), job.held_out, LABELS) for q in alone]
    assert_same(posterior.mean(), posterior.trees()[scores.index(min(scores))])
    assert_same(weights(job.model), posterior.mean())
    p = posterior.predictive(job.model, job.held_out, LABELS, 3).probs
    each = [q.predictive(job.model, job.held_out, LABELS, 1).probs for q in alone]
    torch.testing.assert_close(p, torch.stack(each).mean(0), rtol=1e-5, atol=1e-7)


def test_members_resume_one_by_one(job: Job, tmp_path: Path) -> None:
    reference, _ = Ensemble(2).fit(again(job))
    kept = again(job, output_dir=tmp_path)
    train(
        replace(again(kept), seed=member_seed(0, 0)), name="member000"
    )  # the first is finished, then killed
    with pytest.raises(KeyboardInterrupt):
        second = again(kept)
        put(second, anew(weights(second.model), member_seed(0, 1)))
        train(replace(second, seed=member_seed(0, 1)), name="member001", callbacks=[Stop(3)])
    resumed, _ = Ensemble(2).fit(again(job, output_dir=tmp_path))
    for a, b in zip(reference.trees(), resumed.trees(), strict=True):  # type: ignore[attr-defined]
        assert_same(a, b)


def test_a_trained_adapter_has_no_members(job: Job) -> None:
    """Another A under its B would be neither it nor new."""
    MAP().fit(job)
    before = weights(job.model)
    for name in ("ensemble", "mixture"):
        with pytest.raises(UserError, match=f"{name}: members are independent runs.*give a new adapter"):
            METHODS[name]().fit(job)
    assert_same(weights(job.model), before)


def test_one_member_is_no_ensemble() -> None:
    with pytest.raises(UserError, match="members must be >= 2, got 1"):
        Ensemble(1)


# ------------------------------------------------------------------------------------------------------------- IVON


def test_ivon_settings_follow_from_the_run(job: Job) -> None:
    made: list[IVON] = []
    method = IVONMethod(sigma=0.02, temperature=0.5, mc_samples=2)
    parameters = [nn.Parameter(torch.zeros(4))]
    made.append(method.optimizer(job, parameters, 6))
    group = made[0].param_groups[0]
    auto = suggest_settings(3, 20, 0.02, 0.5, 1e-4)
    assert (group["ess"], group["hess_init"], group["beta2"]) == (40.0, auto.hess_init, auto.beta2)
    assert made[0].horizon == 3 and made[0].data_size == 20
    # no weight moves further than the learning rate in an update
    assert group["lr"] * (group["hess_init"] + 1e-4) * group["clip_radius"] == pytest.approx(1e-2)
    sigma = (group["ess"] * (group["hess_init"] + 1e-4)) ** -0.5
    assert sigma == pytest.approx(0.02)
    with pytest.raises(
        UserError, match="mc_samples is 7, the run has 6 steps: nothing would ever be updated"
    ):
        IVONMethod(mc_samples=7).optimizer(job, parameters, 6)


def test_ivon_gives_what_its_optimiser_holds_and_begins_where_it_is_told(job: Job) -> None:
    posterior, report = IVONMethod(start="map").fit(again(job))
    point, _ = MAP().fit(again(job))
    assert isinstance(posterior, DiagonalGaussian) and posterior.uncertain() == sorted(posterior.mean())
    assert report.steps == 12 and report.details["updates"] == 6
    begun = again(job, start=point)
    assert_same(IVONMethod().fit(begun)[0].mean(), posterior.mean())
    assert_same(weights(begun.model), posterior.mean())
    assert posterior.origin.data_size == 20 and posterior.origin.ess == 20.0
    assert set(posterior.origin.prior.values()) == {20.0 * 1e-4}
    loss = report.held_out_nll
    assert loss == pytest.approx(
        nll_of_outputs(outputs_of_draws(posterior, begun, job.held_out, 10), job.held_out, LABELS), rel=1e-5
    )


# --------------------------------------------------------------------------------------------------------- callback


def own_trainer(model: PeftModel, folder: Path, optimizer: Any, **settings: Any) -> Trainer:
    rows = [{"input_ids": list(e.ids[:4]), "labels": list(e.ids[:4])} for e in examples(16)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.0,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}

    callbacks: list[TrainerCallback] = [IVONCallback()]
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate,  # type: ignore[arg-type]
                   optimizers=(optimizer, None), callbacks=callbacks)  # fmt: skip


def own_ivon(model: PeftModel) -> IVON:
    return IVON(list(adapter_tensors(model).values()), 0.5, 50, hess_init=2.0, beta2=0.9)


def test_under_anybodys_trainer_evaluation_and_checkpoints_are_at_the_mean(
    tiny_llama: Any, tmp_path: Path
) -> None:
    models = [adapted(copy.deepcopy(tiny_llama)) for _ in range(3)]
    quiet, loud, resumed = (own_ivon(m) for m in models)
    own_trainer(models[0], tmp_path / "quiet", quiet).train()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = own_trainer(models[1], tmp_path / "loud", loud, **settings)
    seen: list[float] = []

    class AtMean(TrainerCallback):
        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
        ) -> None:
            means = [loud.state[p]["mean"] for g in loud.param_groups for p in g["params"]]
            held = [p for g in loud.param_groups for p in g["params"]]
            assert all(torch.equal(p, m) for p, m in zip(held, means, strict=True))
            seen.append(metrics["eval_loss"])

    trainer.add_callback(AtMean())
    trainer.train()
    assert len(seen) == 3
    for a, b in zip(quiet.state.values(), loud.state.values(), strict=True):  # evaluating changed nothing
        assert torch.equal(a["mean"], b["mean"]) and torch.equal(a["precision"], b["precision"])
    assert_same(weights(models[1]), Posterior.from_optimizer(loud, models[1]).mean())
    saved = load_file(tmp_path / "loud" / "checkpoint-6" / "adapter_model.safetensors")
    assert_same(saved, weights(models[1]))
    own_trainer(models[2], tmp_path / "loud", resumed, **settings).train(
        resume_from_checkpoint=str(tmp_path / "loud" / "checkpoint-3")
    )
    for a, b in zip(loud.state.values(), resumed.state.values(), strict=True):
        assert torch.equal(a["mean"], b["mean"]) and torch.equal(a["precision"], b["precision"])


def test_the_callback_refuses_another_optimiser(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(tiny_llama)
    adam = torch.optim.AdamW(list(adapter_tensors(model).values()))
    with pytest.raises(UserError, match="needs Trainer.*the optimiser is AdamW"):
        own_trainer(model, tmp_path, adam).train()


# ------------------------------------------------------------------------------------------------- starts, checkpoints


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"ensemble", "mixture"}))
def test_a_start_on_another_base_model_is_refused(name: str, tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    start = DiagonalGaussian(
        peft_config_dict(model, "default"), weights(model), {}, Origin(base="of another")
    )
    options: dict[str, Any] = {"temperature": {"method": None}}.get(name, {})
    long = replace(SHORT, epochs=40)
    job = Job(model, examples(8), LABELS, long, held_out=examples(4), start=start)
    with pytest.raises(UserError, match="base model with hash of another"):
        METHODS[name](**options).fit(job)


def test_a_checkpoint_of_other_settings_of_a_method_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    job = Job(adapted(tiny_llama), examples(8), LABELS, replace(SHORT, epochs=1), output_dir=tmp_path)
    Dropout(0.1).fit(job)
    for other in (Dropout(0.3), RankMasks(0.1), MAP()):
        with pytest.raises(UserError, match="was made with method = .*'dropout', 0.1"):
            other.fit(job)
