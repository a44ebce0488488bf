"""vlm-reason train: optimise the bound a preset names; resumable."""

from __future__ import annotations

import argparse

from . import bayes
from .command import Command, Result
from .optim import optimization_of
from .output import console, number, table
from .wiring import kind_of, read_config

_DESCRIPTION = """\
Train the model of CONFIG by its preset. OUTPUT_DIR gets config.yaml (resolved), metrics.jsonl (a row
a step), completions/, checkpoints, adapters/reasoner and summary.json; with optim=ivon also
posterior/, of which adapters/reasoner is the mean. Stopped at any moment, the same command goes on
from the last checkpoint; once finished, it returns the summary."""

_EPILOG = """\
examples:
  vlm-reason train configs/recipes/vr_gsm8k.yaml
  vlm-reason train configs/recipes/vr_gsm8k.yaml model=Qwen/Qwen2.5-0.5B-Instruct output_dir=runs/qwen
  vlm-reason train recipe.yaml preset=rft trainer.traces_per_prompt=16 trainer.learning_rate=1e-4
  vlm-reason train recipe.yaml optim=ivon ivon.sigma=0.005
  vlm-reason train configs/recipes/bayes_sst2.yaml        a config of kind bayes: as `vlm-reason bayes fit`

In several processes:
  accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 \\
      scripts/train.py --config CONFIG"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _run(options: argparse.Namespace) -> Result:
    if kind_of(options) == "bayes":
        return bayes.run(options)
    config = read_config(options)  # refuses a kind that is not listed here
    match config.kind:
        case "trace":
            from ..traces.run import run_training

            return run_training(config, not options.quiet, optimization_of(config))


def _show(result: Result) -> None:
    if "family" in result:
        return bayes.show_fit(result)
    rows = [(key, _cell(value)) for key, value in result.items() if not isinstance(value, (dict, list))]
    for section in ("last_window", "posterior", "totals"):
        rows += [(f"{section}: {key}", _cell(value)) for key, value in (result.get(section) or {}).items()]
    console().print(table("training", ("", "value"), rows))


def _cell(value: object) -> str:
    return number(value, ".4g") if isinstance(value, float) else "-" if value is None else str(value)


COMMAND = Command(
    name="train",
    help="train a model by a preset; run again to resume",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="the same command goes on from the last checkpoint",
)
