"""One cell of the table: a method fitted on one set with one seed, and what it predicts. A file a cell; a cell that is
there is not run again, so a stopped comparison goes on where it was.

    OUTPUT_DIR/cells/SET/SEED/METHOD.json            probabilities of the test problems, entropies, seconds
    OUTPUT_DIR/cells/SET/SEED/METHOD.posterior/      what others start from (only where one does)
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...atomic import write_atomically
from ...errors import UserError
from ...models.adapters import add_adapters
from ...tasks.prompts import PromptBuilder
from ...tasks.resolve import resolve_template
from ...tasks.sources import held_out, load_problems
from ...types import Problem
from ...weights import Choice, Example, FitReport, Job, Posterior, Predictive
from ...weights.examples import choice_examples
from ...weights.predictive import predictive
from ...weights.trunk import above_trunk, first_adapted_layer
from ..result import commit
from .config import MethodEntry, SetEntry, WeightSuite

ADAPTER = "default"
PARTS = ("train", "held_out", "test", "out_of_domain")


@dataclass(frozen=True)
class SetData:
    """Examples of one set and seed, under one tokenizer."""

    likelihood: Choice
    names: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    test: tuple[Example, ...]
    out_of_domain: tuple[Example, ...]


def set_data(suite: WeightSuite, name: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> SetData:
    """UserError where a set has fewer problems than it asks for."""
    entry = suite.sets[name]
    everything = _problems(suite, entry, "task")
    test = held_out(_problems(suite, entry, "eval_task"), everything)[: entry.test]
    chosen = list(everything)
    random.Random(seed).shuffle(chosen)
    wanted = entry.train + entry.held_out
    if len(chosen) < wanted or len(test) < entry.test:
        raise UserError(f"set {name!r}: {len(chosen)} training problems and {len(test)} others; wanted {wanted} and "
                        f"{entry.test}")  # fmt: skip
    builder = PromptBuilder(tokenizer, resolve_template(entry.template))
    strangers: list[Problem] = []
    if entry.out_of_domain is not None:
        other = suite.sets[entry.out_of_domain]
        labels = test[0].metadata.get("labels", ())
        if not labels:
            raise UserError(
                f"sets.{name}.out_of_domain: its own problems have no labels to ask strangers with"
            )
        strangers = [_dressed(p, tuple(labels)) for p in _problems(suite, other, "eval_task")[: entry.test]]
    made = choice_examples([*chosen[:wanted], *test, *strangers], builder)
    parts, at = [], 0
    for size in (entry.train, entry.held_out, len(test), len(strangers)):
        parts.append(made.examples[at : at + size])
        at += size
    return SetData(Choice(made.label_ids), made.names, parts[0], parts[1], parts[2], parts[3])


def _problems(suite: WeightSuite, entry: SetEntry, section: str) -> list[Problem]:
    problems = load_problems(suite.task(getattr(entry, section)))
    if not entry.labels:
        return problems
    names = {label.lower(): label for label in entry.labels}
    wrong = [p for p in problems if p.answer.strip().lower() not in names]
    if wrong:
        raise UserError(
            f"problem {wrong[0].id!r}: answer {wrong[0].answer!r} is none of {', '.join(entry.labels)}"
        )
    return [replace(_dressed(p, entry.labels), answer=names[p.answer.strip().lower()]) for p in problems]


def _dressed(problem: Problem, labels: tuple[str, ...]) -> Problem:
    """The problem with these labels; a stranger's answer is none of them, so the first stands for it."""
    answer = problem.answer if problem.answer in labels else labels[0]
    return replace(problem, answer=answer, metadata={**problem.metadata, "labels": labels})


class Cells:
    """Fits and predicts cell by cell on one base model."""

    def __init__(self, suite: WeightSuite, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.suite, self.base, self.tokenizer = suite, base, tokenizer
        self._data: tuple[str, int, SetData, PreTrainedModel] | None = None

    def path(self, name: str, seed: int, method: str) -> Path:
        return Path(self.suite.output_dir) / "cells" / name / str(seed) / f"{method}.json"

    def done(self, name: str, seed: int, method: str) -> bool:
        """Also its posterior is there, where another method starts from it."""
        path = self.path(name, seed, method)
        return path.is_file() and (not self._is_start(method) or path.with_suffix(".posterior").is_dir())

    def _is_start(self, method: str) -> bool:
        return any(m.start == method for m in self.suite.methods.values())

    def run(self, name: str, seed: int, method: str) -> None:
        """Fit, predict, write. Nothing is written before the end."""
        entry = self.suite.methods[method]
        data, top = self.data(name, seed)
        model = add_adapters(top, replace(self.suite.adapter, seed=seed), (ADAPTER,))
        try:
            started = time.perf_counter()
            posterior, report = entry.build().fit(self._job(model, entry, data, name, seed))
            fit_seconds = time.perf_counter() - started
            started = time.perf_counter()
            test = self._predict(posterior, model, data.test, data.likelihood, entry, seed)
            predict_seconds = time.perf_counter() - started
            strangers = None
            if data.out_of_domain:
                strangers = self._predict(posterior, model, data.out_of_domain, data.likelihood, entry, seed)
        finally:
            model.unload()
        path = self.path(name, seed, method)
        if self._is_start(method):
            folder = path.with_suffix(".posterior")
            shutil.rmtree(folder, ignore_errors=True)  # of a run killed before its cell
            posterior.save(folder)
        cell = {
            "set": name, "seed": seed, "method": method, "names": data.names,
            "labels": [int(e.target) for e in data.test], "test": _columns(test),
            "out_of_domain": None if strangers is None else _columns(strangers), "fit_seconds": fit_seconds,
            "predict_seconds": predict_seconds, "report": asdict(report), "commit": commit(),
        }  # fmt: skip
        write_atomically(path, json.dumps(cell, default=_plain) + "\n")

    def data(self, name: str, seed: int) -> tuple[SetData, PreTrainedModel]:
        """The examples, and the model above what no adapter changes (their tokens are its hidden states)."""
        if self._data is None or self._data[:2] != (name, seed):
            data = set_data(self.suite, name, seed, self.tokenizer)
            first = first_adapted_layer(self.base, self.suite.adapter)
            parts = [getattr(data, part) for part in PARTS]
            top, own = above_trunk(self.base, first, parts)
            self._data = (name, seed, SetData(data.likelihood, data.names, *own), top)
        return self._data[2:]

    def _job(self, model: PeftModel, entry: MethodEntry, data: SetData, name: str, seed: int) -> Job:
        start = None
        if entry.start is not None:
            start = Posterior.load(self.path(name, seed, entry.start).with_suffix(".posterior"))
            start.write(model, start.mean(), ADAPTER)
        training = self.suite.training_of(self.suite.sets[name], entry)
        return Job(model, data.train, data.likelihood, training, data.held_out, start, seed, ADAPTER)

    @staticmethod
    def _predict(
        posterior: Posterior,
        model: PeftModel,
        examples: Sequence[Example],
        likelihood: Choice,
        entry: MethodEntry,
        seed: int,
    ) -> Predictive:
        posterior.write(model, posterior.mean(), ADAPTER)
        model.eval()
        return predictive(posterior, model, examples, likelihood, entry.n, entry.mode, seed=seed)


def _columns(result: Predictive) -> dict[str, Any]:
    return {
        "ids": list(result.ids), "probs": result.probs.tolist(), "total_entropy": result.total_entropy.tolist(),
        "mutual_information": result.mutual_information.tolist(), "n": result.n, "mode": result.mode,
    }  # fmt: skip


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, FitReport):
        return asdict(value)
    return str(value)
