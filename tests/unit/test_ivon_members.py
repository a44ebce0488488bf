"""Posterior folders as members of a suite; and from a recipe with `optim: ivon` to the split of its uncertainty."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suite_parts import save_adapter, save_model, suite_data
from tests.unit.test_ivon_recipe import recipe, train
from vlm_reason.config import from_dict
from vlm_reason.errors import UserError
from vlm_reason.evaluation.members import load_members
from vlm_reason.evaluation.suite import Draws, SuiteConfig
from vlm_reason.evaluation.suite_run import run_suite
from vlm_reason.models.load import fingerprint_weights, load_model
from vlm_reason.store import SampleStore
from vlm_reason.weights import DiagonalGaussian, Origin
from vlm_reason.weights.artefact import read_json, read_tensors

__all__ = ["recipe"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore:IVON. .* of hess_init")


@pytest.fixture
def model(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    return save_model(tiny_llama, tiny_tokenizer, tmp_path / "model")


@pytest.fixture
def posterior(model: Path, tmp_path: Path) -> Path:
    """Around an adapter, every weight uncertain by 0.2."""
    adapter = save_adapter(tmp_path / "adapter", model, seed=1)
    mean = read_tensors(adapter / "adapter_model.safetensors")
    base = fingerprint_weights(load_model(str(model), "float32")[0])
    sigma = {k: torch.full_like(v, 0.2) for k, v in mean.items()}
    q = DiagonalGaussian(read_json(adapter / "adapter_config.json"), mean, sigma, Origin(base))
    return q.save(tmp_path / "posterior")


def test_a_draw_is_the_member_that_its_export_is(model: Path, posterior: Path, tmp_path: Path) -> None:
    entry = Draws(str(posterior), draws=3, seed=5)
    drawn = load_members(str(model), "float32", [entry, str(posterior)], {})
    folders = DiagonalGaussian.load(posterior).export_samples(3, tmp_path / "draws", seed=5)
    exported = load_members(str(model), "float32", [*map(str, folders), str(tmp_path / "adapter")], {})
    assert [m.weights for m in drawn][:3] == [m.weights for m in exported][:3]
    assert [m.adapter for m in drawn] == ["member0", "member1", "member2", "member3"]
    assert [m.index for m in drawn] == [0, 1, 2, 3] and len({m.weights for m in drawn}) == 4
    assert [m.name for m in drawn][1:] == [
        f"{posterior}: draw 1 of seed 5", f"{posterior}: draw 2 of seed 5", str(posterior),
    ]  # fmt: skip
    ids = torch.arange(4, 12)[None]
    for a, b in zip(drawn, exported, strict=True):  # the last: a posterior's folder alone is its mean
        with drawn.serve(a) as one, exported.serve(b) as other:
            logits = []
            for engine, member in ((one, a), (other, b)):
                network: Any = engine.model  # type: ignore[attr-defined]
                network.set_adapter(member.adapter)
                logits.append(network(ids).logits)
        assert torch.equal(*logits)


def test_temper_narrows_the_draws(model: Path, posterior: Path) -> None:
    mean = DiagonalGaussian.load(posterior).mean()
    spreads = []
    for temper in (1.0, 4.0):
        members = load_members(str(model), "float32", [Draws(str(posterior), 1, 0, temper)], {})
        with members.serve(next(iter(members))) as engine:
            own = dict(engine.model.named_parameters())  # type: ignore[attr-defined]
            key, value = next((k, v) for k, v in mean.items() if "lora_A" in k)
            spreads.append(own[key.replace(".weight", ".member0.weight")] - value)
    torch.testing.assert_close(spreads[0], 2 * spreads[1])


def test_wrong_draws_are_refused(model: Path, posterior: Path, tmp_path: Path) -> None:
    data = suite_data(tmp_path / "suite", model)
    for members, message in (
        ([{"posterior": str(posterior), "draws": 0}], "draws must be >= 1"),
        ([{"posterior": str(posterior), "draw": 2}], "draw'; did you mean 'draws'"),
        ([{"posterior": str(posterior)}], "missing config key .*draws"),
        ([{"posterior": "p", "draws": 2}, {"posterior": "p", "draws": 1}], "twice: p with seed 0"),
    ):
        with pytest.raises(UserError, match=message):
            from_dict(SuiteConfig, {**data, "members": members})
    with pytest.raises(UserError, match="holds no posterior"):
        load_members(str(model), "float32", [Draws(str(tmp_path / "adapter"), 1)], {})
    with pytest.raises(UserError, match="all adapters or all whole models"):
        load_members(str(model), "float32", [Draws(str(posterior), 1), str(model)], {})
    with pytest.raises(UserError, match="fitted on a base model with hash"):
        load_members(str(model), "bfloat16", [Draws(str(posterior), 1)], {})


def test_from_a_recipe_to_draws_times_traces(recipe: Any, tmp_path: Path) -> None:
    """The posterior of a training run, M draws x N traces of it mixed, and the uncertainty split in two."""
    sizes = {"learning_rate": 1e-3, "save_strategy": "no", "rounds": 1}
    train(recipe(trainer=sizes, ivon={"sigma": 0.01}))
    folder = str(tmp_path / "run/posterior")
    data = suite_data(tmp_path / "suite", tmp_path / "model", problems=3)
    data["members"] = [{"posterior": folder, "draws": 3, "seed": 1}]
    data["sampling"] |= {"traces": 8, "max_trace_tokens": 20}
    result = run_suite(from_dict(SuiteConfig, data))
    assert [m["index"] for m in result["model"]["members"]] == [0, 1, 2]
    heard = [i for i in result["items"]["low"].values() if i["mutual_information"] is not None]
    assert heard, {r["metric"]: r["value"] for r in result["rows"]}
    for item in heard:
        within, between = item["expected_entropy"], item["mutual_information"]
        assert math.isclose(item["entropy"], within + between, abs_tol=1e-9)
        assert 0 <= item["mutual_information_corrected"] <= between
    # traces differ within a draw; few of them look like draws that differ, which the correction knows
    assert any(
        i["expected_entropy"] > 0 and i["mutual_information_corrected"] < i["mutual_information"]
        for i in heard
    )
    with SampleStore(tmp_path / "suite/out/low/samples") as store:
        records = list(store.records())
    assert Counter(r.member for r in records) == {0: 3 * 8, 1: 3 * 8, 2: 3 * 8}
    assert len({r.weights for r in records}) == 3
    again = run_suite(from_dict(SuiteConfig, data))  # a draw is a function of its seed: nothing is drawn anew
    assert again["cost"]["tokens_drawn_now"] == 0 and again["rows"] == result["rows"]
