"""What a planned run saturates on, and what to change. Each rule reads figures of the plan and says them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter

from .cluster import SPLIT_WEIGHTS
from .memory import USABLE
from .plan import Plan
from .workload import total_tokens

GB = 1e9


@dataclass(frozen=True)
class Advice:
    """limit: what binds, in a word or two; figure: how much; change: what to do."""

    limit: str
    figure: str
    change: str


def advise(plan: Plan) -> list[Advice]:
    """The rules that apply, most pressing first."""
    rules = (_memory, _idle_ranks, _longest_trace, _host, _gather, _gradients, _sync, _layout, _few_steps)
    return [advice for rule in rules if (advice := rule(plan)) is not None]


def where_time_goes(plan: Plan) -> dict[str, float]:
    """Share of the wall clock by kind of work; they add to more than 1 where generation runs beside training."""
    kinds = ("generate", "score", "train", "communicate", "optimise", "sync")
    return {kind: plan.total(attrgetter(kind)) / plan.seconds for kind in kinds}


def _memory(plan: Plan) -> Advice | None:
    memory, setup, cluster = plan.memory, plan.scenario.setup, plan.scenario.cluster
    room = USABLE * setup.device.memory
    if memory.peak <= room:
        return None
    changes = []
    if memory.training_peak > room:
        if setup.recompute == "none":
            changes.append("trainer.gradient_checkpointing=true")
        if memory.activations > memory.state:
            changes.append("a smaller trainer.tokens_per_microbatch")
        if cluster.sharding not in SPLIT_WEIGHTS:
            changes.append("--sharding fsdp2 over more devices")
        elif memory.state > room:
            changes.append("more devices")
        if not setup.adapter:
            changes.append("adapters instead of full weights")
    if memory.sampling_peak > room:
        changes.append("fewer texts drawn together, or an engine over more devices (tensor parallel)")
    figure = f"{memory.peak / GB:.1f} GB a device, {room / GB:.1f} GB usable"
    return Advice("memory", figure, "; ".join(changes))


def _idle_ranks(plan: Plan) -> Advice | None:
    groups, ranks = plan.scenario.args.prompts_per_step, plan.scenario.cluster.ranks
    used = groups / (ranks * math.ceil(groups / ranks))
    if used > 0.9:
        return None
    return Advice(
        "groups a rank",
        f"{groups} groups a step over {ranks} ranks keep {used:.0%} of them busy; a group is never split",
        f"trainer.prompts_per_step={ranks * math.ceil(groups / ranks)} (and a larger learning rate, as far as the "
        "critical batch size allows), or fewer devices",
    )


def _longest_trace(plan: Plan) -> Advice | None:
    generate, floor = plan.total(lambda p: p.generate), plan.total(lambda p: p.floor)
    if generate < 0.3 * plan.seconds or floor < 0.5 * generate:
        return None
    return Advice(
        "longest trace",
        f"{floor / generate:.0%} of generation is the decode of the longest trace, which no device shortens",
        "more prompts a window on the same devices, a lower trainer.max_trace_tokens, fewer sampling devices, or "
        "generation one window ahead of training",
    )


def _host(plan: Plan) -> Advice | None:
    generate, host = plan.total(lambda p: p.generate), plan.total(lambda p: p.host_generate)
    if not plan.scenario.setup.device.asynchronous or host < 0.7 * generate or generate < 0.2 * plan.seconds:
        return None
    return Advice(
        "host",
        f"{min(1.0, host / generate):.0%} of generation is the host starting kernels one by one",
        "engine.kind=vllm, which replays a captured graph; or a larger engine.batch_size",
    )


def _gather(plan: Plan) -> Advice | None:
    return _communication(plan, split=True)


def _gradients(plan: Plan) -> Advice | None:
    return _communication(plan, split=False)


def _communication(plan: Plan, split: bool) -> Advice | None:
    if (plan.scenario.cluster.sharding in SPLIT_WEIGHTS) is not split:
        return None
    share = plan.total(lambda p: p.communicate) / plan.seconds
    if share < 0.1:
        return None
    figure = f"{share:.0%} of the time waits for the wire"
    if split:
        change = "a larger trainer.tokens_per_microbatch: weights travel once a micro-batch; or shard inside a node"
        return Advice("gathering weights", figure, change)
    return Advice("gradient all-reduce", figure, "adapters, more prompts a step, or a faster network")


def _sync(plan: Plan) -> Advice | None:
    share = plan.total(lambda p: p.sync) / plan.seconds
    if share < 0.1:
        return None
    return Advice(
        "weight sync",
        f"{share:.0%} of the time brings new weights to the engines",
        "adapter-only sync, or more prompts a window",
    )


def _layout(plan: Plan) -> Advice | None:
    setup = plan.scenario.setup
    rows = [r for p in plan.phases for r in p.work.trained]
    train = plan.total(lambda p: p.train) / plan.seconds
    now, tree = total_tokens(rows, setup.layout), total_tokens(rows, "tree")
    if not rows or now < 1.25 * tree or train < 0.2:
        return None
    return Advice(
        "shared prefixes",
        f"prompts and traces are forwarded {now / tree:.2f} times as often in training as a prefix tree would",
        "the tree layout, where the model's attention allows it",
    )


def _few_steps(plan: Plan) -> Advice | None:
    if plan.steps >= 50 or plan.scenario.cluster.ranks == 1:
        return None
    return Advice(
        "batch size",
        f"{plan.steps} optimiser steps in all, {plan.scenario.args.prompts_per_step} problems in each",
        "beyond the critical batch size (McCandlish et al. 2018, arXiv 1812.06162) more devices buy nothing: watch the "
        "gain a step before growing prompts_per_step further",
    )
