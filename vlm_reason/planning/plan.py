"""From a config to seconds, tokens, FLOPs and memory: a window of each phase, then the whole run.

    window = generate + score + sync + steps * (train + communicate + optimise)
             (generation runs beside the rest where other devices sample and rollouts are drawn one window ahead)

Whole groups are dealt to devices, so the slowest one has ceil(groups / devices) of them and the others wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import RunConfig
from ..errors import UserError, nearest
from ..models.load import DTYPES
from ..traces.ahead import check_ahead
from ..traces.config import TraceConfig
from ..traces.presets import build
from ..traces.recipe import Recipe
from ..traces.run import adapter_config, trace_config
from .cluster import Cluster, gather_seconds, gradient_seconds, sync_seconds
from .engine import EngineShape, engine_shape
from .hardware import Device
from .lengths import CAP_SHARE, PromptLengths, TextLength
from .memory import Memory, peak_memory
from .model_size import ModelSize
from .step_cost import Cost, Sampler, Setup, generate, optimiser_seconds, score, train
from .workload import LAYOUTS, Layout, PhaseWork, phase_work, total_tokens

TRAINER_LAYOUT: Layout = "tree"
"""How the trainer and the hf engine lay rows out, where the model's attention can express it (scoring/tree.py)."""


@dataclass(frozen=True)
class Guess:
    """What only the run itself will tell. trace_tokens: mean; None takes CAP_SHARE of the cap. live_share: share of
    traces whose coefficients are not 0."""

    trace_tokens: float | None = None
    answer_tokens: float | None = None
    live_share: float = 1.0
    layout: Layout = TRAINER_LAYOUT

    def __post_init__(self) -> None:
        if not 0 < self.live_share <= 1:
            raise UserError(f"the share of live traces must be in (0, 1], got {self.live_share}")
        for name in ("trace_tokens", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"mean {name.replace('_', ' ')} must be > 0, got {value}")
        if self.layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")


@dataclass(frozen=True)
class Scenario:
    """Everything a plan is computed from."""

    config: RunConfig
    recipe: Recipe
    args: TraceConfig
    setup: Setup
    cluster: Cluster
    engine: EngineShape
    prompts: PromptLengths
    trace: TextLength
    answer: TextLength
    guess: Guess

    @property
    def traces(self) -> int:
        return self.args.traces_per_prompt or self.recipe.traces

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.engine.batch, self.engine.kind == "vllm", self.cluster.tensor_parallel)


@dataclass(frozen=True)
class PhasePlan:
    """One window. Seconds of wall clock; tokens and FLOPs of all devices together."""

    work: PhaseWork
    steps: int
    generate: float
    score: float
    train: float
    communicate: float
    optimise: float
    sync: float
    window: float
    floor: float
    host_generate: float
    generated_tokens: float
    scored_tokens: float
    trained_tokens: float
    generate_flops: float
    score_flops: float
    train_flops: float
    largest_batch: float


@dataclass(frozen=True)
class Plan:
    """The whole run, and what it was computed from."""

    scenario: Scenario
    phases: tuple[PhasePlan, ...]
    memory: Memory

    @property
    def windows(self) -> int:
        return self.scenario.args.rounds * sum(p.work.windows for p in self.phases)

    @property
    def steps(self) -> int:
        return self.scenario.args.total_steps(self.scenario.recipe)

    def total(self, value: Callable[[PhasePlan], float]) -> float:
        """Sum of a window's `value` over all windows of the run."""
        return self.scenario.args.rounds * sum(p.work.windows * value(p) for p in self.phases)

    @property
    def seconds(self) -> float:
        return self.total(lambda p: p.window)

    @property
    def device_hours(self) -> float:
        return self.seconds * self.scenario.cluster.devices / 3600

    @property
    def flops(self) -> float:
        return self.total(lambda p: p.generate_flops + p.score_flops + p.train_flops)

    @property
    def utilisation(self) -> float:
        """FLOPs done over those of all devices' data-sheet peak in that time."""
        setup = self.scenario.setup
        peak = setup.device.peak(setup.dtype) * self.scenario.cluster.devices
        return self.flops / (self.seconds * peak)


def make_scenario(
    config: RunConfig,
    size: ModelSize,
    device: Device,
    cluster: Cluster,
    prompts: PromptLengths,
    guess: Guess,
) -> Scenario:
    """UserError for whatever is wrong with the config, as training would refuse it."""
    args, recipe, adapter = trace_config(config), build(config.preset, config.options), adapter_config(config)
    check_ahead(recipe, args)
    engine = engine_shape(config.engine)
    cluster = _with_engine(cluster, engine)
    trace = _trace_length(args, guess)
    answer = _answer_length(args, guess, prompts)
    setup = Setup(
        size=size,
        device=device,
        dtype="bfloat16" if args.bf16 else _dtype(config.dtype),
        adapter=size.adapter_parameters(adapter) if adapter else 0,
        adapted=size.adapted(adapter) if adapter else (),
        layout=guess.layout,
        budget=args.tokens_per_microbatch,
        score_budget=engine.score_tokens,
        recompute="full" if args.gradient_checkpointing else "none",
    )
    return Scenario(
        config, recipe, args, setup, cluster, engine, prompts, trace,
        answer, guess,
    )  # fmt: skip


def make_plan(scenario: Scenario) -> Plan:
    args, guess = scenario.args, scenario.guess
    works = [
        phase_work(
            phase, args, scenario.traces, scenario.prompts, scenario.trace, scenario.answer,
            guess.live_share, prefix_cache=scenario.engine.kind == "vllm",
        )
        for phase in scenario.recipe.phases
    ]  # fmt: skip
    phases = tuple(_plan_phase(scenario, work) for work in works)
    draws = tuple(d for work in works for d in work.draws)
    slots = max((p.largest_batch for p in phases), default=0.0)
    memory = peak_memory(scenario.setup, scenario.cluster, scenario.sampler, draws, slots)
    return Plan(scenario, phases, memory)


def _plan_phase(scenario: Scenario, work: PhaseWork) -> PhasePlan:
    args, setup, cluster = scenario.args, scenario.setup, scenario.cluster
    drawn = _generate(scenario, work)
    in_window, in_step = args.prompts_per_window, args.prompts_per_step
    of_rank = math.ceil(in_window / cluster.ranks)
    scores = [score(setup, rows, min(of_rank, rows.groups)) for rows in work.scored]
    gather = gather_seconds(cluster, setup, training=False)
    scored = sum(c.seconds + max(0.0, c.batches * gather - c.seconds) for c in scores)

    steps = args.steps_per_window()
    of_rank = min(math.ceil(in_step / cluster.ranks), in_window)
    costs = [train(setup, rows, of_rank) for rows in work.trained]
    gather = gather_seconds(cluster, setup, training=True)
    exposed = sum(max(0.0, c.batches * gather - c.seconds) for c in costs)
    communicate = exposed + gradient_seconds(cluster, setup)
    shards = 1 if cluster.sharding in ("none", "ddp") else cluster.ranks
    trained = sum(c.seconds for c in costs)
    optimise = optimiser_seconds(setup, shards) * max(1, len(work.trains))
    engine = scenario.engine
    sync = sync_seconds(cluster, setup, engine.kind == "hf", engine.adapter_only)
    train_all = steps * (trained + communicate + optimise)
    beside = cluster.samplers > 0 and args.rollout_ahead > 0
    busy = max(drawn.seconds, scored + train_all) if beside else drawn.seconds + scored + train_all
    return PhasePlan(
        work=work,
        steps=steps,
        generate=drawn.seconds,
        score=scored,
        train=steps * trained,
        communicate=steps * communicate,
        optimise=steps * optimise,
        sync=sync,
        window=busy + sync,
        floor=drawn.floor,
        host_generate=drawn.host,
        generated_tokens=sum(d.sequences * d.length.mean for d in work.draws),
        scored_tokens=total_tokens(work.scored, setup.layout),
        trained_tokens=total_tokens(work.trained, setup.layout) * args.window_epochs,
        generate_flops=drawn.flops * in_window / math.ceil(in_window / cluster.engines),
        score_flops=sum(c.flops for c in scores) * in_window / math.ceil(in_window / cluster.ranks),
        train_flops=steps * sum(c.flops for c in costs) * in_step / of_rank,
        largest_batch=max((c.tokens / max(c.batches, 1) for c in costs), default=0.0),
    )


def _generate(scenario: Scenario, work: PhaseWork) -> Cost:
    """The engine with most groups."""
    cluster, setup = scenario.cluster, scenario.setup
    groups = scenario.args.prompts_per_window
    share = math.ceil(groups / cluster.engines) / groups
    total = Cost()
    for draws in work.draws:
        total = total + generate(setup, scenario.sampler, draws, draws.prompts * share)
    return total


def _with_engine(cluster: Cluster, engine: EngineShape) -> Cluster:
    """The cluster with the engine's tensor parallelism. UserError where the two do not go together."""
    if engine.separate and not cluster.samplers:
        raise UserError(
            "engine.mode server samples on devices of its own: say how many, --sampling-devices N"
        )
    if cluster.samplers and not engine.separate:
        raise UserError(
            f"{cluster.samplers} devices only sample, but the {engine.kind} engine runs in the training processes: "
            "engine.kind=vllm engine.mode=server serves from devices of its own"
        )
    return replace(cluster, tensor_parallel=engine.tensor_parallel)


def _trace_length(args: TraceConfig, guess: Guess) -> TextLength:
    cap = args.max_trace_tokens
    mean = guess.trace_tokens if guess.trace_tokens is not None else max(1.0, cap * CAP_SHARE)
    if mean > cap:
        raise UserError(f"a mean of {mean:g} trace tokens exceeds trainer.max_trace_tokens = {cap}")
    return TextLength(mean, cap)


def _answer_length(args: TraceConfig, guess: Guess, prompts: PromptLengths) -> TextLength:
    """Reference answers may be longer than the cap; what is said to be the mean may not."""
    cap = args.max_answer_tokens
    if guess.answer_tokens is not None and guess.answer_tokens > cap:
        raise UserError(
            f"a mean of {guess.answer_tokens:g} answer tokens exceeds trainer.max_answer_tokens = {cap}"
        )
    return TextLength(min(guess.answer_tokens or prompts.answer, cap), cap)


def _dtype(name: str) -> str:
    """`auto` is the dtype the weights are stored in, bf16 for every current model."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return "bfloat16" if name == "auto" else name


def scaled(scenario: Scenario, name: str, factor: float) -> Scenario:
    """The scenario with one assumption multiplied: to see how much the answer rests on it."""
    if name == "mean trace tokens":
        return replace(scenario, trace=replace(scenario.trace, mean=scenario.trace.mean * factor))
    if name == "share of live traces":
        return replace(scenario, guess=replace(scenario.guess, live_share=scenario.guess.live_share * factor))
    device = scenario.setup.device
    if name == "rate of matrix products":
        device = replace(device, gemm_share=device.gemm_share * factor)
    elif name == "memory bandwidth":
        device = replace(device, bandwidth_share=device.bandwidth_share * factor)
    elif name == "host operations":
        device = replace(device, dispatch=device.dispatch * factor)
    else:
        raise AssertionError(name)
    return replace(scenario, setup=replace(scenario.setup, device=device))


ASSUMPTIONS = (
    "mean trace tokens", "share of live traces", "rate of matrix products", "memory bandwidth", "host operations",
)  # fmt: skip


def sensitivity(plan: Plan) -> dict[str, float]:
    """d log seconds / d log assumption, by a 10% decrease: 1 where the run takes 10% less with 10% less of it."""
    out = {}
    for name in ASSUMPTIONS:
        changed = make_plan(scaled(plan.scenario, name, 0.9))
        out[name] = math.log(changed.seconds / plan.seconds) / math.log(0.9)
    return out
