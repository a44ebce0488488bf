"""vlm-reason compare: pairs on ids, refuses other problems, and adjusts for having looked several times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from tests.suite_parts import record
from vlm_reason.cli.main import main
from vlm_reason.errors import UserError
from vlm_reason.evaluation.comparing import compare_outcomes, problem_hash, read_outcomes
from vlm_reason.stats import holm
from vlm_reason.store import SampleStore


def write_result(path: Path, tasks: Mapping[str, Mapping[str, float]], question: str = "what is {}?") -> str:
    items = {
        task: {i: {"problem": problem_hash(question.format(i), "1"), "correct": v} for i, v in values.items()}
        for task, values in tasks.items()
    }
    keys = dict.fromkeys(("suite", "config", "commit", "machine", "date", "rows"))
    path.write_text(json.dumps({"schema": 1, **keys, "items": items}))
    return str(path)


def outcomes(seed: int, n: int = 60, p: float = 0.5) -> dict[str, float]:
    draws = np.random.default_rng(seed).random(n) < p
    return {f"q{i}": float(v) for i, v in enumerate(draws)}


def test_differences_are_paired_and_adjusted_over_every_comparison_made(tmp_path: Path) -> None:
    base = {"x": outcomes(1), "y": outcomes(2, p=0.3)}
    better = {
        "x": {i: max(v, float(k % 4 == 0)) for k, (i, v) in enumerate(base["x"].items())},
        "y": base["y"],
    }
    other = {"x": outcomes(5), "y": outcomes(6, p=0.6)}
    files = [write_result(tmp_path / f"{n}.json", t) for n, t in (("a", base), ("b", better), ("c", other))]
    compared = compare_outcomes([read_outcomes(f) for f in files])
    ps, keys = [], [(task, f) for f in files[1:] for task in ("x", "y")]
    for task, f in keys:
        system = better if f == files[1] else other
        d = np.array([system[task][i] - base[task][i] for i in base[task]])
        found = compared.differences[task, f]
        assert found.value == pytest.approx(d.mean()) and found.n == 60
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        p = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
        assert found.p == pytest.approx(p)
        se = d.std(ddof=1) / np.sqrt(60)
        assert found.mde == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * se)
        ps.append(p)
    assert [compared.differences[k].p_holm for k in keys] == pytest.approx(holm(ps))
    assert compared.means["x"][0] == pytest.approx(np.mean(list(base["x"].values())))


def test_other_problems_are_refused_or_cut_to_the_common_ones_with_a_line(tmp_path: Path, capfd: Any) -> None:
    """Peers compare two files over different items and say nothing."""
    a = write_result(tmp_path / "a.json", {"x": outcomes(1, 60)})
    b = write_result(tmp_path / "b.json", {"x": {k: v for k, v in outcomes(2, 70).items() if k != "q3"}})
    assert main(["compare", a, b]) == 2
    said = capfd.readouterr().err
    assert "not the same problems (60 in" in said and "59 in all of them" in said and said.count("\n") == 1
    assert main(["compare", a, b, "--common", "--json"]) == 0
    out = capfd.readouterr()
    result = json.loads(out.out)
    assert result["rows"][0]["difference"]["n"] == 59
    assert result["left_out"] == [
        f"task x: 1 of 60 problems of {a} are not in every result",
        f"task x: 10 of 69 problems of {b} are not in every result",
    ]
    assert "left out: task x: 10 of 69" in out.err
    c = write_result(tmp_path / "c.json", {"z": outcomes(1)})
    with pytest.raises(UserError, match="task 'x' is not in|task 'z' is not in"):
        compare_outcomes(
            [read_outcomes(a), read_outcomes(write_result(tmp_path / "d.json", {"x": {}, "z": {}}))]
        )
    with pytest.raises(UserError, match="no problem in common"):
        compare_outcomes(
            [read_outcomes(a), read_outcomes(write_result(tmp_path / "e.json", {"x": {"r": 1.0}}))], True
        )
    with pytest.raises(UserError, match="given the same result twice"):
        compare_outcomes([read_outcomes(a), read_outcomes(a)])
    assert read_outcomes(c).values["z"] == outcomes(1)


def test_an_id_that_is_another_question_is_refused(tmp_path: Path) -> None:
    a = write_result(tmp_path / "a.json", {"x": outcomes(1)})
    b = write_result(tmp_path / "b.json", {"x": outcomes(1)}, question="which is {}?")
    with pytest.raises(UserError, match=r"'q0' is one problem in .* and another in"):
        compare_outcomes([read_outcomes(a), read_outcomes(b)])


def test_files_that_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is no result file"):
        read_outcomes(str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match="it has no 'suite'"):
        read_outcomes(str(tmp_path / "x.json"))
    data = json.loads(Path(write_result(tmp_path / "y.json", {"x": outcomes(1)})).read_text())
    (tmp_path / "y.json").write_text(json.dumps({**data, "schema": 2}))
    with pytest.raises(UserError, match="has schema 2, and this version reads 1"):
        read_outcomes(str(tmp_path / "y.json"))
    with pytest.raises(UserError, match="has no answer_accuracy"):
        read_outcomes(write_result(tmp_path / "z.json", {"x": outcomes(1)}), "answer_accuracy")


def test_systems_of_one_store(tmp_path: Path) -> None:
    base = [
        record(i, k, k == 0, "base/prior", "aa", "1" if k == 0 else "2") for i in range(20) for k in range(3)
    ]
    trained = [
        record(i, k, k < 2, "reasoner/prior", "aa+bb", "1" if k < 2 else "2")
        for i in range(20)
        for k in range(3)
    ]
    with SampleStore(tmp_path / "samples") as store:
        store.append([*base, *trained])
    folder = str(tmp_path / "samples")
    with pytest.raises(UserError, match="samples of several systems"):
        read_outcomes(folder)
    with pytest.raises(UserError, match="base or trained, got 'best'"):
        read_outcomes(f"{folder}#best")
    pair = [read_outcomes(f"{folder}#{name}") for name in ("base", "trained")]
    difference = compare_outcomes(pair).differences["samples", f"{folder}#trained"]
    assert difference.value == pytest.approx(1 / 3) and difference.n == 20
    ranked = [read_outcomes(f"{folder}#{name}", "answer_accuracy") for name in ("base", "trained")]
    assert compare_outcomes(ranked).means["samples"] == (0.0, 1.0)  # two votes of three
