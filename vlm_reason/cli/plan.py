"""vlm-reason plan: seconds, tokens, FLOPs and memory of a run before it starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, from_dict, load_config
from ..errors import UserError
from .command import Command, Result
from .output import console, table

if TYPE_CHECKING:
    from ..planning.cluster import Sharding
    from ..planning.lengths import PromptLengths

_DESCRIPTION = """\
Estimate what `train` would take with CONFIG: a window of each phase and the whole run, by a model of
FLOPs and bytes (docs/scaling.md). No weights are loaded. Without --device, the GPU of this machine or a
2-second measurement of its processor."""

_EPILOG = """\
examples:
  vlm-reason plan configs/recipes/vr_gsm8k.yaml --device h100
  vlm-reason plan configs/recipes/vr_gsm8k.yaml --device h100 --devices 64 --nodes 8 --mean-trace-tokens 180
  vlm-reason plan CONFIG model=configs/models/qwen3-1.7b --prompt-tokens 256 --device h200 --json"""


# written out here: --help imports nothing heavy
SHARDINGS = ("none", "ddp", "zero2", "zero3", "fsdp2")
LAYOUTS = ("padded", "packed", "tree")

LONGEST_PROMPT = 10**9


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="h100, h200, a100, l40s, 4090 or cpu (default: this machine's)")
    add("--devices", type=int, default=1, help="how many in all (default: 1)")
    add("--nodes", type=int, default=1, help="machines they are in (default: 1)")
    add("--sampling-devices", type=int, default=0, help="of these, how many serve engine.mode=server")
    add("--sharding", choices=SHARDINGS, help="of the training (default: the recipe's; ddp)")
    add("--layout", choices=LAYOUTS, help="how rows are laid out (default: tree, as the trainer does)")
    add("--mean-trace-tokens", type=float, metavar="N", help="default: a third of max_trace_tokens")
    add("--mean-answer-tokens", type=float, metavar="N", help="default: the reference answers'")
    add("--prompt-tokens", type=float, metavar="N", help="default: counted on the task's problems")
    add(
        "--live-share",
        type=float,
        default=1.0,
        metavar="P",
        help="share of traces with a coefficient (default: 1)",
    )


def _run(options: argparse.Namespace) -> Result:
    from ..planning.cluster import Cluster
    from ..planning.hardware import device_at_hand, device_named
    from ..planning.model_size import model_size
    from ..planning.plan import TRAINER_LAYOUT, Guess, make_plan, make_scenario
    from ..planning.report import plan_json

    config = from_dict(RunConfig, load_config(options.config, options.overrides))
    guess = Guess(
        options.mean_trace_tokens, options.mean_answer_tokens, options.live_share, options.layout or TRAINER_LAYOUT
    )  # fmt: skip
    cluster = Cluster(
        options.devices,
        options.nodes,
        options.sampling_devices,
        options.sharding or _sharding(config, options.devices - options.sampling_devices),
    )
    size = model_size(config.model)
    prompts = _prompts(config, options.prompt_tokens)
    device = device_named(options.device) if options.device else device_at_hand()
    return plan_json(make_plan(make_scenario(config, size, device, cluster, prompts, guess)))


def _sharding(config: RunConfig, ranks: int) -> Sharding:
    """As `trainer.fsdp2` or `trainer.deepspeed` of the recipe would have it on so many devices that train."""
    from ..traces.run import trace_config

    if ranks == 1:
        return "none"
    args = trace_config(config)
    if args.deepspeed_plugin is not None:
        return "zero3" if args.deepspeed_plugin.zero_stage == 3 else "zero2"
    return "fsdp2" if args.fsdp2 else "ddp"


def _prompts(config: RunConfig, given: float | None) -> PromptLengths:
    """Counted on the task's problems with the model's tokenizer, or as said: then nothing but the config is read."""
    from ..models.load import load_tokenizer
    from ..planning.lengths import PromptLengths, measure_prompts
    from ..tasks.prompts import PromptBuilder
    from ..tasks.resolve import resolve_template
    from ..tasks.sources import TaskSpec, load_problems
    from ..traces.presets import build

    if given is not None:
        if not 0 < given <= LONGEST_PROMPT:
            raise UserError(f"--prompt-tokens must be > 0 and at most {LONGEST_PROMPT}, got {given:g}")
        return PromptLengths(prior=given, hinted=given, cue=4, answer=8)
    try:
        builder = PromptBuilder(load_tokenizer(config.model), resolve_template(config.template), config.shots)
        problems = load_problems(from_dict(TaskSpec, config.task, "task"))
    except UserError as error:
        raise UserError(f"{error} (or say how long prompts are: --prompt-tokens N)") from error
    dataset = any(phase.proposal.dataset for phase in build(config.preset, config.options).phases)
    return measure_prompts(builder, problems, dataset)


def _show(result: Result) -> None:
    run, cluster, out = result["run"], result["cluster"], console()
    device = result["device"]["name"] + (" (measured)" if result["device"]["measured"] else "")
    kind = f"{cluster['sharding']}, {cluster['engine']} engine, {cluster['layout']}"
    rows = [
        ("model", f"{result['model']['name']}, {_count(result['model']['parameters'])} parameters"),
        ("devices", f"{cluster['devices']} x {device}, {kind}"),
        ("steps", f"{run['steps']} in {run['windows']} windows"),
        ("time", f"{_time(run['seconds'])}, {run['device_hours']:.3g} device-hours"),
        ("tokens", ", ".join(f"{_count(run[f'{k}_tokens'])} {k}" for k in ("generated", "scored", "trained"))),
        ("FLOPs", f"{run['flops']:.3g}, {run['utilisation']:.1%} of the peak"),
        ("memory", _memory(result["memory"])),
    ]  # fmt: skip
    out.print(table("plan", ("", "value"), rows))
    kinds = ("generate", "score", "train", "communicate", "optimise", "sync")
    seconds = [(p["name"], *(_time(p["seconds"][k]) for k in (*kinds, "window"))) for p in result["phases"]]
    shares = ("of the run", *(f"{run['where'][k]:.0%}" for k in kinds), "")
    out.print(table("a window of each phase", ("phase", *kinds, "window"), [*seconds, shares]))
    known = [(a["name"], f"{a['value']:.4g}", a["source"]) for a in result["assumptions"]]
    out.print(table("assumed", ("", "value", "from"), known))
    rests = sorted(result["sensitivity"].items(), key=lambda item: -abs(item[1]))
    out.print(
        table("10% more of it changes the time by", ("", "%"), [(n, f"{10 * v:+.1f}") for n, v in rests])
    )
    if result["advice"]:
        advice = [(a["limit"], a["figure"], a["change"]) for a in result["advice"]]
        out.print(table("what binds, and what to change", ("", "how much", "change"), advice))


def _memory(memory: dict[str, Any]) -> str:
    verdict = "fits" if memory["fits"] else "does not fit"
    peaks = (
        f"{memory['training_peak'] / 1e9:.2f} GB training, {memory['sampling_peak'] / 1e9:.2f} GB sampling"
    )
    return f"{peaks}; {verdict} the {memory['usable'] / 1e9:.1f} GB usable on a device"


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 90 else f"{seconds:.3g} s"


COMMAND = Command(
    name="plan",
    help="estimate time, tokens and memory of a run before it starts",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="nothing was written",
)
