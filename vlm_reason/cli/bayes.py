"""vlm-reason bayes fit|tfb|laplace|predict|export|merge|inspect: posteriors over the weights of an adapter."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import apply_overrides, from_dict, load_config
from ..errors import UserError
from .command import Command, Result
from .output import console, estimate, number, table

if TYPE_CHECKING:
    from pathlib import Path

    from ..weights.config import BayesConfig

_REPEAT = "the same command goes on from the last checkpoint"


# --------------------------------------------------------------------------------------------------------------- fit

_FIT = """\
Fit a posterior over the weights of an adapter as CONFIG (`kind: bayes`) says, and predict the problems
of its eval_task. OUTPUT_DIR gets config.yaml (resolved), fit.json, posterior/ (a stock PEFT adapter that
holds the mean, and the posterior beside it), predictions.jsonl and summary.json. Stopped at any moment,
the same command goes on from the last checkpoint; once finished, it returns the summary."""

_FIT_EXAMPLES = """\
examples:
  vlm-reason bayes fit configs/recipes/bayes_sst2.yaml task.name=data/sst2 eval_task.name=data/sst2
  vlm-reason bayes fit recipe.yaml method=ivon options.sigma=0.02 output_dir=runs/ivon
  vlm-reason bayes fit recipe.yaml method=ensemble options='{members: 3}' predictive.n=3
  vlm-reason bayes fit recipe.yaml method=temperature options='{method: ivon, split: 0.2}'

In several processes:
  accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 \\
      scripts/train.py --config CONFIG"""


def run(options: argparse.Namespace) -> Result:
    """Of a config of kind bayes; `train` comes here too."""
    from ..weights.config import BayesConfig

    return fit(from_dict(BayesConfig, load_config(options.config, options.overrides)), not options.quiet)


def fit(config: BayesConfig, show_progress: bool) -> Result:
    """Run `config` and measure its predictions."""
    from ..weights.run import run_bayes
    from .bayes_metrics import measure

    return run_bayes(config, show_progress, measure)


def show_fit(result: Result) -> None:
    rows = _metrics(result)
    report = result.get("report") or {}
    keys = ("family", "examples", "steps", "train_nll", "held_out_nll")
    rows += [(key, _cell(report.get(key))) for key in keys]
    rows += [
        (key, _cell(v)) for key, v in (report.get("details") or {}).items() if not isinstance(v, (dict, list))
    ]
    title = f"{result.get('method', '')}: {result['output_dir']}"
    console().print(table(title, ("", "value"), rows))


def _metrics(result: Result) -> list[tuple[str, str]]:
    return [(name, estimate(value)) for name, value in (result.get("metrics") or {}).items()]


# ------------------------------------------------------------------------------------------- posteriors of an adapter

_POST_HOC = """\
%s
ADAPTER is a folder that PEFT wrote, whoever trained it, or a posterior (its mean is taken). DATA is a
config of kind bayes: its task, held_out, eval_task, template, likelihood and predictive are used, its
method, options and adapter are not. The base model is DATA's, else the one that ADAPTER names.
The folder behind -o gets what `vlm-reason bayes fit` writes."""


@dataclass(frozen=True)
class _PostHoc:
    """One method that needs an adapter and data, but no training."""

    method: str
    help: str
    what: str
    example: str

    def command(self) -> Command:
        name = self.method
        return Command(
            name=f"bayes {name}",
            help=self.help,
            description=_POST_HOC % self.what,
            epilog=f"examples:\n  vlm-reason bayes {name} runs/adapter --data recipe.yaml -o runs/{name}\n"
            f"  vlm-reason bayes {name} runs/theirs --data recipe.yaml -o runs/{name} {self.example}",
            add_arguments=_post_hoc_arguments,
            run=self.run,
            show=show_fit,
            after_interrupt="nothing was written but the config; repeat the command",
            takes_config=False,
            settings="overrides",
        )

    def run(self, options: argparse.Namespace) -> Result:
        own = {"method": self.method, "start": options.adapter, "output_dir": options.output}
        return fit(_config(options, options.adapter, own), not options.quiet)


def _config(options: argparse.Namespace, adapter: str | Path, own: Mapping[str, Any]) -> BayesConfig:
    """DATA without how it would fit, `own`, then key=value. The base model is DATA's, else the one of `adapter`."""
    from ..weights.config import BayesConfig
    from ..weights.start import base_model_of

    data = load_config(options.data)
    for key in ("kind", "method", "options", "adapter"):
        data.pop(key, None)
    data = apply_overrides({**data, **own}, options.overrides)
    if "model" not in data:
        data["model"] = base_model_of(adapter)
    return from_dict(BayesConfig, data)


def _post_hoc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter, or of a posterior")
    _data_arguments(parser, "change a key of DATA, or options.*")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="where everything is written")


def _data_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=what)
    parser.add_argument("--data", metavar="CONFIG", required=True, help="config that names the problems")


# ----------------------------------------------------------------------------------------------- predict and export

_POSTERIOR = "folder of a posterior, or of a run that has one"

_PREDICT = """\
Predict the problems of DATA's eval_task with a posterior that was saved, as `vlm-reason bayes fit` does.
DATA is a config of kind bayes: its model, task (its problems are left out), eval_task, template,
likelihood, predictive and seed are used, its method, options and adapter are not. Another base model than
the posterior was fitted on is refused. The folder behind -o gets predictions.jsonl and summary.json;
without it the summary is printed and nothing is written."""

_PREDICT_EXAMPLES = """\
examples:
  vlm-reason bayes predict runs/ivon --data recipe.yaml
  vlm-reason bayes predict runs/ivon --data recipe.yaml eval_task.name=data/other -o runs/ivon_other
  vlm-reason bayes predict runs/ivon/posterior --data recipe.yaml predictive.n=32 predictive.mode=mean"""


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("posterior", metavar="DIR", help=_POSTERIOR)
    _data_arguments(parser, "change a key of DATA")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="new folder of the predictions (default: none)"
    )


def _predict(options: argparse.Namespace) -> Result:
    from ..weights.artefact import posterior_in
    from ..weights.run import predict_with
    from .bayes_metrics import measure

    config = _config(options, posterior_in(options.posterior), {})
    return predict_with(options.posterior, config, options.output, measure)


def _show_predict(result: Result) -> None:
    rows = [*_metrics(result), *((key, _cell(result[key])) for key in ("family", "problems", "seconds"))]
    console().print(table(f"predicted with {result['posterior']}", ("", "value"), rows))
    if result["output"]:
        console().print(f"written to {result['output']}", highlight=False, markup=False)


_EXPORT = """\
Draws of a posterior as plain PEFT adapters: members of suites, LoRAs for vLLM. FOLDER gets draw000,
draw001, ...; the same seed gives the same draws."""

_EXPORT_EXAMPLES = """\
examples:
  vlm-reason bayes export runs/ivon -n 8 --seed 0 -o runs/ivon_draws
  vlm-reason bayes export runs/ivon/posterior -n 8 --antithetic -o runs/pairs"""


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("posterior", metavar="DIR", help=_POSTERIOR)
    parser.add_argument("-n", type=int, default=8, metavar="N", help="how many draws (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument("--antithetic", action="store_true", help="draws in opposite pairs about the mean")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="new folder of the adapters")


def _export(options: argparse.Namespace) -> Result:
    from ..weights.artefact import posterior_in
    from ..weights.posterior import Posterior

    posterior = Posterior.load(posterior_in(options.posterior))
    folders = posterior.export_samples(options.n, options.output, options.seed, options.antithetic)
    return {
        "posterior": options.posterior,
        "family": posterior.family,
        "seed": options.seed,
        "antithetic": options.antithetic,
        "adapters": [str(folder) for folder in folders],
    }


def _show_export(result: Result) -> None:
    for folder in result["adapters"]:
        console().print(folder, highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------- merge

_MERGE = """\
One posterior from those of several tasks: every weight from the tasks that are sure of it. Adapters that
began from different initial A are refused in the space of parameters; space=delta merges the updates of
the layers instead. No data and no model are needed."""

_MERGE_EXAMPLES = """\
keys:
  space      parameters (default) or delta
  alphas     weight of each task, 1 by default: alphas=[1,0.5]
  base       folder of the posterior that was the tasks' prior
  delta0     prior precision of the result
  same_init  true: the adapters began from one A, do not check
  rank       of the result, for space=delta

examples:
  vlm-reason bayes merge runs/a/posterior runs/b/posterior -o runs/merged
  vlm-reason bayes merge runs/a/posterior runs/b/posterior -o runs/merged space=delta alphas=[1,0.5]"""


@dataclass(frozen=True)
class MergeSettings:
    alphas: tuple[float, ...] | None = None
    base: str | None = None
    delta0: float | None = None
    space: str = "parameters"
    same_init: bool = False
    rank: int | None = None


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", metavar="POSTERIOR|key=value", nargs="+", help="folders, and settings (keys below)"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="new folder of the result")


def _merge(options: argparse.Namespace) -> Result:
    from ..config import to_dict
    from ..weights.merging import merge
    from ..weights.posterior import Posterior

    folders = [item for item in options.items if "=" not in item]
    settings = apply_overrides({}, [item for item in options.items if "=" in item])
    s = from_dict(MergeSettings, settings)
    if len(folders) < 2:
        raise UserError(f"merging takes at least two posteriors, got {len(folders)}")
    base = None if s.base is None else Posterior.load(s.base)
    posteriors = [Posterior.load(f) for f in folders]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged, report = merge(posteriors, base, s.alphas, s.delta0, s.space, s.same_init, s.rank)
    merged.save(options.output)
    return {
        "output": options.output,
        "of": folders,
        "family": merged.family,
        "report": to_dict(report),
        "warnings": [str(warning.message) for warning in caught],
    }


def _show_merge(result: Result) -> None:
    kept = result["report"].get("kept") or {}
    rows = [(key, _cell(value)) for key, value in result["report"].items() if key != "kept"]
    if kept:
        rows.append(("least kept", _cell(min(kept.values()))))
    console().print(table(f"merged: {result['output']}", ("", "value"), rows))
    for line in result["warnings"]:
        console().print(f"warning: {line}", highlight=False, markup=False)


# ----------------------------------------------------------------------------------------------------------- inspect

_INSPECT = """\
What a posterior is: family, size, base model, N, lambda and temperature, prior, quantiles of sigma and of
sigma / |mean| over the uncertain weights, and the KL divergence to its prior where there is one."""

_INSPECT_EXAMPLES = """\
examples:
  vlm-reason bayes inspect runs/bayes_sst2/posterior
  vlm-reason bayes inspect runs/bayes_sst2/posterior --json"""


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("posterior", metavar="FOLDER", help=_POSTERIOR)


def _inspect(options: argparse.Namespace) -> Result:
    from ..weights.artefact import posterior_in
    from ..weights.inspection import inspect

    return inspect(posterior_in(options.posterior))


def _show_inspect(result: Result) -> None:
    out = console()
    whole = {k: v for k, v in result.items() if k not in ("tensors", "quantiles", "prior")}
    rows = [(key, _cell(value)) for key, value in whole.items()]
    rows += [(f"prior precision {p['value']:.4g}", f"{p['tensors']} tensors") for p in result["prior"]]
    out.print(table(f"posterior: {result['folder']}", ("", "value"), rows))
    if result["quantiles"]:
        at = [f"{q:.0%}" for q in result["quantiles"]["at"]]
        found = [
            (label, *(number(v, ".3g") for v in result["quantiles"][key]))
            for key, label in (("sigma", "sigma"), ("noise_to_weight", "sigma / |mean|"))
        ]
        out.print(table("over the uncertain weights", ("", *at), found))


# ------------------------------------------------------------------------------------------------------------- bayes


def _cell(value: object) -> str:
    return number(value, ".4g") if isinstance(value, float) else "-" if value is None else str(value)


def _command(
    name: str, help: str, description: str, epilog: str, add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], Result], show: Callable[[Result], None], **keys: Any,
) -> Command:  # fmt: skip
    return Command(f"bayes {name}", help, description, epilog, add_arguments, run, show, **keys)


_TFB = _PostHoc(
    "tfb",
    "a posterior around any LoRA adapter, without training",
    """\
A posterior around a trained LoRA adapter, without training (TFB): the widest noise in the space of its
updates that leaves the loss on held-out problems (else on the training problems) within a tolerance.
""",
    "options.criterion=flips",
)
_LAPLACE = _PostHoc(
    "laplace",
    "a posterior around any LoRA adapter from the curvature of its loss",
    """\
A posterior around a trained LoRA adapter from the curvature of its loss on the training problems
(Laplace), with the prior that the marginal likelihood prefers.
""",
    "options.structure=diagonal",
)

COMMAND = Command(
    name="bayes",
    help="posteriors over the weights of an adapter: fit, tfb, laplace, predict, export, merge, inspect",
    description="Posteriors over the weights of an adapter.",
    epilog="""\
examples:
  vlm-reason bayes fit configs/recipes/bayes_sst2.yaml    fit as the file says; repeat it to resume
  vlm-reason bayes tfb ADAPTER --data recipe.yaml -o OUT  around anybody's LoRA adapter, without training
  vlm-reason bayes predict OUT --data recipe.yaml         what it says of other problems
  vlm-reason bayes export OUT -n 8 -o DRAWS               draws of it: LoRAs for vLLM, members of suites
  vlm-reason bayes inspect OUT/posterior                  what it is

vlm-reason bayes COMMAND --help says more of each.""",
    after_interrupt=_REPEAT,
    takes_config=False,
    commands=(
        _command(
            "fit", "fit a posterior over an adapter; run again to resume", _FIT, _FIT_EXAMPLES,
            lambda parser: None, run, show_fit, after_interrupt=_REPEAT,
        ),
        _TFB.command(),
        _LAPLACE.command(),
        _command(
            "predict", "predictions of a saved posterior, and what they are worth", _PREDICT, _PREDICT_EXAMPLES,
            _predict_arguments, _predict, _show_predict, after_interrupt="nothing was written", takes_config=False,
            settings="overrides",
        ),
        _command(
            "export", "draws of a saved posterior as plain PEFT adapters", _EXPORT, _EXPORT_EXAMPLES,
            _export_arguments, _export, _show_export, after_interrupt="nothing was written", takes_config=False,
        ),
        _command(
            "merge", "one posterior from those of several tasks", _MERGE, _MERGE_EXAMPLES, _merge_arguments, _merge,
            _show_merge, after_interrupt="nothing was written", takes_config=False, settings="items",
        ),
        _command(
            "inspect", "what a posterior is", _INSPECT, _INSPECT_EXAMPLES, _inspect_arguments, _inspect,
            _show_inspect, after_interrupt="nothing was written", takes_config=False,
        ),
    ),
)  # fmt: skip
