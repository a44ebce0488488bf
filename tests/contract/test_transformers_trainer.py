"""What our trainers rely on in `transformers.Trainer`, private methods included.

A new transformers that changes one of these facts fails here, with a line saying which fact, before it can change a
loss or a checkpoint silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from vlm_reason.traces import TraceTrainer
from vlm_reason.traces.sharded import ShardedTrainer
from vlm_reason.weights.training import AdapterTrainer

SIGNATURES: dict[Callable[..., Any], str] = {
    Trainer.train: "self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None",
    Trainer.training_step: "self, model, inputs, num_items_in_batch=None",
    Trainer.create_optimizer: "self, model=None",
    Trainer.log: "self, logs, start_time=None",
    Trainer._maybe_log_save_evaluate: (
        "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None"
    ),
    Trainer._get_output_dir: "self, trial",
    Trainer._save_checkpoint: "self, model, trial",
    Trainer._save: "self, output_dir=None, state_dict=None",
    Trainer._load_from_checkpoint: "self, resume_from_checkpoint, model=None",
    Trainer.save_model: "self, output_dir=None, _internal_call=False",
    Trainer._save_optimizer_and_scheduler: "self, output_dir",
    Trainer._load_optimizer_and_scheduler: "self, checkpoint",
    Trainer.get_train_dataloader: "self",
    Trainer._clip_grad_norm: "self, model",
    Trainer.floating_point_ops: "self, inputs",
    Trainer._move_model_to_device: "self, model, device",
    Trainer._wrap_model: "self, model, training=True, dataloader=None",
    Trainer._prepare_for_training: "self, max_steps, train_dataloader, resume_from_checkpoint",
    rotate_checkpoints: (
        "output_dir, save_total_limit=None, best_model_checkpoint=None, use_mtime=False, "
        "checkpoint_prefix='checkpoint'"
    ),
}
OURS = (TraceTrainer, ShardedTrainer, AdapterTrainer)
PYTHON_OWN = {"__init__", "__module__", "__doc__", "__annotations__"}


def parameters(function: Callable[..., Any]) -> str:
    """The parameter list without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures_are_the_ones_overridden_and_called(function):
    assert parameters(function) == SIGNATURES[function], (
        f"transformers changed the parameters of {function.__qualname__}: adapt our trainers, then this pin"
    )


def test_every_override_is_pinned():
    """An override that transformers does not have (any more) is never called; one not listed above is not guarded."""
    own = {name for ours in OURS for name in vars(ours) if name not in PYTHON_OWN}
    overridden = {name for name in own if hasattr(Trainer, name)}
    pinned = {f.__name__ for f in SIGNATURES if f is not rotate_checkpoints}
    assert overridden == pinned, "our trainers override something else than what this file pins"
    for trainer, name in product(OURS, sorted(overridden)):
        ours = list(inspect.signature(getattr(trainer, name)).parameters)
        theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert ours == theirs, f"{trainer.__name__}.{name} takes other arguments than transformers passes"


# ---- the loop, watched ---------------------------------------------------------------------------------------


class Steps(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"step": index}


class TwoHalves(nn.Module):
    """`a` is trained on even steps, `b` on odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, step: int) -> torch.Tensor:
        return (self.a if step % 2 == 0 else self.b).square().sum()


class Watched(Trainer):
    """Overrides what TraceTrainer overrides and writes down who called what, when."""

    def __init__(self, folder: Path, **args: Any) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.grads_left: list[bool] = []
        self.returned: list[float] = []
        self.running: list[float] = []
        self.staging: Path | None = None
        settings = TrainingArguments(
            output_dir=str(folder),
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 1,
                "logging_steps": 2,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
                "remove_unused_columns": False,
                **args,
            },
        )
        super().__init__(
            model=TwoHalves(), args=settings, train_dataset=Steps(), data_collator=lambda rows: rows[0]
        )
        self.remove_callback(PrinterCallback)
        events = self.events

        class Ends(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                events.append(("step_end", state.global_step))

        self.add_callback(Ends())

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.events.append(("training_step", self.state.global_step))
        self.grads_left.append(any(p.grad is not None for p in model.parameters()))
        loss = self.model(self.state.global_step)
        self.accelerator.backward(loss)
        self.returned.append(float(loss.detach()))
        return loss.detach()

    def create_optimizer(self, model=None):
        self.events.append(("create_optimizer",))
        return super().create_optimizer(model)

    def _maybe_log_save_evaluate(self, tr_loss, *rest, **more):
        self.events.append(("maybe_log", self.state.global_step))
        self.running.append(float(tr_loss))
        super()._maybe_log_save_evaluate(tr_loss, *rest, **more)
        self.running.append(float(tr_loss))

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.events.append(("log", self.state.global_step))
        super().log(logs, start_time)

    def _get_output_dir(self, trial):
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        self.events.append(("save", self.state.global_step))
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        self.events.append(("_save", output_dir))
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.events.append(("load", resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def test_one_training_step_an_optimiser_step_then_the_log_then_the_checkpoint(tmp_path):
    trainer = Watched(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    assert trainer.events == [], (
        "the optimiser is now created before train(): adapters would not be frozen yet"
    )
    trainer.train()
    folder = str(tmp_path / "checkpoint-2")
    assert trainer.events[:1] == [("create_optimizer",)]
    assert trainer.events[1:] == [
        ("training_step", 0),
        ("step_end", 1),
        ("maybe_log", 1),
        ("training_step", 1),
        ("step_end", 2),
        ("maybe_log", 2),
        ("log", 2),
        ("save", 2),
        ("_save", folder),
        ("maybe_log", 2),  # once more at the end of the epoch
    ], "the order of a step changed: metrics rows and checkpoints are written on it"


def test_the_running_loss_is_the_sum_of_what_training_step_returned_since_the_last_log(tmp_path):
    trainer = Watched(tmp_path)
    trainer.train()
    expected, held = [], 0.0
    for step, loss in enumerate(trainer.returned, start=1):
        held += loss
        after = 0.0 if step % 2 == 0 else held  # drained at each log
        expected += [held, after]
        held = after
    expected += [held, held]
    assert trainer.running == pytest.approx(expected), (
        "tr_loss no longer accumulates as metrics.jsonl reads it"
    )


def test_gradients_are_none_when_a_step_begins(tmp_path):
    """Zeros instead would let AdamW's moments decay in the adapter that a phase does not train."""
    trainer = Watched(tmp_path)
    trainer.train()
    assert trainer.grads_left == [False] * 6, "zero_grad no longer sets gradients to None"


def test_the_optimiser_that_is_already_there_is_kept(tmp_path):
    trainer = Watched(tmp_path, max_steps=1)
    trainer.optimizer = mine = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.train()
    assert trainer.optimizer.optimizer is mine, "create_optimizer now replaces a given optimiser"


def test_only_parameters_that_require_grad_at_the_start_are_optimised(tmp_path):
    trainer = Watched(tmp_path, max_steps=1)
    trainer.model.b.requires_grad_(False)
    trainer.train()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert [p is trainer.model.a for p in held] == [True]


def test_the_bars_that_print_to_stdout_are_the_two_that_are_removed(tmp_path):
    class Plain(Watched):
        def remove_callback(self, callback):
            pass

    def names(**args: Any) -> set[str]:
        return {type(c).__name__ for c in Plain(tmp_path, **args).callback_handler.callbacks} - {"Ends"}

    assert names() == {"DefaultFlowCallback", PrinterCallback.__name__}
    assert names(disable_tqdm=False) == {"DefaultFlowCallback", ProgressCallback.__name__}


def test_the_model_is_moved_in_one_place_only(tmp_path, monkeypatch):
    """AdapterTrainer overrides it, as training runs where the model is."""
    moved: list[str] = []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *args, **keys: moved.append("to") or to(self, *args, **keys)
    )

    class Still(Watched):
        def _move_model_to_device(self, model, device):
            moved.append("asked")

        _prepare_for_training = (
            AdapterTrainer._prepare_for_training
        )  # the accelerator's wrapper moves it as well

    trainer = Still(tmp_path, max_steps=1)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.train()
    assert moved == ["asked"], "the trainer moves the model elsewhere as well"


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_a_checkpoint_lies_wholly_below_the_output_dir_it_asks_for(tmp_path):
    out, staging = tmp_path / "out", tmp_path / "staging"
    trainer = Watched(out, max_steps=1)
    trainer.train()
    before = sorted(out.rglob("*"))
    trainer.staging = staging
    trainer._save_checkpoint(trainer.model, None)
    written = {str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file()}
    assert written == {
        f"checkpoint-1/{name}"
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                     "training_args.bin")
    }, "a checkpoint holds other files: look whether all of the run's state is still in it"  # fmt: skip
    assert sorted(out.rglob("*")) == before, "part of a checkpoint bypasses _get_output_dir and is not atomic"


def test_saving_rotates_the_asked_for_folder_only(tmp_path):
    """TraceTrainer saves into a staging folder, so it has to rotate the real one itself."""
    out, staging = tmp_path / "out", tmp_path / "staging"
    for step in (1, 2, 3):
        (out / f"checkpoint-{step}").mkdir(parents=True)
    trainer = Watched(out, max_steps=4, save_total_limit=1)
    trainer.train()
    trainer.staging = staging
    trainer._save_checkpoint(trainer.model, None)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_rotation_keeps_the_newest_and_nothing_without_a_limit_goes(tmp_path):
    import os

    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (step, step))
    (tmp_path / ".saving-12").mkdir()
    rotate_checkpoints(output_dir=str(tmp_path), save_total_limit=None, use_mtime=True)
    assert len(list(tmp_path.iterdir())) == 4
    rotate_checkpoints(output_dir=str(tmp_path), save_total_limit=2, use_mtime=True)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10", ".saving-12"}


def test_resuming_loads_once_before_the_first_step_and_goes_on_at_the_next(tmp_path):
    first = Watched(tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    second = Watched(tmp_path, save_strategy="no")
    folder = str(tmp_path / "checkpoint-4")
    second.train(resume_from_checkpoint=folder)
    assert second.events[:2] == [("load", folder), ("create_optimizer",)], (
        "resuming no longer loads the model (and with it the trace state) first"
    )
    assert [e for e in second.events if e[0] == "training_step"] == [
        ("training_step", 4),
        ("training_step", 5),
    ]
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)
    own = [s["exp_avg"] for s in first.optimizer.state.values()]
    resumed = [s["exp_avg"] for s in second.optimizer.state.values()]
    assert all(torch.equal(x, y) for x, y in zip(own, resumed, strict=True))
