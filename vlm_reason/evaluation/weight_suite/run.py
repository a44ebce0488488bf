"""Run a comparison: every missing cell, then the table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ...atomic import write_atomically
from ...config import to_dict
from ...errors import UserError
from ...models.load import load_model
from ...weights.run import finite
from ..result import header
from .cells import Cells
from .config import WeightSuite
from .plot import plot
from .table import markdown, read_cells, table, verdicts


def run_weight_suite(suite: WeightSuite, progress: bool = True) -> dict[str, Any]:
    """Fit and test what is missing and write OUTPUT_DIR/result.json, table.md and plot.png. Stopped at any moment, it
    goes on at the cell it was in. UserError if OUTPUT_DIR holds cells of other settings."""
    folder = Path(suite.output_dir)
    _same_settings(suite, folder)
    started = time.perf_counter()
    names = suite.only or tuple(suite.sets)
    todo = [(name, seed, method) for seed in suite.seeds for name in names for method in suite.methods]
    cells = Cells(suite, None, None)  # type: ignore[arg-type]  # the model is loaded when a cell needs it
    todo = [cell for cell in todo if not cells.done(*cell)]
    if todo:
        model, tokenizer = load_model(suite.model, suite.dtype)  # type: ignore[arg-type]  # it checks the name
        cells = Cells(suite, model, tokenizer)
    with tqdm(todo, desc="cells", disable=not progress, unit="cell") as bar:
        for name, seed, method in bar:
            bar.set_postfix_str(f"{name} {seed} {method}")
            cells.run(name, seed, method)
    found = read_cells(folder)
    sets, methods = list(suite.sets), list(suite.methods)  # others, of an earlier call, come last
    order = {name: n for n, name in enumerate([*sets, *methods])}
    rows = sorted(
        table(found, suite.reference),
        key=lambda row: (order.get(row["set"], len(order)), order.get(row["method"], len(order))),
    )
    result = {
        **header("weights", to_dict(suite)), "kind": "weight_suite", "reference": suite.reference,
        "cells_commits": sorted({str(cell.get("commit")) for cell in found}),
        "seconds": time.perf_counter() - started, "cells_run": len(todo), "rows": rows,
        "verdicts": verdicts(rows, suite.reference), "requirements": [], "file": str(folder / "result.json"),
    }  # fmt: skip
    write_atomically(folder / "result.json", json.dumps(finite(result), indent=1) + "\n")
    write_atomically(folder / "table.md", markdown(rows, suite.reference))
    plot(rows, suite.reference, folder / "plot.png")
    return result


def _same_settings(suite: WeightSuite, folder: Path) -> None:
    """What a cell holds depends on these; other methods, sets and seeds may join later."""
    now = to_dict(suite)
    path = folder / "config.yaml"
    if path.is_file():
        before = yaml.safe_load(path.read_text())
        for key in ("model", "dtype", "adapter", "training"):
            _agree(folder, key, before.get(key), now[key])
        for section in ("sets", "methods"):
            for name, entry in before.get(section, {}).items():
                if name in now[section]:
                    _agree(folder, f"{section}.{name}", entry, now[section][name])
                else:
                    now[section][name] = entry
    write_atomically(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


def _agree(folder: Path, key: str, before: Any, now: Any) -> None:
    if before != json.loads(json.dumps(now)):
        raise UserError(
            f"{str(folder)!r} holds cells with {key} = {before!r}, this comparison has {now!r}: choose another "
            "output_dir, or delete that folder to start over"
        )
