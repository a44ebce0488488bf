"""One run from a BayesConfig: fit a posterior, save it, predict with it.

output_dir/config.yaml          what was run, resolved
output_dir/checkpoints/         of the training in hand, complete ones only; gone when the run is finished
output_dir/fit.json             what the method reports
output_dir/posterior/           the result: a stock PEFT adapter that holds the mean, and the posterior beside it
output_dir/predictions.jsonl    a row a problem of eval_task
output_dir/summary.json         written last: its presence means the run is finished
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from ..atomic import write_atomically
from ..config import check_same_run, save_resolved, to_dict
from ..engines.make import note
from ..engines.processes import rank, together
from ..errors import UserError
from ..models.adapters import add_adapters
from ..models.load import load_model
from ..tasks.prompts import PromptBuilder
from ..tasks.resolve import resolve_template
from .artefact import POSTERIOR, new_folder, posterior_in, write_folder
from .config import BayesConfig
from .data import Data, load_data
from .job import FitReport, Job
from .posterior import Posterior
from .start import load_start
from .training import join_processes

SUMMARY, CONFIG, FIT = "summary.json", "config.yaml", "fit.json"
PREDICTIONS, CHECKPOINTS = "predictions.jsonl", "checkpoints"

Rows = list[dict[str, Any]]
Measure = Callable[[Rows], dict[str, Any]]
"""Metrics of the rows of predictions.jsonl."""


def run_bayes(
    config: BayesConfig, show_progress: bool = True, measure: Measure | None = None
) -> dict[str, Any]:
    """Fit and predict as `config` says and return the summary. Started again with the same config it goes on from the
    last complete checkpoint, and returns at once when the run is finished. Of several processes all train, rank 0
    predicts, writes and has the summary. measure: what becomes `metrics` of the summary, of the predictions' rows.

    UserError when output_dir holds a run of another config: nothing there is touched.
    """
    output = Path(config.output_dir)
    _same_run_or_none(config, output)
    done = output / SUMMARY
    if done.is_file():
        return {**json.loads(done.read_text()), "already_finished": True}
    started = time.perf_counter()
    job, data = make_job(config, show_progress)
    main = rank() == 0
    if main:
        save_resolved(config, output)
    posterior, report = _fitted(config, job, output)
    if not main:
        return {"output_dir": str(output), "rank": rank()}
    rows = _predicted(config, job.model, data, posterior) if data.test else []
    if rows:
        write_atomically(output / PREDICTIONS, _lines(rows))
    summary = {
        "output_dir": str(output),
        "method": config.method,
        "family": posterior.family,
        "examples": len(data.train),
        "metrics": measure(rows) if rows and measure is not None else {},
        "report": report,
        "seconds": time.perf_counter() - started,
    }
    write_atomically(done, json.dumps(finite(summary), indent=2) + "\n")
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return finite(summary)


def make_job(config: BayesConfig, show_progress: bool = True) -> tuple[Job, Data]:
    """What `config` describes, not yet started: whatever is wrong with a config is found here."""
    if config.start is not None and config.adapter:
        raise UserError("the adapter of `start` is what is fitted: drop the section 'adapter'")
    config.method_settings(), config.prediction_settings()
    training, adapter = config.training_settings(), config.adapter_settings()
    start = None if config.start is None else load_start(config.start)
    model, data = _loaded(config)
    wrapped = add_adapters(model, adapter, ["default"]) if start is None else start.attach(model)
    output = Path(config.output_dir)
    job = Job(
        wrapped.eval(), data.train, data.likelihood, training, data.held_out, start, config.seed,
        output_dir=output / CHECKPOINTS, show_progress=show_progress,
    )  # fmt: skip
    return job, data


def _loaded(config: BayesConfig) -> tuple[PreTrainedModel, Data]:
    """The base model and the problems."""
    template = resolve_template(config.template)
    model, tokenizer = load_model(config.model, cast(Any, config.dtype), join_processes())
    builder = PromptBuilder(tokenizer, template, config.shots)
    return model, load_data(config, builder, note if rank() == 0 else lambda text: None)


def _fitted(config: BayesConfig, job: Job, output: Path) -> tuple[Posterior, dict[str, Any]]:
    """The posterior as it is on disk, so that a run that is resumed behind the fit predicts the same numbers."""
    folder = output / POSTERIOR
    if not together(folder.is_dir)[0]:
        posterior, report = config.method_settings().fit(job)
        posterior.origin = posterior.origin.on(job.model)

        def write() -> None:
            if rank() == 0:
                write_atomically(output / FIT, json.dumps(finite(_plain(report)), indent=2) + "\n")
                posterior.save(folder)

        together(write)
    return Posterior.load(folder), json.loads((output / FIT).read_text())


def _plain(report: FitReport) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(json.dumps(to_dict(asdict(report)))))


# ------------------------------------------------------------------------------------------------------ predictions


def predict_with(
    folder: str | Path, config: BayesConfig, output: str | Path | None = None, measure: Measure | None = None
) -> dict[str, Any]:
    """What the posterior in `folder`, or in the posterior/ of a run's folder, predicts for eval_task of `config`: the
    rows that `run_bayes` writes, measured. Of `config` count model, dtype, task (its problems are left out), held_out
    (it has a say in the classes), eval_task, template, shots, likelihood, predictive and seed. output: new folder that
    gets predictions.jsonl and summary.json; None writes nothing.

    UserError for a config without eval_task, an output that holds anything, and another base model than the
    posterior's.
    """
    if not config.eval_task:
        raise UserError("the config has no section 'eval_task': it names the problems to predict")
    config.prediction_settings()
    if output is not None:
        new_folder(output)
    started = time.perf_counter()
    posterior = Posterior.load(posterior_in(folder))
    base, data = _loaded(config)
    rows = _predicted(config, posterior.attach(base), data, posterior)
    summary = finite({
        "posterior": str(folder),
        "output": None if output is None else str(output),
        "family": posterior.family,
        "problems": len(rows),
        "metrics": measure(rows) if measure is not None else {},
        "seconds": time.perf_counter() - started,
    })  # fmt: skip
    if output is not None:
        files = ((PREDICTIONS, _lines(rows)), (SUMMARY, json.dumps(summary, indent=2) + "\n"))
        write_folder(output, [(name, text.encode()) for name, text in files])
    return cast("dict[str, Any]", summary)


def _predicted(config: BayesConfig, model: PeftModel, data: Data, posterior: Posterior) -> Rows:
    p = config.prediction_settings()
    result = posterior.predictive(
        model, data.test, data.likelihood, p.n, p.mode, seed=config.seed, antithetic=p.antithetic, link=p.link,
        tokens=p.tokens,
    )  # fmt: skip
    rows: Rows = []
    if data.labels:
        for n, example in enumerate(data.test):
            rows.append({
                "id": example.id,
                "label": int(example.target),
                "probs": result.probs[n].tolist(),
                "total_entropy": float(result.total_entropy[n]),
                "expected_entropy": float(result.expected_entropy[n]),
                "mutual_information": float(result.mutual_information[n]),
            })  # fmt: skip
    else:
        assert result.log_prob is not None
        for n, example in enumerate(data.test):
            tokens = len(example.ids) - int(example.target)
            rows.append({"id": example.id, "logp": float(result.log_prob[n]), "tokens": tokens})
    return rows


def _lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------- the run


def _same_run_or_none(config: BayesConfig, output: Path) -> None:
    made = [output / SUMMARY, output / POSTERIOR, *(output / CHECKPOINTS).rglob("checkpoint-*")]
    if not any(path.exists() for path in made):
        return
    written = output / CONFIG
    if not written.is_file():
        raise UserError(f"{output} holds a run without its {CONFIG}: choose another output_dir")
    unread = set() if (output / SUMMARY).exists() else {"predictive", "eval_task"}
    check_same_run(config, output, {"output_dir"} | unread)


def finite(value: Any) -> Any:
    """With null for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
