"""From a RunConfig to the objects a command needs: problems, prompts, judge, and the model as base or as
trained."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..config import RunConfig, from_dict, load_config
from ..engines.launch import enter_environment
from ..errors import UserError
from .output import note

if TYPE_CHECKING:
    from ..engines.base import Engine
    from ..evaluation import EvalConfig
    from ..store import Judge, Provenance, SampleRecord
    from ..tasks.prompts import PromptBuilder
    from ..types import Problem

System = Literal["base", "trained"]
KINDS = ("trace", "bayes")
SYSTEMS: tuple[System, ...] = ("base", "trained")
ADAPTER_OF: Mapping[System, str | None] = {"base": None, "trained": "reasoner"}


def kind_of(options: argparse.Namespace) -> str:
    """The `kind` of a config that may be trained. UserError for one that there is not."""
    kind = load_config(options.config, options.overrides).get("kind", KINDS[0])
    if kind not in KINDS:
        raise UserError(f"kind: {kind!r} is not one of {', '.join(map(repr, KINDS))}")
    return str(kind)


def read_config(options: argparse.Namespace) -> RunConfig:
    """The config of a command. A process that vLLM is going to run in is started again in the environment it needs."""
    config = from_dict(RunConfig, load_config(options.config, options.overrides))
    enter_environment(config.engine)
    return config


def add_problem_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on",
        choices=("eval_task", "task"),
        default="eval_task",
        help="which section's problems: the held-out ones (default) or those trained on",
    )


def add_system_choice(parser: argparse.ArgumentParser, default: str = "trained if it is there") -> None:
    parser.add_argument(
        "--system",
        choices=SYSTEMS,
        help=f"the base model, or what `train` made in OUTPUT_DIR (default: {default})",
    )


def load_section(config: RunConfig, section: str) -> list[Problem]:
    """The problems of `eval_task` (less those whose question is trained on) or of `task`."""
    from ..tasks.sources import TaskSpec, held_out, load_problems

    data: Mapping[str, Any] | None = getattr(config, section)
    if not data:
        other = "give it, or say --on task" if section == "eval_task" else "give it"
        raise UserError(f"the config has no section {section!r}: {other}")
    problems = load_problems(from_dict(TaskSpec, data, section))
    if section == "eval_task" and config.task:
        kept = held_out(problems, load_problems(from_dict(TaskSpec, config.task, "task")))
        if len(kept) < len(problems):
            note(
                f"{len(problems) - len(kept)} of {len(problems)} held-out problems left out: repeated or trained on"
            )
        problems = kept
    if not problems:
        raise UserError(
            f"every problem of {section!r} is trained on too; a generator with seed s + 1 repeats the problems of "
            "seed s, shifted by one: choose a distant seed"
        )
    return problems


def sampling_config(config: RunConfig, section: str, defaults: Mapping[str, Any]) -> EvalConfig:
    """The section `sampling` or `evaluation` over `defaults`. Caps are those of training unless it says
    otherwise, so that one file serves every command."""
    from ..evaluation import EvalConfig

    data: dict[str, Any] = getattr(config, section)
    if "adapter" in data:
        raise UserError(f"{section}.adapter is chosen by --system {'|'.join(SYSTEMS)}")
    keys = ("max_trace_tokens", "max_answer_tokens")
    caps: dict[str, Any] = {key: config.trainer[key] for key in keys if key in config.trainer}
    return from_dict(EvalConfig, {"seed": config.seed, **caps, **defaults, **data}, section)


@dataclass(frozen=True)
class Served:
    """A model ready to sample. `adapter`: the name of its law, None for the base."""

    system: System
    engine: Engine
    builder: PromptBuilder
    adapter: str | None
    weights: str


def trained_folder(config: RunConfig) -> Path | None:
    """What `train` left in output_dir: adapters/reasoner, or model for full weights; None before."""
    output = Path(config.output_dir)
    for folder, holds in (
        (output / "adapters" / "reasoner", "adapter_model.safetensors"),
        (output / "model", "config.json"),
    ):
        if (folder / holds).is_file():
            return folder
    return None


def default_system(config: RunConfig) -> System:
    return "trained" if trained_folder(config) is not None else "base"


def serve(config: RunConfig, systems: Collection[System]) -> dict[System, Served]:
    """Load the model once (twice for full weights) and serve the named systems from it. UserError when
    `trained` is asked for and nothing was trained."""
    trained = trained_folder(config)
    if "trained" in systems and trained is None:
        raise UserError(
            f"nothing trained in {config.output_dir!r}: run `vlm-reason train` first, or --system base"
        )
    served: dict[System, Served] = {}
    if trained is not None and trained.name == "model":
        sources: dict[System, str] = {"base": config.model, "trained": str(trained)}
        for system in systems:
            served[system] = _load(config, sources[system], None)[system]
    else:
        both = _load(config, config.model, trained if "trained" in systems else None)
        served = {system: both[system] for system in systems}
    return served


def _load(config: RunConfig, source: str, adapter: Path | None) -> dict[System, Served]:
    """Both systems over one model: `base` without its adapter, `trained` with it. Without an adapter the two
    are the same weights, and the caller takes the one that `source` is."""
    from ..engines.make import check_engine, make_engine
    from ..evaluation.members import hash_adapter
    from ..models.adapters import AdapterConfig, add_adapters, load_adapters
    from ..models.load import fingerprint_weights, load_model
    from ..tasks.prompts import PromptBuilder
    from ..tasks.resolve import resolve_template
    from ..traces.run import adapter_config

    check_engine(config.engine, adapter is not None)
    model, tokenizer = load_model(source, dtype=cast(Any, config.dtype))  # it checks the name
    base = trained = fingerprint_weights(model)
    serving: Any = model
    if adapter is not None:
        serving = add_adapters(model, adapter_config(config) or AdapterConfig(), names=("reasoner",))
        load_adapters(serving, adapter.parent, ["reasoner"])
        serving.eval()
        trained = f"{base}+{hash_adapter(adapter)}"
    builder = PromptBuilder(tokenizer, resolve_template(config.template), config.shots)
    engine = make_engine(serving, tokenizer, config.engine)
    return {
        "base": Served("base", engine, builder, ADAPTER_OF["base"], base),
        "trained": Served("trained", engine, builder, ADAPTER_OF["trained"], trained),
    }


def task_judge(config: RunConfig, section: str, builder: PromptBuilder) -> Judge:
    """The config's verifier over the answers of the problems in `section`."""
    from ..evaluation import make_judge
    from ..tasks.sources import TaskSpec
    from ..traces.run import resolve_verifier

    spec = from_dict(TaskSpec, getattr(config, section), section)
    return make_judge(resolve_verifier(config.verifier, spec), builder)


def provenance(served: Served, settings: EvalConfig) -> Provenance:
    """What the store keys the samples of `served` by."""
    from ..evaluation.provenance import provenance_of

    return provenance_of(served.engine, served.builder.fingerprint(), settings, served.weights)


def systems_in(records: Iterable[SampleRecord]) -> tuple[System, ...]:
    """Which systems have samples among the records, base first. Hinted and mixed draws belong to none."""
    there = {record.proposal for record in records}
    return tuple(system for system in SYSTEMS if _proposal(system) in there)


def choose_records(records: Collection[SampleRecord], system: System) -> list[SampleRecord]:
    """The stored samples of one system. UserError when there are none, or when they are not all from one set
    of weights at one temperature (they are then not draws of one law)."""
    kept = [r for r in records if r.proposal == _proposal(system)]
    if not kept:
        there = ", ".join(systems_in(records)) or "none"
        raise UserError(f"no samples of the {system} model in the store (there: {there})")
    for name in ("weights", "temperature", "top_p"):
        values = Counter(getattr(r, name) for r in kept)
        if len(values) > 1:
            listed = ", ".join(f"{value} ({count} samples)" for value, count in sorted(values.items()))
            raise UserError(f"samples of several {name} in the store: {listed}; use an output_dir for each")
    return kept


def _proposal(system: System) -> str:
    return f"{ADAPTER_OF[system] or 'base'}/prior"
