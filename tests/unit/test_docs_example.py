"""The code in docs/traces.md runs and does what the page says; its tables name what there is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from tests.unit.traces_parts import TEMPLATE, problem
from vlm_reason.models.adapters import AdapterConfig
from vlm_reason.traces import PRESETS, TraceConfig, TraceTrainer
from vlm_reason.types import Scores

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "traces.md").read_text()


def code(name: str) -> str:
    (block,) = re.findall(rf"```python {name}\n(.*?)```", PAGE, re.DOTALL)
    return block


def table(first_cell: str) -> list[list[str]]:
    """Rows of the table whose header begins with `first_cell`, cells stripped; an escaped bar is no border."""
    after = PAGE[PAGE.index(f"\n| {first_cell} |") + 1 :].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in after.splitlines()[2:]]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]


def names(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture
def method() -> dict:
    namespace: dict = {}
    exec(compile(code("method"), "docs/traces.md: method", "exec"), namespace)
    return namespace


def test_the_method_of_ones_own_gives_each_trace_what_the_best_loses_without_it(method):
    e = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.25, 1.0, 0.75]])
    zero = torch.zeros(4, 3)
    scores = Scores(
        logp_prior=zero, logq=zero, log_evidence=e.log(), logp_answer=zero.unsqueeze(-1),
        answer_weight=e.unsqueeze(-1), length=zero, mask=torch.ones(4, 3, dtype=torch.bool),
    )  # fmt: skip
    coefficients, _ = method["weigh"](scores, {})
    expected = [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.25, 0.0]]
    assert coefficients.c_z.tolist() == expected
    assert coefficients.c_y[..., 0].tolist() == expected
    assert coefficients.null.tolist() == [False, True, True, False]
    assert len([line for line in code("method").splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("traces", [2, 3, 4])
def test_its_expected_update_is_the_gradient_of_pass_at_k(method, traces):
    exec(compile(code("check"), "docs/traces.md: check", "exec"), method)  # asserts for K = 3
    world = method["world"]
    update = world.expected_update(
        method["weigh"], world.logp_prior(), 0, traces=traces, evidence="accuracy", targets="sampled"
    )
    chance = world.log_marginal(0).exp()
    assert update.distance(world.gradient(1 - (1 - chance) ** traces)) < 1e-9


def test_it_trains_and_every_key_of_its_metrics_is_explained(method, tiny_llama, tiny_tokenizer, tmp_path):
    trainer = TraceTrainer(
        tiny_llama,
        TraceConfig(
            output_dir=str(tmp_path), prompts_per_window=2, prompts_per_step=1, max_trace_tokens=8, use_cpu=True,
            save_strategy="no",
        ),
        method["recipe"](),
        [problem(1), problem(2)],
        template=TEMPLATE,
        tokenizer=tiny_tokenizer,
        adapter=AdapterConfig(r=2),
        evidence=lambda group: [k + 1.0 for k in range(len(group.traces))],
        show_progress=False,
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {row["phase"] for row in rows} == {"pass_at_k"}
    explained = names([row[0] for row in table("key of metrics.jsonl")])
    assert explained == rows[0].keys()


def test_the_python_api_block_runs(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """With the tiny model in place of the built-in one."""
    import vlm_reason.traces.trainer as module

    asked = []

    def load(name, dtype, device):
        asked.append(name)
        return tiny_llama, tiny_tokenizer

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.chdir(tmp_path)
    exec(compile(code("api"), "docs/traces.md: api", "exec"), {})
    assert asked == ["smollm2-135m"]
    written = {p.name for p in (tmp_path / "runs" / "api" / "adapters").iterdir() if p.is_dir()}
    assert written == {"reasoner", "posterior"}
    assert len((tmp_path / "runs" / "api" / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_presets_table_has_every_preset_with_its_evidence_and_source():
    rows = {row[0].strip("`"): row for row in table("preset")}
    assert list(rows) == list(PRESETS)
    for name, recipe in PRESETS.items():
        _, proposal, evidence, _, _, source = rows[name]
        assert source == recipe.source
        assert names([evidence]) == {phase.evidence.kind for phase in recipe.phases}
        answers = {f"M={p.evidence.samples}" for p in recipe.phases if p.evidence.samples_answers}
        assert set(re.findall(r"M=\d+", evidence)) == answers
        adapters = {c.adapter for phase in recipe.phases for c in phase.proposal.components}
        assert set(re.findall(r"reasoner|posterior|base", proposal)) == adapters
        assert any(phase.proposal.dataset for phase in recipe.phases) == ("given" in proposal)


def test_the_settings_table_has_every_setting_and_its_default(tmp_path):
    rows = table("key")
    own = {
        f.name: f.default for f in dataclasses.fields(TraceConfig) if f.name in TraceConfig.__annotations__
    }
    assert names([row[0] for row in rows]) == own.keys()
    for key, default, _ in rows:
        keys = re.findall(r"`([^`]+)`", key)
        values = [v.strip("` ") for v in default.split(",")] if default else []
        for name, value in zip(keys, values, strict=False):
            spoken = {"none": None, "the recipe's": None, "true": True, "false": False}
            if name == "report_to":
                assert own[name] == value
            elif value in spoken:
                assert own[name] is spoken[value], name
            else:
                assert str(own[name]) == value or float(own[name]) == float(value), name
