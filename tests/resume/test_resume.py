"""A run killed anywhere and started again equals the run that was never touched, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, adapter_parameters
from vlm_reason.tasks.templates import Shot, Template
from vlm_reason.traces import TraceConfig, TraceTrainer, build
from vlm_reason.traces.checkpoint import STATE_FILE, latest_checkpoint
from vlm_reason.types import Problem

TEMPLATE = Template(
    name="tiny",
    prior="{question}=",
    posterior="{question}={hint}=",
    cue="a:",
    shots=(Shot("1+1", " 1+1", "2"),),
)
PROBLEMS = [Problem(f"p{i}", f"{i}+{i + 1}", str(2 * i + 1)) for i in range(8)]
WINDOW_STEPS = 4  # two steps an epoch, two epochs: most stops fall inside a window


class StopAfter(TrainerCallback):
    """A kill at the worst moment: behind the optimiser step, before anything of it is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer(model, tokenizer, folder, recipe, **args) -> TraceTrainer:
    settings = {
        "prompts_per_window": 4,
        "prompts_per_step": 2,
        "window_epochs": 2,
        "rounds": 2,
        "max_trace_tokens": 12,
        "max_answer_tokens": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "save_total_limit": 2,
        "warmup_steps": 2,
        "use_cpu": True,
        "seed": 11,
    }
    return TraceTrainer(
        copy.deepcopy(model),
        TraceConfig(output_dir=str(folder), **{**settings, **args}),
        recipe,
        PROBLEMS,
        template=TEMPLATE,
        verifier="number",
        tokenizer=tokenizer,
        adapter=AdapterConfig(r=2, alpha=4),
        show_progress=False,
    )


def losses(folder: Path) -> list[tuple[int, float, float | None]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows]


def samples(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "completions").glob("*.jsonl"))]


def weights(t: TraceTrainer) -> dict[str, torch.Tensor]:
    own = {**adapter_parameters(t.model, "reasoner"), **adapter_parameters(t.model, "posterior")}
    return {k: v.detach().clone() for k, v in own.items()}


RECIPES = {
    "vr": ("vr", {"evidence": "logp", "ratio": "none"}, 3),
    "trice": ("trice", {}, 4),  # carries chains from visit to visit
    "rlpr": ("rlpr", {"spread": 0.1, "decay": 0.5}, 3),  # carries a moving average
    "star": ("star", {}, 2),  # starts each round from the base adapter again
    "grpo": ("grpo", {"kl": 0.05}, 3),  # carries old and reference scores in its window
}


@pytest.mark.parametrize("case", sorted(RECIPES))
def test_stopping_at_any_step_changes_nothing(tiny_llama, tiny_tokenizer, tmp_path, case):
    name, options, traces = RECIPES[case]
    recipe = build(name, options)
    whole = trainer(tiny_llama, tiny_tokenizer, tmp_path / "whole", recipe, traces_per_prompt=traces)
    whole.train()
    total = 2 * len(recipe.phases) * WINDOW_STEPS
    assert len(losses(tmp_path / "whole")) == total
    for stop in (2, WINDOW_STEPS, WINDOW_STEPS + 3):
        folder = tmp_path / f"stop{stop}"
        first = trainer(tiny_llama, tiny_tokenizer, folder, recipe, traces_per_prompt=traces)
        first.add_callback(StopAfter(stop))
        with pytest.raises(KeyboardInterrupt):
            first.train()
        found = latest_checkpoint(folder)
        assert found is not None and found.name == f"checkpoint-{stop - 1}"
        second = trainer(tiny_llama, tiny_tokenizer, folder, recipe, traces_per_prompt=traces)
        second.train(resume_from_checkpoint=str(found))
        assert losses(folder) == losses(tmp_path / "whole")
        assert samples(folder) == samples(tmp_path / "whole")
        expected = weights(whole)
        assert all(torch.equal(v, expected[k]) for k, v in weights(second).items())


def test_a_half_written_checkpoint_is_never_picked_up(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    recipe = build("rloo")
    t = trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=2, save_steps=2)
    import vlm_reason.traces.trainer as module

    real, calls = module.save_trace_state, []

    def dies_the_second_time(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(module, "save_trace_state", dies_the_second_time)
    with pytest.raises(OSError, match="No space left"):
        t.train()
    assert not list(tmp_path.glob(".saving-*")) and not (tmp_path / "checkpoint-4").exists()
    (tmp_path / ".saving-4" / "checkpoint-4").mkdir(parents=True)  # what a kill would have left
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-2" and (found / STATE_FILE).is_file()
    assert not (tmp_path / ".saving-4").exists()  # swept


def test_a_checkpoint_of_another_run_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    recipe = build("rloo")
    first = trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=2, save_steps=2)
    first.train()
    other = trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=3)
    with pytest.raises(UserError, match="made with traces_per_prompt = 2, this run has 3"):
        other.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))


def test_a_damaged_checkpoint_says_so(tiny_llama, tiny_tokenizer, tmp_path):
    recipe = build("rloo")
    trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=2, save_steps=2).train()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    (found / STATE_FILE).write_text("{")
    again = trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=2)
    with pytest.raises(UserError, match="cannot be read .* delete it to resume from an earlier one"):
        again.train(resume_from_checkpoint=str(found))


def test_saved_adapters_load_in_stock_peft_with_the_same_logits(tiny_llama, tiny_tokenizer, tmp_path):
    from peft import PeftModel

    recipe = build("jepo")
    base = copy.deepcopy(tiny_llama)
    t = trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, traces_per_prompt=2, save_steps=8)
    t.train()
    found = latest_checkpoint(tmp_path)
    assert found is not None
    stock = PeftModel.from_pretrained(base, found / "reasoner").eval()
    ids = torch.tensor([[5, 9, 17, 4, 8]])
    t.model.eval()
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, t.model(ids).logits)
