"""vlm-reason lm-eval: lm-eval's tasks on one model, a mixture over adapters, or a mixture over rationales."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..atomic import write_atomically
from ..config import apply_overrides, from_dict, to_dict
from ..errors import UserError
from .command import Command, Result
from .output import console, number, table, to_json

if TYPE_CHECKING:
    from ..evaluation.lm_eval import VLMReasonLM

_DESCRIPTION = """\
Run tasks of lm-eval (a YAML file, a name it knows, or reasoning_gym/NAME) and keep what every member
and every rationale said. Needs the extra `eval`: bash scripts/setup.sh eval. Writes OUTPUT/result.json,
OUTPUT/samples (a sample store: vlm-reason report, compare, select read it) and OUTPUT/responses (what
the model said, keyed by its weights: a call that was stopped is finished by repeating it)."""

_EPILOG = """\
keys: model; adapters (members of a posterior: PEFT folders, a folder of them, a glob), mixture
(sequence, token); rationales (N), max_rationale_tokens, rationale_opening, rationale_end, cue, ranker,
answers, on_cut; engine, score, dtype, batch_size, seed; limit, shots, chat, system, generation, include,
problems (of a reasoning-gym generator)

examples:
  vlm-reason lm-eval my_task.yaml -o runs/plain model=smollm2-135m limit=100
  vlm-reason lm-eval arc_easy gsm8k -o runs/bayes model=runs/m adapters=runs/posterior
  vlm-reason lm-eval gsm8k -o runs/latent model=runs/m rationales=8 answers=number shots=0
  vlm-reason lm-eval reasoning_gym/chain_sum -o runs/gym model=smollm2-135m problems=50 --json

The whole of lm-eval's own command, with our models:
  python -m vlm_reason.evaluation.lm_eval run --model vlm-reason --model_args pretrained=... --tasks ..."""


@dataclass(frozen=True)
class LMEvalConfig:
    """The keys of the command; `evaluation.lm_eval` says what each does."""

    model: str
    adapters: tuple[str, ...] | str = ()
    mixture: Literal["sequence", "token"] = "sequence"
    rationales: int = 0
    max_rationale_tokens: int = 128
    rationale_opening: str = "\nReasoning:"
    rationale_end: str = "\n"
    cue: str = "Answer:"
    ranker: str = "mixture"
    answers: str = "text"
    on_cut: Literal["error", "direct"] = "error"
    engine: Literal["hf", "vllm"] = "hf"
    score: Literal["hf", "vllm"] = "hf"
    dtype: str = "auto"
    batch_size: int = 64
    seed: int = 0
    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    include: str | None = None
    problems: int = 100


_OF_RUN = ("limit", "shots", "chat", "system", "generation", "include", "problems", "seed")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", metavar="TASK|key=value", nargs="+", help="tasks to run, and settings (see keys below)"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="where everything is written")


def _run(options: argparse.Namespace) -> Result:
    tasks = [item for item in options.items if "=" not in item]
    settings = apply_overrides({}, [item for item in options.items if "=" in item])
    if not tasks:
        raise UserError("no task: name one, as in `vlm-reason lm-eval my_task.yaml -o OUTPUT model=MODEL`")
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {options.output!r} is a file; give a folder")
    config = from_dict(LMEvalConfig, settings)
    if config.engine == "vllm":
        from ..engines.launch import enter_environment

        enter_environment({"kind": "vllm"})
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..evaluation.lm_eval.run import RunOptions, run

    lm = _model(config, output, progress=not options.quiet)
    chosen = {name: value for name, value in to_dict(config).items() if name in _OF_RUN}
    found = run(lm, tasks, from_dict(RunOptions, {**chosen, "samples": str(output / "samples")}))
    result = {
        "tasks": tasks,
        "settings": to_dict(config),
        "model": lm.get_model_info(),
        "samples": str(output / "samples"),
        **{name: found[name] for name in ("results", "versions", "n-shot", "n-samples", "lm_eval_version")},
    }
    path = output / "result.json"
    write_atomically(path, to_json(result, indent=1) + "\n")
    return {"file": str(path), **result}


def _model(config: LMEvalConfig, output: Path, progress: bool) -> VLMReasonLM:
    from ..evaluation.lm_eval import VLMReasonLM

    settings = {name: value for name, value in vars(config).items() if name not in _OF_RUN or name == "seed"}
    return VLMReasonLM(settings.pop("model"), store=str(output / "responses"), progress=progress, **settings)


def _show(result: Result) -> None:
    out = console()
    rows = []
    for task, metrics in result["results"].items():
        for name, value in metrics.items():
            metric, _, which = name.partition(",")
            if which and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{which}")
                spread = number(error) if isinstance(error, int | float) else "-"
                rows.append([task, metric, which, number(float(value), ".4f"), spread])
    out.print(table("lm-eval's own figures", ["task", "metric", "filter", "value", "se"], rows))
    model = result["model"]
    if model["without_rationale"]:
        out.print(
            f"{model['without_rationale']} items were scored without a rationale: all of theirs were cut"
        )
    out.print(f"written to {result['file']}; samples in {result['samples']}", highlight=False)


COMMAND = Command(
    name="lm-eval",
    help="lm-eval's tasks on a model, a mixture over adapters or over rationales",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="what the model has said is kept: repeat the command to go on",
    takes_config=False,
    settings="items",
)
