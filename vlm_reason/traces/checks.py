"""What is refused before a run starts: data, sizes and recipes that cannot work together."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from transformers.integrations.integration_utils import get_available_reporting_integrations

from ..engines.processes import check_one_gpu
from ..errors import UserError
from ..tasks.prompts import PromptBuilder
from ..types import Problem
from .config import TraceConfig
from .measure import wants_gold
from .recipe import Phase, Recipe, dealt_counts
from .window import given_traces


def check_devices(args: TraceConfig) -> None:
    """UserError for one process that sees several GPUs: the wrapper that transformers would take (`nn.DataParallel`)
    would take groups apart; and for FSDP2 in a process that no launcher started."""
    check_one_gpu(args.n_gpu)
    if args.fsdp2 and not dist.is_initialized():
        raise UserError(
            "trainer.fsdp2 spreads a model over processes, and this is the only one: start several with accelerate "
            "launch --config_file configs/accelerate/fsdp2.yaml --num_processes N scripts/train.py --config CONFIG, "
            "or set it to false"
        )


def check_reports(args: TraceConfig) -> None:
    """UserError for a tracker that transformers does not know or that is not installed."""
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in installed:
            raise UserError(
                f"trainer.report_to names {name!r}, which is not installed (installed: "
                f"{', '.join(installed) or 'none'}); metrics.jsonl is written in any case"
            )


def check_run(
    recipe: Recipe, problems: Sequence[Problem], args: TraceConfig, traces: int, adapters: bool
) -> None:
    """UserError for the first thing that is wrong. traces: K; adapters: whether there are any (else full weights)."""
    if not problems:
        raise UserError("train_dataset is empty: give at least one problem")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"problem id {problem.id!r} occurs twice in train_dataset; ids must be unique")
        seen.add(problem.id)
    if traces < recipe.least_traces:
        raise UserError(
            f"recipe {recipe.name!r} compares the traces of a problem with one another: trainer.traces_per_prompt (K) "
            f"must be >= {recipe.least_traces}, got {traces}"
        )
    if args.prompts_per_window > len(problems):
        raise UserError(
            f"trainer.prompts_per_window is {args.prompts_per_window}, but there are only {len(problems)} "
            "problems: a window would hold one twice; lower it or raise task.size"
        )
    for phase in recipe.phases:
        if phase.proposal.components:
            dealt_counts(phase.proposal.components, traces)
        bare = [p.id for p in problems if p.metadata.get("rationale") is None]
        if phase.null_group == "dataset" and bare:
            raise UserError(
                f"phase {phase.name!r}: null_group 'dataset' needs a rationale with every problem, and {bare[0]!r} "
                "has none: add a 'rationale' field to the data, or choose null_group skip"
            )
        needs = {c.adapter for c in phase.proposal.components} | set(phase.trains)
        needs |= {"base"} if phase.kl or "logp_ref" in phase.needs else set()
        if not adapters and (missing := sorted(needs - {"reasoner"})):
            raise UserError(
                f"recipe {recipe.name!r} needs {missing[0]!r} beside the reasoner, which full weights do not "
                "have: train with adapters"
            )
    if not adapters and recipe.reset == "base":
        raise UserError(
            f"recipe {recipe.name!r} resets to the base, which full weights no longer have: use adapters"
        )


def check_prompts(
    recipe: Recipe,
    problems: Sequence[Problem],
    prompts: PromptBuilder,
    args: TraceConfig,
    context: int | None,
) -> None:
    """UserError for the first problem that cannot be written as the recipe needs it, or would not fit into the model's
    `context` with the longest trace and answer, before its turn comes."""
    gold = any(phase.targets == "gold" or wants_gold(phase) for phase in recipe.phases)
    given = any(phase.proposal.dataset for phase in recipe.phases)
    sampled = any(phase.proposal.components for phase in recipe.phases)
    hinted = any(_behind_hint(phase) for phase in recipe.phases)
    for problem in problems:
        prior = len(prompts.prior_ids(problem))
        trace = args.max_trace_tokens if sampled else 0
        answer = args.max_answer_tokens if sampled else 0
        if gold:
            answer = max(answer, len(prompts.answer_ids(problem.answer)))
        if given:
            trace = max(trace, *(len(prompts.trace_ids(text)) for text in given_traces(problem)))
        prompt = max(prior, len(prompts.hinted_ids(problem)) - len(prompts.cue_ids) - answer if hinted else 0)
        total = prompt + trace + len(prompts.cue_ids) + answer
        if context is not None and total > context:
            raise UserError(
                f"problem {problem.id!r} may take {total} tokens (prompt {prior}, trace {trace}, cue and answer "
                f"{total - prompt - trace}), and the model's context is {context}: lower trainer.max_trace_tokens or "
                "the shots, or leave long problems out"
            )


def _behind_hint(phase: Phase) -> bool:
    """Whether traces are drawn, scored or trained behind the hinted prompt."""
    drawn = any(component.prompt == "hinted" for component in phase.proposal.components)
    return drawn or phase.null_group == "hint_retry" or "posterior" in phase.trains
