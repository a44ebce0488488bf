"""Particles: weights respected, draws in proportion, files; what they cannot do is said."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.chain_parts import adapted, examples, same_trees, state_of, tiny_job
from vlm_reason.errors import UserError
from vlm_reason.weights import Choice, Origin, Posterior
from vlm_reason.weights.adapter import base_fingerprint, peft_config_dict
from vlm_reason.weights.artefact import Tree
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.particles import Particles, in_proportion

CONFIG = {"peft_type": "LORA", "r": 2}


def trees(count: int = 4) -> list[Tree]:
    torch.manual_seed(0)
    return [
        {"l.lora_A.weight": torch.randn(2, 3), "l.lora_B.weight": torch.randn(3, 2), "fixed": torch.ones(2)}
        for _ in range(count)
    ]


def which(posterior: Particles, n: int, seed: int = 0) -> list[int]:
    own = posterior.trees()
    return [next(k for k, t in enumerate(own) if same_trees([t], [d])) for d in posterior.sample(n, seed)]


# ---------------------------------------------------------------------------------------------------------- draws


def test_each_equal_particle_is_drawn_once_and_a_prefix_is_a_prefix() -> None:
    posterior = Particles(CONFIG, trees(5), Origin())
    assert sorted(which(posterior, 5)) == list(range(5)) and len(set(which(posterior, 3))) == 3
    assert Counter(which(posterior, 15)) == {k: 3 for k in range(5)}
    assert which(posterior, 3) == which(posterior, 12)[:3]
    orders = {tuple(which(posterior, 5, seed)) for seed in range(6)}
    assert len(orders) > 1
    firsts = Counter(next(in_proportion(torch.ones(5), 1, seed)) for seed in range(1000))
    assert all(150 < firsts[k] < 250 for k in range(5))


def test_weights_are_respected_evenly_and_without_bias() -> None:
    weights = torch.tensor([0.1, 0.0, 0.37, 0.53], dtype=torch.float64)
    for seed in range(20):
        counts = Counter(in_proportion(weights, 200, seed))
        assert counts[1] == 0
        assert all(abs(counts[k] - 200 * float(w)) <= 3 for k, w in enumerate(weights))
    firsts = [next(in_proportion(weights, 1, seed)) for seed in range(2000)]
    assert firsts.count(0) / 2000 == pytest.approx(0.1, abs=0.025)
    assert firsts.count(3) / 2000 == pytest.approx(0.53, abs=0.04)
    assert list(in_proportion(weights, 9, 1)) == list(in_proportion(weights, 30, 1))[:9]
    posterior = Particles(CONFIG, trees(), Origin(), [2, 0, 1, 1])
    assert posterior.weights.tolist() == [0.5, 0, 0.25, 0.25]
    assert Counter(which(posterior, 400)).keys() == {0, 2, 3}


def test_the_mean_is_the_weighted_one_or_the_one_named() -> None:
    own = trees(3)
    posterior = Particles(CONFIG, own, Origin(), [1, 2, 5])
    for key, value in posterior.mean().items():
        expected = (own[0][key].double() + 2 * own[1][key] + 5 * own[2][key]) / 8
        torch.testing.assert_close(value, expected.float())
    assert same_trees([Particles(CONFIG, own, Origin(), mean=1).mean()], [own[1]])
    assert same_trees([Particles(CONFIG, own, Origin(), mean=own[2]).mean()], [own[2]])
    assert posterior.uncertain() == ["l.lora_A.weight", "l.lora_B.weight"]


def test_changing_what_it_gives_changes_nothing_inside() -> None:
    posterior = Particles(CONFIG, trees(2), Origin(), mean=0)
    for tree in (*posterior.sample(2, 0), *posterior.trees(), posterior.mean()):
        tree["fixed"].zero_()
    assert all(bool(t["fixed"].all()) for t in (*posterior.sample(2, 0), posterior.mean()))


# ------------------------------------------------------------------------------------------------------- on disk


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    posterior = Particles(CONFIG, trees(11), Origin(data_size=9), [1 / 3] * 5 + [0.7] * 6, mean=7)
    loaded = Posterior.load(posterior.save(tmp_path / "a"))
    assert isinstance(loaded, Particles) and loaded.origin == posterior.origin
    assert same_trees(loaded.trees(), posterior.trees())
    assert torch.equal(loaded.weights, posterior.weights)
    assert same_trees([loaded.mean()], [posterior.trees()[7]])
    assert same_trees(list(loaded.sample(20, 3)), list(posterior.sample(20, 3)))
    names = load_file(tmp_path / "a" / "posterior.safetensors")
    assert set(names) == {"weights"} | {f"s{k}.{key}" for k in range(11) for key in trees()[0]}


def test_broken_files_are_refused(tmp_path: Path) -> None:
    folder = Particles(CONFIG, trees(3), Origin()).save(tmp_path / "a")
    whole = load_file(folder / "posterior.safetensors")
    for change, said in (
        ({k: v for k, v in whole.items() if not k.startswith("s1.")}, "without a gap; found s0, s2"),
        ({k: v for k, v in whole.items() if k != "weights"}, "'weights'"),
        ({k: v for k, v in whole.items() if k != "s1.fixed"}, "particles 0 and 1 .* 'fixed'"),
        ({**whole, "s1.fixed": torch.ones(3)}, r"'fixed' has shapes \(2,\) and \(3,\)"),
        ({**whole, "fixed": torch.ones(2)}, "found 'fixed'"),
        ({**whole, "weights": torch.tensor([1.0, -1, 1])}, "weights of particles must be >= 0"),
        ({**whole, "weights": torch.ones(2)}, "2 weights for 3 particles"),
    ):
        save_file(change, folder / "posterior.safetensors")
        with pytest.raises(UserError, match=said):
            Posterior.load(folder)


def test_what_particles_lack_is_said() -> None:
    posterior = Particles(CONFIG, trees(2), Origin())
    tree = posterior.mean()
    for call in (
        lambda: posterior.log_prob(tree), lambda: posterior.kl(), posterior.precision_diag,
        lambda: posterior.temper(2.0), lambda: posterior.prune(0.1), lambda: posterior.output_covariance({}),
        lambda: posterior.sample(4, 0, antithetic=True),
    ):  # fmt: skip
        with pytest.raises(UserError, match="family 'particles' has no"):
            call()
    for wrong, said in (
        (lambda: Particles(CONFIG, [], Origin()), "no particles"),
        (lambda: Particles(CONFIG, trees(2), Origin(), [0.0, 0.0]), "not all 0"),
        (lambda: Particles(CONFIG, trees(2), Origin(), mean=2), "no particle 2, they are 0 to 1"),
        (lambda: Particles(CONFIG, [{"a": torch.tensor([torch.nan])}], Origin()), "NaN"),
        (lambda: posterior.sample(0, 0), "at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=said):
            wrong()


# ------------------------------------------------------------------------------------------------------ on a model


def test_predictions_of_particles_are_those_of_the_adapters(tiny_llama: Any, tmp_path: Path) -> None:
    model = adapted(copy.deepcopy(tiny_llama))
    first = state_of(tiny_job(copy.deepcopy(tiny_llama)))
    torch.manual_seed(4)
    members = [{k: v + 0.2 * torch.randn_like(v) for k, v in first.items()} for _ in range(3)]
    origin = Origin(base_fingerprint(model))
    posterior = Particles(peft_config_dict(model, "default"), members, origin, mean=1)
    likelihood, rows = Choice((3, 5, 7)), examples(6)
    together = posterior.predictive(model, rows, likelihood, 3)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for folder in posterior.export_samples(3, tmp_path / "draws", seed=0):
        stock = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), folder)
        with torch.no_grad():
            expected += likelihood.outputs(stock, make_batch(rows)).double().softmax(-1) / 3
    torch.testing.assert_close(together.probs, expected, rtol=0, atol=1e-5)
