"""Thresholds that keep a risk, active learning, and the command that offers both."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

from tests.suite_parts import record
from vlm_reason.cli.main import main
from vlm_reason.errors import UserError
from vlm_reason.evaluation.acquiring import acquire, member_probabilities
from vlm_reason.evaluation.beliefs import Belief, beliefs
from vlm_reason.evaluation.selective import GRID, apply_threshold, choose_threshold
from vlm_reason.store import SampleRecord, SampleStore


def test_zero_errors_certify_exactly_when_the_binomial_says_so() -> None:
    """(1 - r)^n <= delta / |T|: at r = 0.1 and delta = 0.05 it takes 60."""
    needed = math.ceil(math.log(0.05 / len(GRID)) / math.log(0.9))
    enough = choose_threshold(np.full(needed, 0.9), np.ones(needed), 0.1)
    assert enough.guaranteed and enough.value == 0.0 and enough.answered == needed and enough.bound <= 0.1
    short = choose_threshold(np.full(needed - 1, 0.9), np.ones(needed - 1), 0.1)
    assert not short.guaranteed and short.value == math.inf and short.answered == 0
    assert apply_threshold(short, [0.9, 1.0], [1, 1]).coverage.value == 0
    assert math.isnan(apply_threshold(short, [0.9, 1.0], [1, 1]).risk.value)


def world(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Vote shares of 8; the chance of being right is the share, squared."""
    c = rng.integers(0, 9, n) / 8
    return c, (rng.random(n) < c**2).astype(float)


def test_the_plug_in_rule_takes_a_share_of_errors_that_is_the_target() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point; 29 wrong of 100 are a risk of 0.29."""
    y = np.r_[np.zeros(29), np.ones(71)]
    chosen = choose_threshold(np.full(100, 0.5), y, 0.29, 0.1, "plug-in")
    assert (chosen.answered, chosen.wrong) == (100, 29)


def test_the_certificate_holds_and_the_plug_in_rule_promises_nothing() -> None:
    """Over 400 calibration sets of 300: the true risk of the chosen threshold is known, so failures can be counted."""
    rng = np.random.default_rng(0)
    shares = np.arange(9) / 8

    def true_risk(threshold: float) -> float:
        kept = shares >= threshold - 1e-9
        return float(1 - (shares[kept] ** 2).mean()) if kept.any() else 0.0

    failures = {"certified": 0, "plug-in": 0}
    answered = 0
    for _ in range(400):
        c, y = world(rng, 300)
        for rule in failures:
            chosen = choose_threshold(c, y, 0.2, 0.1, rule)  # type: ignore[arg-type]
            failures[rule] += true_risk(chosen.value) > 0.2
            answered += rule == "certified" and chosen.guaranteed
    assert failures["certified"] <= 0.1 * 400 and answered > 200
    assert failures["plug-in"] > 0.1 * 400


def test_a_share_that_came_out_of_a_softmax_still_reaches_its_threshold() -> None:
    below = math.nextafter(0.35, 0)
    chosen = choose_threshold(np.full(200, below), np.ones(200), 0.1)
    assert apply_threshold(chosen, [below], [1]).coverage.value == 1
    assert (
        apply_threshold(
            choose_threshold([0.2] * 50 + [below] * 200, [0] * 50 + [1] * 200, 0.1), [below], [1]
        ).coverage.value
        == 1
    )


@pytest.mark.parametrize(("risk", "delta"), [(0, 0.1), (1, 0.1), (0.1, 0), (math.nan, 0.1)])
def test_targets_outside_the_open_interval(risk: float, delta: float) -> None:
    with pytest.raises(UserError, match=r"must be in \(0, 1\)"):
        choose_threshold([0.5], [1], risk, delta)


def test_input_that_is_not_as_said() -> None:
    with pytest.raises(UserError, match="no problems to calibrate on"):
        choose_threshold([], [], 0.1)
    for confidence, correct in (([1.5], [1]), ([math.nan], [1]), ([0.5], [0.5]), ([0.5, 0.5], [1])):
        with pytest.raises(ValueError):
            choose_threshold(confidence, correct, 0.1)


# ---- active learning


def samples(problem: int, votes: Sequence[Sequence[str]]) -> list[SampleRecord]:
    """votes[m]: the answers that member m sampled."""
    import dataclasses

    found = []
    for m, answers in enumerate(votes):
        for k, answer in enumerate(answers):
            made = record(problem, k, answer == "1", "reasoner/prior", f"base+{m}", answer)
            found.append(
                dataclasses.replace(made, key=f"{problem:08x}{k:08x}{m:016x}", member=m, seed=100 * m + k)
            )
    return found


AGREE, SPLIT, NOISE = [["1"] * 4, ["1"] * 4], [["1"] * 4, ["2"] * 4], [["1", "2"] * 2, ["1", "2"] * 2]


def believe(*votes: Sequence[Sequence[str]]) -> dict[str, Belief]:
    return beliefs([r for i, v in enumerate(votes) for r in samples(i, v)])


def test_disagreement_is_told_from_noise() -> None:
    """Members that contradict one another, and members that are all equally unsure: only BALD sees the difference."""
    believed = believe(AGREE, NOISE, SPLIT)
    assert [b.total_entropy for b in believed.values()] == pytest.approx(
        [0, math.log(2), math.log(2)], abs=1e-12
    )
    assert [b.expected_entropy for b in believed.values()] == pytest.approx([0, math.log(2), 0], abs=1e-12)
    assert [b.mutual_information for b in believed.values()] == pytest.approx([0, 0, math.log(2)], abs=1e-12)
    assert [a.problem_id for a in acquire(believed, "bald", 1)] == ["p2"]
    assert {a.problem_id for a in acquire(believed, "entropy", 2)} == {"p1", "p2"}
    assert {a.problem_id for a in acquire(believed, "least_confidence", 2)} == {"p1", "p2"}
    assert acquire(believed, "random", 2, seed=3) == acquire(believed, "random", 2, seed=3)
    assert len(acquire(believed, "random", 99)) == 3


def test_a_batch_does_not_hold_two_copies_of_one_question() -> None:
    """Greedy joint information against enumeration: p0 and p1 split the members the same way, p2 another way."""
    votes = [
        [["1"] * 4, ["1"] * 4, ["2"] * 4, ["2"] * 4],
        [["1"] * 4, ["1"] * 4, ["2"] * 4, ["2"] * 4],
        [["1"] * 4, ["2", "1", "1", "1"], ["1"] * 4, ["2"] * 4],
    ]
    believed = believe(*votes)
    table = member_probabilities(list(believed.values()), 4)

    def joint(batch: tuple[int, ...]) -> float:
        """H[y_batch] - mean_m H[y_batch | m] by listing all answers."""
        each = [
            [
                math.prod(table[m, i, y] for i, y in zip(batch, ys, strict=True))
                for ys in product(range(table.shape[2]), repeat=len(batch))
            ]
            for m in range(4)
        ]
        return float(entropy(np.mean(each, axis=0)) - np.mean([entropy(p) for p in each]))

    first = max(range(3), key=lambda i: joint((i,)))
    second = max((i for i in range(3) if i != first), key=lambda i: joint((first, i)))
    picked = [a.problem_id for a in acquire(believed, "bald", 2)]
    assert picked == [f"p{first}", f"p{second}"] == ["p0", "p2"]


def test_bald_needs_members_and_a_member_without_an_answer_is_neutral() -> None:
    with pytest.raises(UserError, match="bald needs samples of two or more members"):
        acquire(beliefs(samples(0, [["1", "2"]])), "bald", 1)
    with pytest.raises(UserError, match="size must be >= 1"):
        acquire(believe(SPLIT), "bald", 0)
    import dataclasses

    silent = [
        dataclasses.replace(r, canonical=None, correct=False) if r.member == 2 else r
        for r in samples(0, [["1"] * 4, ["2"] * 4, ["1"] * 4])
    ]
    believed = beliefs(silent)
    assert believed["p0"].heard == 2
    mute = [dataclasses.replace(r, canonical=None, correct=False) for r in silent]
    with pytest.raises(UserError, match="no problem has readable answers of two members"):
        acquire(beliefs(mute), "bald", 1)
    assert member_probabilities([believed["p0"]], 3)[2, 0] == pytest.approx([0.5, 0.5])


# ---- the command


@pytest.fixture
def stores(tmp_path: Path) -> tuple[str, str, str]:
    rng = np.random.default_rng(7)
    folders = []
    for name, start, count in (("dev", 0, 200), ("test", 1000, 150), ("other", 5000, 100)):
        found = []
        for i in range(start, start + count):
            easy = rng.random() < 0.6 and name != "other"
            votes = [["1"] * 8 if easy else rng.choice(["1", "2", "3"], 8).tolist()]
            found += samples(i, votes)
        with SampleStore(tmp_path / name) as store:
            store.append(found)
        folders.append(str(tmp_path / name))
    return tuple(folders)  # type: ignore[return-value]


def test_select_command(stores: tuple[str, str, str], tmp_path: Path, capfd: Any) -> None:
    dev, test, other = stores
    chosen = tmp_path / "label.jsonl"
    arguments = ["select", test, "--by", "entropy", "--size", "5", "-o", str(chosen)]
    arguments += ["--calibrate", dev, "--risk", "0.1", "--alpha", "0.2", "--ood", other]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [json.loads(line)["id"] for line in chosen.read_text().splitlines()] == [
        p["id"] for p in result["chosen"]["problems"]
    ]
    selective = result["selective"]
    assert selective["guaranteed"] and selective["calibration"]["risk_bound"] <= 0.1
    assert 0.3 < selective["test"]["coverage"]["value"] < 0.9 and selective["test"]["risk"]["value"] <= 0.1
    assert result["conformal"]["coverage"]["value"] >= 0.7 and result["conformal"]["remarks"] == []
    assert result["ood"]["scores"]["entropy"]["auroc"]["value"] > 0.7
    assert "mutual_information" not in result["ood"]["scores"]
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    assert "guaranteed: risk at most 0.1" in shown and "5 of 150 problems to label, by entropy" in shown
    assert main([*arguments, "--plug-in"]) == 0 and "no guarantee" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to select"),
        (["--risk", "0.1"], "need --calibrate"),
        (["--calibrate", "x"], "needs --risk or --alpha"),
        (["--risk", "0.1", "-o", "f", "--calibrate", "x"], "give --by"),
        (["--alpha", "2", "--calibrate", "x"], "--alpha must be in (0, 1)"),
        (["--alpha", "0.1", "--delta", "2", "--calibrate", "x"], "--delta must be in (0, 1)"),
        (["--alpha", "0.1", "--plug-in", "--calibrate", "x"], "give --risk"),
        (["--by", "entropy", "-o", "/"], "-o '/' is a folder"),
        (["--by", "entropy", "--rank", "majorty"], "did you mean 'majority'"),
        (["--by", "bald"], "bald needs samples of two or more members"),
    ],
)
def test_select_says_what_is_missing(
    stores: tuple[str, str, str], capfd: Any, arguments: list[str], said: str
) -> None:
    assert main(["select", stores[1], *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1
