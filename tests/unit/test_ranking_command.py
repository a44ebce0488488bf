"""vlm-reason rank: all methods side by side, imported samples, members; on stores written here, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlm_reason.cli import rank as command
from vlm_reason.cli import wiring
from vlm_reason.cli.main import main
from vlm_reason.engines.base import ScoreRequest
from vlm_reason.store import SampleRecord, SampleStore

BIASED, RIGHT = 9, 7


def sample(problem: int, k: int, answer: str, **changes: object) -> SampleRecord:
    """A rationale of one token (its answer's first digit), and an answer of one token, the gold one being "1"."""
    z = int(answer[0])
    fields = {
        "key": f"{problem:016x}{k:08x}{int(changes.get('member') or 0):08x}", "problem_id": f"p{problem:02d}",
        "question": f"{problem}?", "reference": "1", "prompt_ids": (problem,), "trace_ids": (z,), "trace_text": f"z{z}",
        "trace_logps": (-1.0,), "finish": "stop", "seed": k, "temperature": 1.0, "top_p": 1.0,
        "proposal": "reasoner/prior", "saw_answer": False, "weights": "w", "engine": "e", "k": k, "m": 1,
        "answer_ids": (z,), "answer_text": answer, "answer_logps": (-0.5,), "answer_finish": "stop", "answer_seed": k,
        "correct": z == 1, "score": float(z == 1), "parsed": answer, "failed": False, "canonical": str(z),
    }  # fmt: skip
    return SampleRecord(**{**fields, **changes})  # type: ignore[arg-type]


class Engine:
    """Behind every rationale the right answer has probability 0.8 and any other 0.1; log p(z | x) = -3 z."""

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        def one(request: ScoreRequest) -> float:
            if len(request.context_ids) == 1:
                return -3.0 * request.target_ids[0]
            return math.log(0.8 if request.target_ids[0] == 1 else 0.1)

        return [(one(r),) for r in requests]


class Builder:
    cue_ids = ()


def recipe(folder: Path, records: Sequence[SampleRecord]) -> Path:
    with SampleStore(folder / "run" / "samples") as store:
        store.append(records)
    path = folder / "recipe.yaml"
    path.write_text(f"output_dir: {folder / 'run'}\nverifier: number\n")
    return path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(config: object, systems: Sequence[str]) -> dict[str, wiring.Served]:
        return {s: wiring.Served(s, Engine(), Builder(), "reasoner", "w") for s in systems}  # type: ignore[arg-type]

    monkeypatch.setattr(command, "serve", serve)


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict:
    status = main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return json.loads(out)


def store_of(answers: Sequence[str], problems: int = 6, **changes: object) -> list[SampleRecord]:
    return [sample(p, k, a, **changes) for p in range(problems) for k, a in enumerate(answers)]


def test_all_methods_side_by_side(tmp_path: Path, capfd, served) -> None:
    """The vote is 2, 2, 1: wrong. The model believes 1 behind every rationale, so mixture is right. One
    problem has no right sample, which no ranker can mend."""
    records = [*store_of(["2", "2", "1"]), *(sample(99, k, "3") for k in range(3))]
    result = run(capfd, "rank", recipe(tmp_path, records), "--method", "all")
    assert json.loads((tmp_path / "run" / "ranking" / "all.json").read_text())["methods"] == result["methods"]
    vote, mixture = result["methods"]["majority"], result["methods"]["mixture"]
    assert vote["accuracy"]["value"] == 0 and vote["minus_majority"] is None
    assert (vote["selection_failures"], vote["coverage_failures"], result["coverage_failures"]) == (6, 1, 1)
    assert mixture["accuracy"]["value"] == pytest.approx(6 / 7) and mixture["selection_failures"] == 0
    gain = mixture["minus_majority"]
    assert (gain["wins"], gain["losses"], gain["ties"]) == (6, 0, 1) and gain["value"] == pytest.approx(6 / 7)
    assert set(result["skipped"]) == {"best_of_n_reward", "best_of_n_min", "best_of_n_prod", "best_of_n_last"}
    assert result["skipped"]["best_of_n_min"] == "the samples have no step_rewards"
    assert result["answers"]["p00"]["majority"] == "2" and result["answers"]["p00"]["mixture"] == "1"
    assert mixture["mass"] == pytest.approx(0.9)
    assert main(["rank", str(tmp_path / "recipe.yaml"), "--method", "all"]) == 0
    shown = capfd.readouterr().out
    assert "10 ways to rank 7 problems" in shown and "minus majority" in shown and "never sampled: 1" in shown


def test_tempered_samples_are_weighed_and_poor_weights_are_said(tmp_path: Path, capfd, served) -> None:
    """log q = -1 of each, log p = -3 z: the weights of 1, 2, 3, 3 are e^-2, e^-5, e^-8, e^-8, ESS about 1.1."""
    path = recipe(tmp_path, store_of(["1", "2", "3", "3"], temperature=2.0))
    result = run(capfd, "rank", path, "--method", "importance")
    weights = [math.exp(-3 * z + 1) for z in (1, 2, 3, 3)]
    assert (
        result["ess"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))
        and result["low_ess"] == 6
    )
    assert (
        "effective sample size is below 2" in result["warnings"][0]
        and "6 of 6 problems" in result["warnings"][0]
    )
    entry = result["rankings"][0]
    assert (
        entry["flags"] == ["degenerate", "low_ess"]
        and entry["outcome"] == "right"
        and entry["pareto_k"] is None
    )
    assert entry["rationales"][0]["answer"] == "1" and entry["rationales"][0]["posterior"] > 0.9
    assert main(["rank", str(path)]) == 0
    assert "mixture assumes rationales drawn at temperature 1" in capfd.readouterr().err


def test_imported_text_with_rewards_needs_no_model(tmp_path: Path, capfd) -> None:
    text = {"trace_ids": (), "trace_logps": (), "answer_ids": (), "answer_logps": (), "proposal": "imported"}
    records = [
        sample(p, k, a, reward=reward, **text)
        for p in range(3)
        for k, (a, reward) in enumerate((("2", -1.0), ("2", -2.0), ("1", 3.0)))
    ]
    path = recipe(tmp_path, records)
    best = run(capfd, "rank", path, "--method", "best_of_n_reward")
    assert best["system"] == "imported" and best["accuracy"]["value"] == 1
    both = run(capfd, "rank", path, "--method", "all")
    assert set(both["methods"]) == {"majority", "weighted_vote", "best_of_n_reward"}
    assert (
        both["methods"]["weighted_vote"]["accuracy"]["value"] == 1
    )  # sigmoid(3) > sigmoid(-1) + sigmoid(-2)
    assert "without token ids" in both["skipped"]["mixture"]
    assert main(["rank", str(path)]) == 2
    assert "mixture needs logp_answer: the samples are text without token ids" in capfd.readouterr().err


def test_members_are_ranked_each_and_averaged(tmp_path: Path, capfd) -> None:
    records = [
        sample(0, k, a, member=member) for member, a in ((0, "1"), (1, "1"), (2, "2")) for k in range(3)
    ]
    result = run(capfd, "rank", recipe(tmp_path, records), "--method", "majority")
    (entry,) = result["rankings"]
    assert entry["answer"] == "1" and [a["posterior"] for a in entry["answers"]] == pytest.approx(
        [2 / 3, 1 / 3]
    )
    third = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert entry["mutual_information"] == pytest.approx(third)
    assert {r["member"] for r in entry["rationales"]} == {0, 1, 2} and len(entry["rationales"]) == 9


def test_hinted_samples_are_refused(tmp_path: Path, capfd) -> None:
    path = recipe(tmp_path, store_of(["1", "2"], saw_answer=True))
    assert main(["rank", str(path), "--method", "majority"]) == 2
    assert "2 of 2 rationales were drawn behind the answer" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("problem", "changes", "said"),
    [
        (1, {"member": 0, "weights": "b"}, "records of 2 models (a member 0, b member 0)"),
        (1, {"weights": "b"}, "records of 2 models (a member 0, b)"),
        (0, {"member": 0, "weights": "a"}, "holds trace 0 of problem 'p00' twice"),
        (0, {"member": 0, "weights": "a", "m": 2, "temperature": 0.5}, "several temperature: 0.5, 1.0"),
    ],
)
def test_what_is_no_one_system_is_not_ranked(
    tmp_path: Path, capfd, problem: int, changes: dict[str, object], said: str
) -> None:
    """Two posteriors, a model beside a member, one trace under two settings, two temperatures."""
    records = [
        sample(0, 0, "1", member=0, weights="a", proposal="imported"),
        sample(problem, 0, "2", proposal="imported", key="f" * 32, **changes),
    ]
    path = recipe(tmp_path, records)
    assert main(["rank", str(path), "--method", "majority"]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "ranking").exists()
