"""sample -> rank -> eval through the command line, with an engine that adds instead of a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from vlm_reason.cli import evaluate, rank, sample, wiring
from vlm_reason.cli.main import main
from vlm_reason.engines.base import SampleRequest, ScoreRequest
from vlm_reason.types import Completion, Problem, StopRule

SKILL = {None: 0.3, "reasoner": 0.8}
CUT, GOOD, BAD, CUE = 1, 2, 3, 9


class Builder:
    """A problem's prompt is its reference answer: the fake engine must know what is right."""

    cue_ids = (CUE,)
    trace_stop = StopRule(("T",))
    answer_stop = StopRule(("A",), eos_is_stop=True)

    def prior_ids(self, problem: Problem) -> tuple[int, ...]:
        return (100 + int(problem.answer),)

    def direct_ids(self, problem: Problem) -> tuple[int, ...]:
        return (*self.prior_ids(problem), BAD, CUE)

    def answer_ids(self, text: str) -> tuple[int, ...]:
        return (100 + int(text),)

    def parse_answer(self, text: str) -> str | None:
        return text or None

    def fingerprint(self) -> str:
        return "fake"


class Engine:
    """Traces are good with probability SKILL[adapter], cut with 0.1, else bad; a good one answers rightly, a bad one
    one too many."""

    drawn = 0

    def sample(self, requests: Sequence[SampleRequest], progress: str | None = None) -> list[Completion]:
        Engine.drawn += len(requests)
        return [self._one(r, random.Random(r.seed).random()) for r in requests]

    def _one(self, request: SampleRequest, u: float) -> Completion:
        if request.stop == Builder.trace_stop:
            trace = CUT if u < 0.1 else GOOD if u < 0.1 + 0.9 * SKILL[request.law.adapter] else BAD
            return Completion(
                (trace,), (-0.5,), f"trace {trace}", "length" if trace == CUT else "stop", request.seed
            )
        right, trace, _ = request.prompt_ids
        ids = (right + (trace == BAD),)
        return Completion(ids, (-0.1,), str(ids[0] - 100), "stop", request.seed)

    def score(self, requests: Sequence[ScoreRequest], progress: str | None = None) -> list[tuple[float, ...]]:
        return [
            (-0.1 if r.target_ids[0] == r.context_ids[0] + (r.context_ids[1] == BAD) else -5.0,)
            for r in requests
        ]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def fake_serve(config, systems):
        weights = {"base": "aa", "trained": "aa+bb"}
        return {s: wiring.Served(s, Engine(), Builder(), wiring.ADAPTER_OF[s], weights[s]) for s in systems}

    for module in (sample, rank, evaluate):
        monkeypatch.setattr(module, "serve", fake_serve)
    monkeypatch.setattr(evaluate, "trained_folder", lambda config: tmp_path)
    monkeypatch.setattr(sample, "default_system", lambda config: "trained")
    rows = [{"question": f"{n} + 0?", "answer": str(n)} for n in range(60)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'run'}\nverifier: number\n"
        f"eval_task: {{kind: jsonl, name: {tmp_path / 'test.jsonl'}}}\n"
        "sampling: {traces: 5}\nevaluation: {traces: 4, temperature: 1.0, bound_traces: 4}\n"
    )
    return path


def run(capfd, *arguments: object) -> dict:
    status = main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_samples_are_drawn_once_then_ranked_and_judged_without_a_model(recipe: Path, capfd) -> None:
    first = run(capfd, "sample", recipe)
    assert first["system"] == "trained" and first["problems"] == 60 and first["new"] == 300
    assert first["accuracy"]["value"] == pytest.approx(0.9 * 0.8, abs=0.08)
    drawn = Engine.drawn
    again = run(capfd, "sample", recipe)
    assert again["new"] == 0 and Engine.drawn == drawn and again["accuracy"] == first["accuracy"]
    assert run(capfd, "sample", recipe, "sampling.traces=6")["new"] == 60
    run(capfd, "sample", recipe, "--system", "base", "sampling.traces=6")

    stored = run(capfd, "eval", recipe, "--from-store")
    assert list(stored["systems"]) == ["base", "trained"] and stored["source"].endswith("run/samples")
    gain = stored["differences"]["accuracy"]
    values = {name: system["accuracy"]["value"] for name, system in stored["systems"].items()}
    assert gain["value"] == pytest.approx(values["trained"] - values["base"]) and gain["ci"][0] > 0.3

    for method in ("majority", "weighted_vote", "best_of_n", "best_of_n_mean", "mixture"):
        ranked = run(capfd, "rank", recipe, "--method", method)
        assert ranked["system"] == "trained" and ranked["problems"] == 60
        if method != "best_of_n":  # all pairs are equally likely under the fake: best_of_n only breaks ties
            assert ranked["accuracy"]["value"] >= values["trained"]
        assert ranked["selection_failures"] + ranked["coverage_failures"] == 60 - sum(
            entry["right"] for entry in ranked["rankings"]
        )
        assert json.loads(Path(ranked["file"]).read_text())["rankings"] == ranked["rankings"]
    entry = ranked["rankings"][7]
    assert entry["reference"] == "7" and entry["answer"] == entry["answers"][0]["answer"]
    assert sum(a["posterior"] for a in entry["answers"]) == pytest.approx(1)
    assert sum(r["posterior"] for r in entry["rationales"]) == pytest.approx(1)


def test_evaluation_compares_base_and_trained_with_the_bound(recipe: Path, capfd) -> None:
    result = run(capfd, "eval", recipe)
    base, trained = result["systems"]["base"], result["systems"]["trained"]
    assert base["accuracy"]["value"] == pytest.approx(0.9 * 0.3, abs=0.1)
    assert trained["accuracy"]["value"] == pytest.approx(0.9 * 0.8, abs=0.1)
    assert trained["truncated"]["value"] == base["truncated"]["value"]  # common random numbers
    assert list(trained["pass_at"]) == ["2", "4"]
    gain = result["differences"]["accuracy"]
    assert gain["losses"] == 0 and gain["ci"][0] > 0.3 and gain["p"] < 1e-3
    assert result["differences"]["bound"]["value"] > 0 and result["differences"]["bound"]["left_out"] == 0
    assert base["bound"]["logp_empty"]["value"] == pytest.approx(-5.0) and base["bound"]["traces"] == 4
    assert json.loads(Path(result["file"]).read_text())["differences"] == result["differences"]
    one = run(capfd, "eval", recipe, "--system", "base", "evaluation.bound_traces=0")
    assert (
        list(one["systems"]) == ["base"]
        and one["differences"] == {}
        and "bound" not in one["systems"]["base"]
    )
    assert one["systems"]["base"]["accuracy"] == base["accuracy"]


def test_a_recipe_takes_requirements_too(recipe: Path, capfd) -> None:
    arguments = ["eval", str(recipe), "evaluation.bound_traces=0", "--json", "--require"]
    assert main([*arguments, "trained:accuracy.low>=0.5"]) == 0
    assert json.loads(capfd.readouterr().out)["requirements"][0]["kept"]
    assert main([*arguments, "accuracy>=0.5"]) == 3  # asked of the base model too
    kept = {o["task"]: o["kept"] for o in json.loads(capfd.readouterr().out)["requirements"]}
    assert kept == {"base": False, "trained": True}
    assert main([*arguments, "trained:acc>=0.5"]) == 2
    assert "no metric 'acc'" in capfd.readouterr().err
    assert main(["eval", str(recipe), "--audit"]) == 2
    assert "--audit is for suites" in capfd.readouterr().err


def test_people_get_tables(recipe: Path, capfd) -> None:
    for arguments in (["sample"], ["rank"], ["eval"]):
        assert main([*arguments, str(recipe)]) == 0
    out = capfd.readouterr().out
    assert "accuracy of the ranked answer" in out and "trained minus base, paired by problem" in out
    assert "bound: IWAE-4 of log p(y*|x)" in out and "interval excludes 0" in out


def test_samples_of_other_weights_are_not_scored_by_this_model(recipe: Path, capfd, monkeypatch) -> None:
    run(capfd, "sample", recipe)

    def other(config, systems):
        return {"trained": wiring.Served("trained", Engine(), Builder(), "reasoner", "cc")}

    monkeypatch.setattr(rank, "serve", other)
    assert main(["rank", str(recipe)]) == 2
    assert "drawn from weights aa+bb, the trained model has cc" in capfd.readouterr().err
    monkeypatch.setattr(sample, "serve", other)
    run(capfd, "sample", recipe)
    assert main(["rank", str(recipe), "--method", "majority"]) == 2
    assert (
        "samples of several weights in the store: aa+bb (300 samples), cc (300 samples)"
        in capfd.readouterr().err
    )
    assert main(["rank", str(recipe), "--system", "base"]) == 2
    assert "no samples of the base model in the store (there: trained)" in capfd.readouterr().err


def test_problems_that_are_trained_on_are_left_out(recipe: Path, capfd) -> None:
    train = recipe.parent / "train.jsonl"
    lines = (recipe.parent / "test.jsonl").read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:20]))
    config = ["task.kind=jsonl", f"task.name={train}", "evaluation.bound_traces=0"]
    assert run(capfd, "eval", recipe, *config)["systems"]["base"]["problems"] == 40
    assert run(capfd, "eval", recipe, *config, "--on", "task")["systems"]["base"]["problems"] == 20
    train.write_text("".join(lines))
    assert main(["eval", str(recipe), *config]) == 2
    assert "every problem of 'eval_task' is trained on too" in capfd.readouterr().err


def test_samples_judged_by_an_answer_that_was_mended_since_are_refused(recipe: Path, capfd) -> None:
    run(capfd, "sample", recipe)
    file = recipe.parent / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["answer"] = "03"  # the prompt of `Builder` stays the same
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = Engine.drawn
    for more in ([], ["sampling.traces=6"]):
        assert main(["sample", str(recipe), *more]) == 2
        said = capfd.readouterr().err
        assert (
            "was judged against the answer '3', and the data now say '03': choose another output_dir" in said
        )
    assert Engine.drawn == drawn
    assert run(capfd, "sample", recipe, f"output_dir={recipe.parent / 'again'}")["new"] == 300
