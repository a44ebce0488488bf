"""TraceTrainer: one trainer for every preset, on `transformers.Trainer`.

Features
- A step trains on whole groups (one problem, K traces). It is split into micro-batches of a token budget after all
  coefficients are fixed, so 1 x 8 accumulation equals 8 x 1.
- Reasoner and posterior are two LoRA adapters on one frozen base, which is the reference. Parameters of the
  adapter that a phase does not train get no gradient, so the optimiser leaves them and their moments alone.
- Samples are functions of (seed, policy version, problem, visit, k, m). With the window in the checkpoint, a run
  killed anywhere continues bit for bit (fp32 on CPU).
- One row of metrics.jsonl per optimiser step; what `report_to` names gets the same row.

It is not built on TRL's GRPOTrainer: that scatters the traces of a prompt over micro-batches and masks whole
traces by default, either of which silently changes a multi-trace bound.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..atomic import write_atomically
from ..engines.base import Engine
from ..engines.make import make_engine
from ..errors import UserError
from ..models.adapters import (
    AdapterConfig,
    adapter_parameters,
    add_adapters,
    load_adapters,
    reset_adapter,
    save_adapters,
    trainable,
    use_adapter,
)
from ..models.load import load_model
from ..scoring.logprobs import context_length, microbatches, score_sequences
from ..tasks.prompts import PromptBuilder
from ..tasks.templates import Template, template_named
from ..tasks.verifiers import Verifier, make_verifier
from ..types import Problem
from .checkpoint import TraceState, load_trace_state, publish, save_trace_state, truncate_metrics
from .checks import check_devices, check_prompts, check_reports, check_run
from .config import TraceConfig
from .measure import EvidenceFunction
from .order import Place, place_of, step_members, window_problems
from .progress import StepProgress
from .recipe import Recipe, State
from .replay import ChainMemory
from .rows import Row, rows_objective
from .window import Window, WindowMaker

OptimizerFactory = Callable[[list[nn.Parameter], TraceConfig], torch.optim.Optimizer]
DEFAULT_ADAPTER = AdapterConfig()


class _Steps(Dataset):
    """One item an optimiser step. What a step trains on follows from the step's number, not from this."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"step": index}


class TraceTrainer(Trainer):
    """Train a reasoning model whose chain of thought is latent, by the method that `recipe` describes.

    Args:
        model: a model, or its name (hub id, folder, or the built-in `smollm2-135m`). A plain model gets two
            adapters; `adapter=None` trains its own weights instead (then there is no posterior and no reference).
        args: sizes, sampling, schedule.
        recipe: what is optimised; `PRESETS[name]`, or your own.
        train_dataset: problems with reference answers.
        template, verifier: how a problem becomes a prompt, and what counts as right.
        tokenizer: of `model`, when that is not a name.
        evidence: your own e(z) for a group, in place of the phases' evidence: K numbers >= 0.
        optimizer_factory: (parameters, args) -> optimiser; default AdamW through `args.optim`.
        engine: what samples and scores; default an HFEngine over `model` with `engine_options`.

    Raises UserError for more than one process or GPU, an empty data set, duplicate ids, a problem that the template
    cannot write, a recipe whose components would get no trace, or one that needs a posterior or reference where there
    is none.
    """

    args: TraceConfig
    model: nn.Module

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TraceConfig,
        recipe: Recipe,
        train_dataset: Sequence[Problem],
        *,
        template: Template | str = "steps",
        verifier: Verifier | str = "number",
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AdapterConfig | None = DEFAULT_ADAPTER,
        dtype: str = "auto",
        evidence: EvidenceFunction | None = None,
        optimizer_factory: OptimizerFactory | None = None,
        engine: Engine | None = None,
        engine_options: Mapping[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        check_devices(args)
        check_reports(args)
        if isinstance(model, str):
            model, tokenizer = load_model(model, dtype=dtype)  # type: ignore[arg-type]  # it checks the name
        if tokenizer is None:
            raise UserError(
                "TraceTrainer needs the tokenizer of a model that is given as an object: tokenizer=..."
            )
        self.recipe, self.problems = recipe, list(train_dataset)
        self.traces = args.traces_per_prompt or recipe.traces
        check_run(recipe, self.problems, args, self.traces, adapter is not None)
        self.adapter = adapter
        trained: nn.Module = model if adapter is None else add_adapters(model, adapter)
        if adapter is None:
            trainable(trained, ["reasoner"])
        self.adapters = ("reasoner", "posterior") if adapter is not None else ("reasoner",)
        # what can be refused is made before transformers makes the output folder
        chosen = template if isinstance(template, Template) else template_named(template)
        self.training_prompts = PromptBuilder(tokenizer, chosen, shots=args.shots)
        self.warmup_prompts = PromptBuilder(tokenizer, chosen, shots=args.proposal_shots)
        check_prompts(recipe, self.problems, self.training_prompts, args, context_length(trained))
        if args.proposal_shot_rounds and args.proposal_shots > args.shots:
            check_prompts(recipe, self.problems, self.warmup_prompts, args, context_length(trained))
        self.engine = engine if engine is not None else make_engine(trained, tokenizer, engine_options or {})
        self.verifier = make_verifier(verifier) if isinstance(verifier, str) else verifier
        self._optimizer_factory = optimizer_factory
        args.max_steps = args.total_steps(recipe)
        super().__init__(
            model=trained, args=args, train_dataset=_Steps(args.max_steps), data_collator=lambda rows: rows[0]
        )
        # transformers' own bar prints to stdout, which belongs to --json
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if show_progress:
            self.add_callback(StepProgress(lambda: self._row))
        self.tokenizer = tokenizer
        self.maker = WindowMaker(self.engine, args, self.verifier, args.seed, evidence, show_progress)
        self.states: list[State] = [{} for _ in recipe.phases]
        self.memory = ChainMemory()
        self.window: Window | None = None
        self._saving_to: Path | None = None
        self._loss_before = 0.0  # what the running loss held when the step began
        self.tokens_used = 0
        self._row: dict[str, Any] = {}
        self._step_started = time.perf_counter()

    @property
    def adapted(self) -> PeftModel:
        """The model with its adapters. Full weights have none: check `adapter` first."""
        assert isinstance(self.model, PeftModel)
        return self.model

    # ---- one optimiser step --------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backward of one step's loss, micro-batch by micro-batch; returns the loss."""
        self._step_started = time.perf_counter()
        place = place_of(self.state.global_step, self.args, self.recipe)
        window = self.window
        made = False
        if window is None or window.index != place.window:
            self._enter_round(place)
            self.window = window = self._make_window(place)
            made = True
        phase = self.recipe.phases[place.phase]
        members = step_members(
            place.position,
            len(window.rows),
            self.args.steps_per_window(),
            self.args.window_epochs,
            place.window,
            self.args.seed,
        )
        rows = [row for g in members for row in window.rows[g]]
        groups = max(1, sum(window.counts[g] for g in members))
        started = time.perf_counter()
        trainable(self.model, phase.trains)
        model.train()
        loss = torch.zeros((), device=self.args.device)
        forwarded = 0
        for adapter, batch in _batches(rows, self.args.tokens_per_microbatch):
            with use_adapter(self.model, adapter):
                logps, _ = score_sequences(model, [(row.context, row.target) for row in batch])
                part = -rows_objective(batch, logps, phase) / (groups * self.args.loss_scale)
                self.accelerator.backward(part)
            loss += part.detach()
            forwarded += len(batch) * max(row.tokens for row in batch)
        self._row = self._metrics(
            place, window, made, rows, len(members), forwarded, time.perf_counter() - started
        )
        return loss

    def _make_window(self, place: Place) -> Window:
        phase = self.recipe.phases[place.phase]
        chosen = window_problems(
            place.window, self.args.prompts_per_window, len(self.problems), self.args.seed
        )
        warm = place.round < self.args.proposal_shot_rounds
        self.model.eval()
        window, self.states[place.phase] = self.maker.make(
            place.window,
            place.phase,
            phase,
            [self.problems[i] for i, _ in chosen],
            [visit for _, visit in chosen],
            self.traces,
            self.state.global_step,
            self.states[place.phase],
            self.memory,
            self.warmup_prompts if warm else self.training_prompts,
            self.training_prompts,
        )
        if window.completions:
            text = "".join(json.dumps(row) + "\n" for row in window.completions)
            write_atomically(
                Path(self.args.output_dir) / "completions" / f"window_{place.window:05d}.jsonl", text
            )
        return window

    def _enter_round(self, place: Place) -> None:
        """`reset: base`: the reasoner starts every round but the first from its initial adapter, moments too."""
        first = place.window % sum(p.windows for p in self.recipe.phases) == 0
        if self.recipe.reset == "base" and place.round > 0 and first and place.position == 0:
            assert (
                self.adapter is not None and self.optimizer is not None
            )  # the one is checked at construction
            reset_adapter(self.adapted, "reasoner", self.adapter.seed)
            for parameter in self._adapter_parameters("reasoner"):
                self.optimizer.state.pop(parameter, None)

    def _adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(adapter_parameters(self.model, name).values())

    def _metrics(
        self,
        place: Place,
        window: Window,
        made: bool,
        rows: Sequence[Row],
        groups: int,
        forwarded: int,
        seconds: float,
    ) -> dict[str, Any]:
        values = dict(window.metrics)
        if not made:  # what the window cost is told once
            for key in (
                "seconds/generate",
                "seconds/score",
                "seconds/weigh",
                "tokens/generated",
                "tokens/scored",
            ):
                values[key] = 0
        useful = sum(row.useful for row in rows)
        return {
            "phase": self.recipe.phases[place.phase].name,
            "round": place.round,
            "window": place.window,
            "position": place.position,
            "groups": groups,
            "rows": len(rows),
            **values,
            "seconds/train": seconds,
            "tokens/trained": sum(row.tokens for row in rows),
            "tokens/forwarded": forwarded,
            "useful_tokens": useful / forwarded if forwarded else None,
        }

    # ---- optimiser -----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Over the parameters of every adapter: phases then choose by giving gradients to some of them only."""
        trainable(self.model, self.adapters)
        if self.optimizer is None and self._optimizer_factory is not None:
            self.optimizer = self._optimizer_factory(
                [p for p in self.model.parameters() if p.requires_grad], self.args
            )
        return super().create_optimizer(model)

    # ---- logs ----------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
                                 learning_rate=None) -> None:  # fmt: skip
        """After each optimiser step (transformers calls it once more at the end of the epoch): write its row."""
        if self._row:
            self._row = {
                "step": self.state.global_step,
                "loss": float(tr_loss) - self._loss_before,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "learning_rate": learning_rate,
                "seconds": time.perf_counter() - self._step_started,
                **self._row,
            }
            self.tokens_used += sum(self._row[f"tokens/{kind}"] for kind in ("generated", "trained"))
            self._row["tokens_used"] = self.tokens_used
            self._append_row(self._row)
            if self.out_of_tokens:
                self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        self._loss_before = float(tr_loss)
        self._row = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The step's row goes wherever `report_to` points, beside what transformers logs."""
        extra = {k: v for k, v in self._row.items() if isinstance(v, int | float) and k not in logs}
        super().log({**logs, **extra}, start_time)

    def _append_row(self, row: dict[str, Any]) -> None:
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as stream:
            stream.write(json.dumps(row) + "\n")

    @property
    def out_of_tokens(self) -> bool:
        return self.args.token_budget is not None and self.tokens_used >= self.args.token_budget

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue this run."""
        sizes = (
            "rounds", "prompts_per_window", "prompts_per_step", "window_epochs", "temperature", "top_p", "seed",
            "answer_temperature", "max_trace_tokens", "max_answer_tokens", "shots", "proposal_shots",
            "proposal_shot_rounds", "loss_scale",
        )  # fmt: skip
        return {
            "recipe": self.recipe.name,
            "traces_per_prompt": self.traces,
            "problems": len(self.problems),
            "prompts": self.training_prompts.fingerprint(),
            **{name: getattr(self.args, name) for name in sizes},
        }

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """As transformers does it, into a folder that gets its name when it is whole. An error (a full disk) takes the
        folder away again: it would be of no use, and it holds the space that is missing."""
        name = f"checkpoint-{self.state.global_step}"
        output_dir = Path(self.args.output_dir)
        staging = output_dir / f".saving-{self.state.global_step}"
        self._saving_to = staging
        try:
            super()._save_checkpoint(model, trial)
            state = TraceState(self.window, self.states, self.memory, self.tokens_used)
            save_trace_state(staging / name, state, self.identity())
            publish(staging / name, output_dir / name)
        finally:
            self._saving_to = None
            shutil.rmtree(staging, ignore_errors=True)
        self._rotate(output_dir)

    def _rotate(self, output_dir: Path) -> None:
        rotate_checkpoints(
            output_dir=str(output_dir), save_total_limit=self.args.save_total_limit, use_mtime=False
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        save_adapters(self.adapted, output_dir or self.args.output_dir)

    def load_checkpoint(self, checkpoint: str | Path) -> None:
        """Weights and trace state of `checkpoint`, without training on. UserError when it is another run's."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = int(Path(checkpoint).name.rsplit("-", 1)[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapters(self.adapted, resume_from_checkpoint)
        state = load_trace_state(resume_from_checkpoint, self.identity())
        self.window, self.states, self.memory = state.window, state.presets, state.chains
        self.tokens_used = state.tokens_used
        step = int(Path(resume_from_checkpoint).name.rsplit("-", 1)[1])
        truncate_metrics(Path(self.args.output_dir) / "metrics.jsonl", step)


def _batches(rows: Sequence[Row], token_budget: int) -> list[tuple[str, list[Row]]]:
    """(adapter, rows) micro-batches: one adapter each, rows of like length together."""
    out = []
    for adapter in sorted({row.adapter for row in rows}, reverse=True):
        mine = [row for row in rows if row.adapter == adapter]
        for batch in microbatches([row.tokens for row in mine], token_budget):
            out.append((adapter, [mine[i] for i in batch]))
    return out
