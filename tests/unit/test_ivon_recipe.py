"""`optim: ivon` in a recipe: its settings, one draw a window, the mean and the posterior that are kept, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import vlm_reason.traces.run as run_module
from vlm_reason.cli.optim import optimization_of
from vlm_reason.config import RunConfig, from_dict
from vlm_reason.engines.base import Law, ScoreRequest
from vlm_reason.engines.hf import HFEngine
from vlm_reason.errors import UserError
from vlm_reason.models.load import fingerprint_weights
from vlm_reason.traces import step as step_module
from vlm_reason.traces.run import make_trainer, run_training
from vlm_reason.weights import IVON, Posterior

STEPS = 2  # of a window
MEAN = "adapters/reasoner/adapter_model.safetensors"


pytestmark = pytest.mark.filterwarnings("ignore:IVON. .* of hess_init")  # runs of a few updates


@pytest.fixture
def recipe(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., RunConfig]:
    liked = tiny_tokenizer.convert_tokens_to_ids([*"0123", "\n"])
    with torch.no_grad():  # most of what it says is a short number
        tiny_llama.get_input_embeddings().weight[:, 0] = 8.0
        tiny_llama.lm_head.weight[liked, 0] += 3.0
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": f"p{i}", "question": f"{i}+{i + 1}", "answer": str(2 * i + 1)} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "run", trainer: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
        data = {
            "model": str(tmp_path / "model"),
            "task": {"kind": "jsonl", "name": str(tmp_path / "sums.jsonl")},
            "template": {"base": "steps", "prior": "{question}=", "posterior": "{question}={hint}=", "cue": "a:"},
            "verifier": "number",
            "preset": "vr",
            "options": {"evidence": "logp", "ratio": "none"},
            "adapter": {"r": 2, "alpha": 4},
            "optim": "ivon",
            "ivon": {"sigma": 0.05},
            "trainer": {
                "rounds": 2,
                "prompts_per_window": 4,
                "prompts_per_step": 4 // STEPS,
                "traces_per_prompt": 3,
                "max_trace_tokens": 12,
                "max_answer_tokens": 4,
                "learning_rate": 1e-2,
                "save_steps": 1,
                "use_cpu": True,
                **(trainer or {}),
            },
            "output_dir": str(tmp_path / name),
            "seed": 11,
        }  # fmt: skip
        return from_dict(RunConfig, {**data, **keys})

    return make


def train(config: RunConfig) -> dict[str, Any]:
    return run_training(config, False, optimization_of(config))


def optimizer_of(trainer: Any) -> IVON:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class AtEachStep(TrainerCallback):
    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look()


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------- settings


def test_settings_follow_from_the_run(recipe: Any) -> None:
    config = recipe(ivon={"sigma": 0.02, "temperature": 0.01})
    trainer = make_trainer(config, False, optimization_of(config))
    trainer.create_optimizer()
    optimizer = optimizer_of(trainer)
    assert [g["adapter"] for g in optimizer.param_groups] == ["reasoner", "posterior"]
    steps = 2 * 2 * STEPS  # rounds, phases, steps of a window
    for group in optimizer.param_groups:
        assert group["lr"] * group["clip_radius"] == pytest.approx(1e-2) and not group["rescale_lr"]
        assert group["ess"] == pytest.approx(8 / 0.01) and group["hold"] == STEPS and group["seed"] == 11
        assert (group["ess"] * (group["hess_init"] + group["weight_decay"])) ** -0.5 == pytest.approx(0.02)
        assert group["beta2"] == pytest.approx(max(0.9, 1 - 5 / steps))
    assert optimizer.horizon == steps and optimizer.data_size == 8
    assert optimizer.param_groups[1]["start"] == sum(p.numel() for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ivon": {"sigmo": 1}}, "ivon.sigmo"),
        ({"ivon": {"sigma": 0}}, "ivon.sigma must be > 0, got 0"),
        ({"optim": None}, "the section ivon has no meaning without optim: ivon"),
        ({"trainer": {"optim": "ivon"}}, "written at the top level"),
        ({"trainer": {"rollout_ahead": 1}}, "trainer.rollout_ahead = 1"),
        ({"trainer": {"weight_decay": 0.1}}, "ivon.weight_decay"),
        ({"trainer": {"deepspeed": "x.json"}}, "partitions of its own"),
        ({"adapter": {"full": True}}, "leave out adapter.full"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_a_model_is_loaded(
    recipe: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        optimization_of(recipe(**keys))


def test_an_update_takes_in_whole_windows(recipe: Any) -> None:
    config = recipe(ivon={"mc_samples": 3})
    trainer = make_trainer(config, False, optimization_of(config))
    with pytest.raises(UserError, match="must be 1 or a multiple of 2"):
        trainer.create_optimizer()
    config = recipe(ivon={"mc_samples": 5 * STEPS})
    with pytest.raises(
        UserError, match="mc_samples is 10, the run has 8 steps: nothing would ever be updated"
    ):
        make_trainer(config, False, optimization_of(config)).create_optimizer()
    summary = train(recipe("k2", ivon={"sigma": 0.05, "mc_samples": 2 * STEPS}))
    assert summary["steps"] == 8 and summary["posterior"]["updates"] == 2


# --------------------------------------------------------------------------------------------- one draw a window


def test_a_window_is_sampled_scored_and_differentiated_at_one_draw(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[float, ...]]]] = {}
    trained: list[tuple[int, Any, torch.Tensor]] = []
    real_sample, real_score = HFEngine.sample, step_module.score_sequences

    def sample(self: Any, requests: Any, progress: Any = None) -> Any:
        done = real_sample(self, requests, progress)
        for request, completion in zip(requests, done, strict=True):
            sampled.setdefault(tuple(request.prompt_ids), []).append((completion.ids, completion.logps))
        return done

    def score(model: Any, pairs: Any, **keys: Any) -> Any:
        logps, mask = real_score(model, pairs, **keys)
        trained.extend(
            (trainer.state.global_step, p, row.detach().clone()) for p, row in zip(pairs, logps, strict=True)
        )
        return logps, mask

    monkeypatch.setattr(HFEngine, "sample", sample)
    monkeypatch.setattr(step_module, "score_sequences", score)
    config = recipe(preset="jepo", options={}, trainer={"save_strategy": "no", "traces_per_prompt": 12})
    trainer = make_trainer(config, False, optimization_of(config))
    eps: list[torch.Tensor] = []

    def note_eps() -> None:
        group = optimizer_of(trainer).param_groups[0]
        states = [optimizer_of(trainer).state[p] for p in group["params"]]
        whole = [((p.detach() - s["mean"]) * (group["ess"] * s["precision"]).sqrt()).view(-1)
                 for p, s in zip(group["params"], states, strict=True)]  # fmt: skip
        eps.append(torch.cat(whole))

    trainer.add_callback(AtEachStep(note_eps))
    trainer.train()

    assert len(eps) == 2 * STEPS
    torch.testing.assert_close(eps[0], eps[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(eps[2], eps[3], rtol=0, atol=1e-3)
    assert (eps[0] - eps[2]).abs().mean() > 0.5  # two independent normals: 1.13

    compared = apart = 0
    for step, (context, target), row in trained:
        for ids, logps in sampled.get(tuple(context), []):
            if step % STEPS == 0 and tuple(target[: len(ids)]) == ids:
                torch.testing.assert_close(row[: len(ids)], torch.tensor(logps), rtol=0, atol=2e-5)
                compared += 1
            elif step % STEPS and tuple(target[: len(ids)]) == ids:
                apart += bool((row[: len(ids)] - torch.tensor(logps)).abs().max() > 1e-3)
    assert compared >= 6  # of the first step of a window
    assert apart >= 6  # in the second the draw has moved with the mean


def test_the_mean_is_another_model_than_the_draw(recipe: Any) -> None:
    """What the test above would not see if noise were too small to matter."""
    config = recipe()
    trainer = make_trainer(config, False, optimization_of(config))
    trainer.create_optimizer()
    request = [ScoreRequest((5, 6, 7), (8, 9, 10), Law("reasoner"))]
    at_draw = trainer.engine.score(request)[0]
    with optimizer_of(trainer).mean():
        at_mean = trainer.engine.score(request)[0]
    assert trainer.engine.score(request)[0] == at_draw
    assert max(abs(a - b) for a, b in zip(at_draw, at_mean, strict=True)) > 1e-2


# ------------------------------------------------------------------------------------------- what is kept, resuming


def everything(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": [(r["step"], r["phase"], r["loss"], r["grad_norm"], r["bound"]) for r in rows],
        "completions": [path.read_text() for path in sorted((folder / "completions").iterdir())],
        **{
            name: (folder / name).read_bytes()
            for name in (MEAN, "posterior/posterior.safetensors", "posterior/adapter_model.safetensors")
        },
    }


def test_the_mean_is_the_adapter_and_the_posterior_lies_beside_it(recipe: Any, tmp_path: Path) -> None:
    summary = train(recipe())
    folder = tmp_path / "run"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    posterior = Posterior.load(folder / "posterior", base)
    mean, saved = posterior.mean(), load_file(folder / MEAN)
    assert mean.keys() == saved.keys() and all(torch.equal(mean[k], v) for k, v in saved.items())
    assert posterior.origin.base == fingerprint_weights(base) and posterior.origin.data_size == 8
    assert posterior.origin.updates == summary["posterior"]["updates"] == 8
    assert summary["posterior"]["temperature"] == pytest.approx(1e-4)
    assert 0.01 < summary["posterior"]["sigma"] < 0.2
    checkpoint = load_file(folder / "checkpoint-8/reasoner/adapter_model.safetensors")
    assert all(torch.equal(checkpoint[k], v) for k, v in saved.items())  # never a draw on disk
    stock = PeftModel.from_pretrained(base, str(folder / "adapters/reasoner"))
    assert sum(p.abs().sum() for n, p in stock.named_parameters() if "lora_B" in n) > 0


def test_stopped_at_any_step_and_resumed_is_uninterrupted_to_the_bit(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside a window and between two, inside an update (two draws each) and between two."""
    settings = {"ivon": {"sigma": 0.05, "mc_samples": 2 * STEPS}}
    train(recipe("whole", **settings))
    real = run_module.TraceTrainer
    for stop in (2, 3, 5, 6):

        class Stopped(real):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, stop: int = stop, **keys: Any) -> None:
                super().__init__(*args, **keys)
                self.add_callback(StopAfter(stop))  # behind the step, before its checkpoint

        monkeypatch.setattr(run_module, "TraceTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe("stopped", **settings))
    monkeypatch.setattr(run_module, "TraceTrainer", real)
    assert train(recipe("stopped", **settings))["resumed_from"] == "checkpoint-5"
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.parametrize("budget", [None, 400])
def test_killed_before_the_summary_the_posterior_is_written_all_the_same(
    recipe: Any, tmp_path: Path, budget: int | None
) -> None:
    """With the tokens spent nothing is trained any more: the optimiser is read from the checkpoint."""
    config = recipe(trainer={"token_budget": budget})
    first = train(config)
    assert (first["steps"] < 8) == (budget is not None)
    folder = tmp_path / "run"
    before = everything(folder)
    (folder / "summary.json").unlink()
    (folder / "posterior/posterior.safetensors").unlink()
    again = train(config)
    assert again["steps"] == first["steps"] and again["posterior"] == first["posterior"]
    assert everything(folder) == before
