"""One window ahead: who drew what, where the staleness goes, and that neither a thread nor a kill changes anything."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.resume.test_resume import PROBLEMS, TEMPLATE, StopAfter, losses, samples, trainer
from vlm_reason.engines.base import EngineLost
from vlm_reason.engines.hf import HFEngine
from vlm_reason.errors import UserError
from vlm_reason.models.adapters import AdapterConfig, add_adapters, load_adapters, use_adapter
from vlm_reason.scoring.logprobs import score_sequences
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.traces import TraceConfig, TraceTrainer, build
from vlm_reason.traces.checkpoint import latest_checkpoint

STEPS = 4  # of a window
SETTINGS = {"rollout_ahead": 1, "rounds": 3, "save_total_limit": 100}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def window_file(folder: Path, window: int) -> list[dict]:
    path = folder / "completions" / f"window_{window:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_at(model: nn.Module, checkpoint: Path | None) -> nn.Module:
    """The model as `checkpoint` left it; None: as it began."""
    own = add_adapters(copy.deepcopy(model), AdapterConfig(r=2, alpha=4))
    if checkpoint is not None:
        load_adapters(own, checkpoint)
    return own.eval()


@torch.no_grad()
def trace_logps(model: nn.Module, tokenizer, traces: list[dict], adapter: str) -> torch.Tensor:
    """Of the reasoner behind the question, or of the posterior behind the question and its answer."""
    prompts = PromptBuilder(tokenizer, TEMPLATE)
    by_id = {problem.id: problem for problem in PROBLEMS}
    prompt = prompts.prior_ids if adapter == "reasoner" else prompts.hinted_ids
    pairs = [(prompt(by_id[t["problem"]]), tuple(t["ids"])) for t in traces]
    with use_adapter(model, adapter):
        return score_sequences(model, pairs)[0].sum(1)


def test_the_ratio_holds_the_staleness(tiny_llama, tiny_tokenizer, tmp_path):
    """Window 2 begins at step 8, and was drawn with the weights of step 4: log r is theirs, log pi that of step 8."""
    own = trainer(tiny_llama, tiny_tokenizer, tmp_path, build("rws"), **SETTINGS)
    own.train()
    assert [row["staleness"] for row in rows(tmp_path)][::STEPS] == [0, STEPS, STEPS]
    traces = [t for t in window_file(tmp_path, 2) if t["finish"] == "stop"]
    assert traces
    before, after = (trained_at(tiny_llama, tmp_path / f"checkpoint-{step}") for step in (4, 8))
    drawn = trace_logps(before, tiny_tokenizer, traces, "posterior")
    now = trace_logps(after, tiny_tokenizer, traces, "reasoner")
    logq = torch.tensor([t["logq"] for t in traces])
    prior = torch.tensor([t["logp_prior"] for t in traces])
    torch.testing.assert_close(logq, drawn, atol=1e-4, rtol=0)
    torch.testing.assert_close(prior, now, atol=1e-4, rtol=0)
    for adapter, value in (
        ("posterior", drawn),
        ("reasoner", now),
    ):  # the versions differ enough to be told apart
        other = trace_logps(after if adapter == "posterior" else before, tiny_tokenizer, traces, adapter)
        assert (other - value).abs().max() > 1e-2


def test_the_first_stale_window_is_drawn_by_the_first_weights(tiny_llama, tiny_tokenizer, tmp_path):
    own = trainer(tiny_llama, tiny_tokenizer, tmp_path, build("rws"), **SETTINGS)
    own.train()
    traces = [t for t in window_file(tmp_path, 1) if t["finish"] == "stop"]
    drawn = trace_logps(trained_at(tiny_llama, None), tiny_tokenizer, traces, "posterior")
    torch.testing.assert_close(torch.tensor([t["logq"] for t in traces]), drawn, atol=1e-4, rtol=0)


def test_the_clip_is_around_the_sampler(tiny_llama, tiny_tokenizer, tmp_path):
    """GRPO's old log-probabilities are those of the weights that drew, trace and answer alike."""
    own = trainer(
        tiny_llama,
        tiny_tokenizer,
        tmp_path,
        build("grpo"),
        traces_per_prompt=6,
        max_trace_tokens=60,
        **SETTINGS,
    )
    own.maker = replace(own.maker, callable_evidence=lambda g: [len(t.ids) % 7 / 7 for t in g.traces])
    seen: dict[int, tuple] = {}
    make = own._make_window

    def keep(place):
        window = make(place)
        seen[window.index] = window.rows
        return window

    own._make_window = keep
    own.train()
    found = [row for group in seen[2] for row in group]
    assert found
    before = trained_at(tiny_llama, tmp_path / "checkpoint-4")
    with torch.no_grad(), use_adapter(before, "reasoner"):
        logps, mask = score_sequences(before, [(row.context, row.target) for row in found])
    for n, row in enumerate(found):
        old, live = torch.tensor(row.old), torch.tensor(row.weight) != 0
        torch.testing.assert_close(old[live], logps[n, : len(old)][live], atol=1e-4, rtol=0)


def test_killed_anywhere_it_goes_on_to_the_bit(tiny_llama, tiny_tokenizer, tmp_path):
    whole = trainer(tiny_llama, tiny_tokenizer, tmp_path / "whole", build("rws"), **SETTINGS)
    whole.train()
    for stop in (2, STEPS, STEPS + 3):
        folder = tmp_path / f"stop{stop}"
        first = trainer(tiny_llama, tiny_tokenizer, folder, build("rws"), **SETTINGS)
        first.add_callback(StopAfter(stop))
        with pytest.raises(KeyboardInterrupt):
            first.train()
        found = latest_checkpoint(folder)
        assert found is not None and found.name == f"checkpoint-{stop - 1}"
        second = trainer(tiny_llama, tiny_tokenizer, folder, build("rws"), **SETTINGS)
        second.train(resume_from_checkpoint=str(found))
        assert losses(folder) == losses(tmp_path / "whole")
        assert samples(folder) == samples(tmp_path / "whole")


class OwnWeights(HFEngine):
    """An engine with weights of its own, as vLLM's: what it samples with changes when it is told, and only then."""

    threads: set[str]

    def follow(self, model) -> None:
        self.trained, self.model, self.threads = HFEngine(model, self.tokenizer), copy.deepcopy(model), set()

    def sync(self, model, version, whole=None) -> None:
        self.model.load_state_dict(model.state_dict())

    def sample(self, requests, progress=None):
        self.threads.add(threading.current_thread().name)
        return super().sample(requests, progress)

    def score(self, requests, progress=None):
        return self.trained.score(requests, progress)


def test_a_thread_changes_nothing(tiny_llama, tiny_tokenizer, tmp_path):
    """Drawn beside training by an engine with its own weights, or before it by the one in training: the same run."""
    before = trainer(tiny_llama, tiny_tokenizer, tmp_path / "before", build("rws"), **SETTINGS)
    before.train()
    engine = OwnWeights(tiny_llama, tiny_tokenizer)
    settings = {**before.args.to_dict(), "output_dir": str(tmp_path / "beside"), "max_steps": -1}
    beside = TraceTrainer(
        copy.deepcopy(tiny_llama), TraceConfig(**settings), build("rws"), PROBLEMS, template=TEMPLATE,
        verifier="number", tokenizer=tiny_tokenizer, adapter=AdapterConfig(r=2, alpha=4), engine=engine,
        show_progress=False,
    )  # fmt: skip
    engine.follow(beside.model)
    beside.train()
    assert any(name.startswith("rollout-ahead") for name in engine.threads)
    assert losses(tmp_path / "beside") == losses(tmp_path / "before")
    assert samples(tmp_path / "beside") == samples(tmp_path / "before")


class Endless(OwnWeights):
    """Ahead of training it samples until it is closed."""

    def follow(self, model) -> None:
        super().follow(model)
        self.closed = threading.Event()

    def sample(self, requests, progress=None):
        if threading.current_thread().name.startswith("rollout-ahead"):
            assert self.closed.wait(120)
            raise EngineLost("closed")
        return super().sample(requests, progress)

    def close(self) -> None:
        self.closed.set()


def test_ctrl_c_ends_what_is_drawn_ahead(tiny_llama, tiny_tokenizer, tmp_path):
    """Else the process would wait for it: a thread that draws is not left behind."""
    args = trainer(tiny_llama, tiny_tokenizer, tmp_path / "other", build("rws"), **SETTINGS).args.to_dict()
    engine = Endless(tiny_llama, tiny_tokenizer)
    own = TraceTrainer(
        tiny_llama, TraceConfig(**{**args, "output_dir": str(tmp_path / "run"), "max_steps": -1, "save_steps": 100}),
        build("rws"), PROBLEMS, template=TEMPLATE, verifier="number", tokenizer=tiny_tokenizer,
        adapter=AdapterConfig(r=2, alpha=4), engine=engine, show_progress=False,
    )  # fmt: skip
    engine.follow(own.model)
    own.add_callback(StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        own.train()
    assert engine.closed.is_set()


def test_rows_that_wait_are_written_before_a_lost_engines_checkpoint(tiny_llama, tiny_tokenizer, tmp_path):
    """Several processes sum their shares once a logging step; what waits then would be missing after a resume, which
    begins behind those steps."""
    own = trainer(tiny_llama, tiny_tokenizer, tmp_path / "lost", build("rws"), rounds=3, logging_steps=100)
    make, flush = own._make_window, own._log.flush
    own._log.flush = lambda: None  # as several processes do between logging steps

    def lost_at_the_third(place):
        if place.window == 2:
            own._log.flush = flush
            raise EngineLost("gone")
        return make(place)

    own._make_window = lost_at_the_third
    with pytest.raises(EngineLost):
        own.train()
    found = latest_checkpoint(tmp_path / "lost")
    assert found is not None and found.name == f"checkpoint-{2 * STEPS}"
    assert [row["step"] for row in rows(tmp_path / "lost")] == list(range(1, 2 * STEPS + 1))
    again = trainer(tiny_llama, tiny_tokenizer, tmp_path / "lost", build("rws"), rounds=3, logging_steps=100)
    again.train(resume_from_checkpoint=str(found))
    whole = trainer(tiny_llama, tiny_tokenizer, tmp_path / "whole", build("rws"), rounds=3)
    whole.train()
    assert losses(tmp_path / "lost") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("recipe", "args", "says"),
    [
        (build("rloo"), {}, "neither"),
        (build("vr", {"proposal": "mixture", "wake": "same"}), {}, "mixture"),
        (build("grpo"), {"temperature": 0.7}, "temperature 1"),
        (build("grpo"), {"proposal_shots": 2, "proposal_shot_rounds": 1}, "proposal_shots 2, shots 0"),
        (build("iwae"), {}, "neither"),
        (build("rws"), {"reuse_logps": False}, "reuse_logps"),
    ],
)
def test_a_recipe_without_a_place_for_it_is_refused(tiny_llama, tiny_tokenizer, tmp_path, recipe, args, says):
    with pytest.raises(UserError, match=says):
        trainer(tiny_llama, tiny_tokenizer, tmp_path, recipe, **SETTINGS, **args)
