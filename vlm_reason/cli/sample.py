"""vlm-reason sample: draw rationales and answers into the append-only store."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from ..config import save_resolved
from .command import Command, Result
from .output import console, estimate, number, table
from .wiring import (
    add_problem_choice,
    add_system_choice,
    default_system,
    load_section,
    provenance,
    read_config,
    sampling_config,
    serve,
    task_judge,
)

DEFAULTS = {"traces": 8, "temperature": 1.0}

_DESCRIPTION = """\
Draw K rationales for each problem and an answer behind each, judge them, and append them to
OUTPUT_DIR/samples. What is there already is not drawn again: after a stop, or to add traces, run the
command again. Every sample keeps its token ids, log-probabilities, seed, finish reason and the hash
of the weights."""

_EPILOG = """\
keys (section `sampling`): traces (8), answers (1), temperature (1.0), top_p, max_trace_tokens,
max_answer_tokens, seed

examples:
  vlm-reason sample recipe.yaml
  vlm-reason sample recipe.yaml sampling.traces=32 sampling.temperature=0.8
  vlm-reason sample recipe.yaml --system base --on task"""


def samples_folder(output_dir: str) -> Path:
    return Path(output_dir) / "samples"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_problem_choice(parser)
    add_system_choice(parser)


def _run(options: argparse.Namespace) -> Result:
    config = read_config(options)
    from ..evaluation import sample_into, stored, summarise
    from ..evaluation.sampling import check_references
    from ..store import SampleStore

    settings = sampling_config(config, "sampling", DEFAULTS)
    problems = load_section(config, options.on)
    system = options.system or default_system(config)
    served = serve(config, (system,))[system]
    settings = dataclasses.replace(settings, adapter=served.adapter)
    source = provenance(served, settings)
    folder = samples_folder(config.output_dir)
    started = time.perf_counter()
    with SampleStore(folder) as store:
        # before anything is drawn: new samples would be judged by the answers of now
        check_references(stored(store, served.builder, problems, settings, source), problems)
        new = sample_into(
            store,
            served.engine,
            served.builder,
            problems,
            task_judge(config, options.on, served.builder),
            settings,
            source,
            progress=None if options.quiet else "sample",
        )
        seconds = time.perf_counter() - started
        records = stored(store, served.builder, problems, settings, source)
    save_resolved(config, folder)
    result = summarise(records)
    return {
        "store": str(folder),
        "system": system,
        "weights": source.weights,
        "new": new,
        "seconds": seconds,
        **{k: v for k, v in result.to_json().items() if k not in ("seconds", "tokens_per_second")},
    }


def _show(result: Result) -> None:
    rows = [
        ("model", f"{result['system']} ({result['weights']})"),
        ("problems", str(result["problems"])),
        ("samples drawn now", str(result["new"])),
        ("seconds", number(result["seconds"], ".1f")),
        ("accuracy of a sample", estimate(result["accuracy"])),
        *((f"pass@{k}", estimate(value)) for k, value in result["pass_at"].items()),
        ("unparsed", estimate(result["unparsed"])),
        ("truncated traces", estimate(result["truncated"])),
        ("trace length", estimate(result["trace_length"], ".1f")),
    ]
    console().print(table(f"samples in {result['store']}", ("", "value"), rows))


COMMAND = Command(
    name="sample",
    help="draw rationales and answers into the sample store",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=_add_arguments,
    run=_run,
    show=_show,
    after_interrupt="the samples drawn so far are kept; the same command goes on",
)
