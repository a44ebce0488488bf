"""TraceTrainer: one trainer for every preset, on `transformers.Trainer`.

Features
- A step trains on whole groups (one problem, K traces). It is split into micro-batches of a token budget after all
  coefficients are fixed, so 1 x 8 accumulation equals 8 x 1, and one process equals eight.
- DDP, ZeRO-2, ZeRO-3, FSDP2 (parallel.py); a checkpoint of one goes on under another (docs/distributed.md).
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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from ..atomic import write_atomically
from ..compat.deepspeed import cast_partitioned, join_process_group
from ..engines.base import Engine, EngineLost
from ..engines.make import check_engine, make_engine, needs_model, note
from ..engines.sync import Synced
from ..errors import UserError
from ..models.adapters import (
    AdapterConfig,
    add_adapters,
    reset_adapter,
    trainable,
)
from ..models.load import load_model
from ..models.whole_copy import WholeCopy, skeleton
from ..scoring.logprobs import context_length
from ..tasks.prompts import PromptBuilder
from ..tasks.templates import Template, template_named
from ..tasks.verifiers import Verifier, make_verifier
from ..types import Problem
from .ahead import Ahead, Drawn, check_ahead, gathered, is_whole, own_share
from .checkpoint import (
    TraceState,
    load_trace_state,
    publish,
    save_trace_state,
    truncate_metrics,
)
from .checks import check_devices, check_prompts, check_reports, check_run
from .config import TraceConfig
from .distributed import Ranks, deal_groups, in_lockstep
from .measure import EvidenceFunction
from .order import Place, place_of, step_members, window_problems
from .parallel import shards_weights
from .progress import StepProgress
from .recipe import Recipe, State
from .replay import ChainMemory
from .rowlog import RowLog
from .rows import Row
from .sharded import OptimizerFactory, ShardedTrainer
from .step import Batch, backward_batches, cut_batches
from .window import Window, WindowMaker

DEFAULT_ADAPTER = AdapterConfig()


class _Steps(Dataset):
    """One item an optimiser step. What a step trains on follows from the step's number, not from this."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"step": index}


class TraceTrainer(ShardedTrainer):
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
        optimizer_factory: (parameter groups, args) -> optimiser; default AdamW through `args.optim`.
        engine: what samples and scores; default an HFEngine over `model` with `engine_options`.

    Raises UserError for one process that sees several GPUs, an empty data set, duplicate ids, a problem that the
    template cannot write, a recipe whose components would get no trace, or one that needs a posterior or reference
    where there is none.
    """

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
        config = check_engine(
            engine_options or {}, adapter is not None, args.world_size
        )  # before a model is loaded
        if args.deepspeed_plugin is not None:
            join_process_group()
        if isinstance(model, str):
            where = "cpu" if args.fsdp2 else args.device if args.world_size > 1 else None
            model, tokenizer = load_model(model, dtype, where)  # type: ignore[arg-type]  # it checks the name
        if tokenizer is None:
            raise UserError(
                "TraceTrainer needs the tokenizer of a model that is given as an object: tokenizer=..."
            )
        self.recipe, self.problems = recipe, list(train_dataset)
        self.traces = args.traces_per_prompt or recipe.traces
        check_run(recipe, self.problems, args, self.traces, adapter is not None)
        check_ahead(recipe, args)
        self.adapter = adapter
        if adapter is not None and args.deepspeed_plugin is not None:
            cast_partitioned(model, model.dtype if model.config.dtype is None else model.config.dtype)  # type: ignore[arg-type]  # a dtype once loaded
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
        spread = engine is None and shards_weights(args)
        copied = spread and needs_model(config, args.temperature, args.top_p)
        self._copy = WholeCopy(skeleton(trained, adapter)) if copied else None
        if engine is None:
            sampled = trained if self._copy is None else self._copy.model
            folder = Path(args.output_dir) / "engine"
            engine = make_engine(sampled, tokenizer, engine_options or {}, folder, copied or not spread)
        self.engine = engine
        self.verifier = make_verifier(verifier) if isinstance(verifier, str) else verifier
        self._optimizer_factory = optimizer_factory
        args.max_steps = args.total_steps(recipe)
        super().__init__(
            model=trained, args=args, train_dataset=_Steps(args.max_steps), data_collator=lambda rows: rows[0]
        )
        self.ranks = Ranks.current()
        show_progress = show_progress and self.ranks.main
        if self._copy is not None and self.ranks.main:
            note(
                f"the weights are spread over {self.ranks.size} processes; for each window every process gathers a "
                f"whole copy ({self._copy.bytes / 1e9:.2f} GB) to sample and score with"
            )
        # transformers' own bar prints to stdout, which belongs to --json
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if show_progress:
            self.add_callback(StepProgress(lambda: self._row))
        self.tokenizer = tokenizer
        self.maker = WindowMaker(
            self.engine, args, self.verifier, args.seed, evidence, show_progress, self.ranks
        )
        self.states: list[State] = [{} for _ in recipe.phases]
        self.memory = ChainMemory()
        self.window: Window | None = None
        self._ahead = Ahead()
        self._saving_to: Path | None = None
        self.tokens_used = 0
        self._log = RowLog(Path(args.output_dir) / "metrics.jsonl", self.ranks)
        self._row: dict[str, Any] = {}
        self._share: tuple[Tensor, int] | None = (
            None  # this process's part of the step's loss and padded tokens
        )
        self._step_started = time.perf_counter()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As transformers does. What ends it early (Ctrl-C, an error) also ends what is being drawn ahead, for which
        the process would wait."""
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except BaseException:
            self._ahead.drop(self.engine)
            raise

    # ---- one optimiser step --------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backward of one step's loss, micro-batch by micro-batch; returns the loss."""
        self._step_started = time.perf_counter()
        place = place_of(self.state.global_step, self.args, self.recipe)
        window = self.window
        made = False
        if window is None or window.index != place.window:
            self._enter_round(place)
            self.window = window = self._make_window_or_save(place)
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
        present = {row.adapter for row in rows}
        trained = [name for name in phase.trains if name in present]
        trainable(self.model, trained)
        self.model.train()
        self.parallel.begin(trained)
        cost = backward_batches(
            self.model,
            self._batches([window.rows[g] for g in members]),
            phase,
            groups * self.args.loss_scale,
            self.parallel.backward,
            self.accelerator.autocast,
        )
        self.parallel.finish()
        self._share = cost.loss, cost.forwarded
        self._row = self._metrics(place, window, made, rows, len(members), time.perf_counter() - started)
        return cost.loss * self.ranks.size  # transformers logs the mean over processes

    def _batches(self, groups: Sequence[Sequence[Row]]) -> list[Batch]:
        """What this process runs of a step: whole groups, dealt by tokens."""
        dealt = deal_groups([sum(row.tokens for row in rows) for rows in groups], self.ranks.size)
        cut = [
            cut_batches(self.model, [r for g in own for r in groups[g]], self.args.tokens_per_microbatch)
            for own in (dealt if self.parallel.lockstep else [dealt[self.ranks.rank]])
        ]
        return in_lockstep(cut, self.ranks.rank) if self.parallel.lockstep else cut[0]

    def _make_window_or_save(self, place: Place) -> Window:
        """A window, or a checkpoint of the step before it when what samples went away."""
        try:
            return self._make_window(place)
        except EngineLost:  # it is raised in all processes at once
            self._log.flush()  # a resumed run does not write again the rows of steps before the checkpoint
            self._save_checkpoint(self.model)
            raise

    def _make_window(self, place: Place) -> Window:
        if isinstance(self.engine, Synced):
            engine, version = self.engine, self.state.global_step
            self.ranks.together(lambda: engine.sync(self.model, version))
        phase = self.recipe.phases[place.phase]
        problems, visits, sampling = self._asked(place)
        drawn = self._ahead.window == place.window
        self.model.eval()
        with nullcontext() if self._copy is None else self._copy.filled(self.model):
            window, self.states[place.phase] = self.maker.make(
                place.window,
                place.phase,
                phase,
                problems,
                visits,
                self.traces,
                self.state.global_step,
                self.states[place.phase],
                self.memory,
                sampling,
                self.training_prompts,
                (lambda: self._ahead.take(place.window)) if drawn else None,
            )
            self._draw_ahead(place)
        self.ranks.agree(window.fingerprint(), f"window {place.window}")
        if window.completions and self.ranks.main:
            text = "".join(json.dumps(row) + "\n" for row in window.completions)
            write_atomically(
                Path(self.args.output_dir) / "completions" / f"window_{place.window:05d}.jsonl", text
            )
        return window

    def _asked(self, place: Place) -> tuple[list[Problem], list[int], PromptBuilder]:
        """The problems of a window, their visits, and the prompts that sample it."""
        chosen = window_problems(
            place.window, self.args.prompts_per_window, len(self.problems), self.args.seed
        )
        warm = place.round < self.args.proposal_shot_rounds
        prompts = self.warmup_prompts if warm else self.training_prompts
        return [self.problems[i] for i, _ in chosen], [visit for _, visit in chosen], prompts

    def _draw_ahead(self, place: Place) -> None:
        """Begin to draw the window after `place`'s with the weights as they are."""
        step = (place.window + 1) * self.args.steps_per_window()
        if not self.args.rollout_ahead or step >= self.args.max_steps:
            return
        coming, version = place_of(step, self.args, self.recipe), self.state.global_step
        phase = self.recipe.phases[coming.phase]
        if not phase.proposal.components:
            return
        problems, visits, sampling = self._asked(coming)

        def draw() -> Drawn:
            return self.maker.draw(
                coming.window, phase, problems, visits, self.traces, version, self.memory, sampling
            )

        overlap = isinstance(self.engine, Synced)  # only then has the sampler weights of its own
        if overlap:
            self._ahead.begin(coming.window, draw, overlap)
        else:
            self.ranks.together(lambda: self._ahead.begin(coming.window, draw, overlap))

    def _enter_round(self, place: Place) -> None:
        """`reset: base`: the reasoner starts every round but the first from its initial adapter, moments too."""
        first = place.window % sum(p.windows for p in self.recipe.phases) == 0
        if self.recipe.reset == "base" and place.round > 0 and first and place.position == 0:
            assert self.adapter is not None  # checked at construction
            reset_adapter(self.adapted, "reasoner", self.adapter.seed)
            self.parallel.forget("reasoner")

    def _metrics(
        self,
        place: Place,
        window: Window,
        made: bool,
        rows: Sequence[Row],
        groups: int,
        seconds: float,
    ) -> dict[str, Any]:
        values = dict(window.metrics)
        if not made:  # what the window cost is told once
            for key in (
                "seconds/generate",
                "seconds/waited",
                "seconds/score",
                "seconds/weigh",
                "tokens/generated",
                "tokens/scored",
            ):
                values[key] = 0
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
            "tokens/forwarded": None,  # known when the processes' shares are summed; useful of them likewise
            "useful_tokens": sum(row.useful for row in rows),
        }

    def get_train_dataloader(self) -> DataLoader:
        """Every process sees every step, in order; they share a step's groups, not the steps."""
        return DataLoader(_Steps(self.args.max_steps), batch_size=1, collate_fn=self.data_collator)

    # ---- logs ----------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
                                 learning_rate=None) -> None:  # fmt: skip
        """After each optimiser step (transformers calls it once more at the end of the epoch): write its row."""
        if self._row:
            if not self._row["rows"]:  # DeepSpeed goes on reporting that of the step before
                grad_norm = 0.0
            self._row = {
                "step": self.state.global_step,
                "loss": None,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "learning_rate": learning_rate,
                "seconds": time.perf_counter() - self._step_started,
                **self._row,
            }
            self.tokens_used += sum(self._row[f"tokens/{kind}"] for kind in ("generated", "trained"))
            self._row["tokens_used"] = self.tokens_used
            assert self._share is not None
            self._log.add(self._row, *self._share)
            if self.out_of_tokens:
                self.control.should_training_stop = True
        ends = self.control.should_training_stop or not self._row
        if self.ranks.size == 1 or ends or self.control.should_log or self.control.should_save:
            self._log.flush()
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        self._row = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The step's row goes wherever `report_to` points, beside what transformers logs."""
        extra = {k: v for k, v in self._row.items() if isinstance(v, int | float) and k not in logs}
        super().log({**logs, **extra}, start_time)

    @property
    def out_of_tokens(self) -> bool:
        return self.args.token_budget is not None and self.tokens_used >= self.args.token_budget

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue this run."""
        sizes = (
            "rounds", "prompts_per_window", "prompts_per_step", "window_epochs", "temperature", "top_p", "seed",
            "answer_temperature", "max_trace_tokens", "max_answer_tokens", "shots", "proposal_shots",
            "proposal_shot_rounds", "loss_scale", "rollout_ahead",
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
            ahead = gathered(
                self._ahead.held(), self.ranks
            )  # also waits for the random states of every process
            if self.ranks.main:
                state = TraceState(self.window, self.states, self.memory, self.tokens_used, ahead)
                save_trace_state(staging / name, state, self.identity())
                publish(staging / name, output_dir / name)
        finally:
            self._saving_to = None
            if self.ranks.main:
                shutil.rmtree(staging, ignore_errors=True)
        if self.ranks.main:
            self._rotate(output_dir)
        self.ranks.wait()

    def _rotate(self, output_dir: Path) -> None:
        rotate_checkpoints(
            output_dir=str(output_dir), save_total_limit=self.args.save_total_limit, use_mtime=False
        )

    def load_checkpoint(self, checkpoint: str | Path) -> None:
        """Weights and trace state of `checkpoint`, without training on. UserError when it is another run's."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = int(Path(checkpoint).name.rsplit("-", 1)[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = load_trace_state(resume_from_checkpoint, self.identity(), self.problems)
        self.window, self.states, self.memory = state.window, state.presets, state.chains
        self.tokens_used = state.tokens_used
        if state.ahead is not None and is_whole(state.ahead, self.args.prompts_per_window):
            self._ahead.put(own_share(state.ahead, self.ranks))
        step = int(Path(resume_from_checkpoint).name.rsplit("-", 1)[1])
        if self.ranks.main:
            truncate_metrics(Path(self.args.output_dir) / "metrics.jsonl", step)
