"""A suite end to end on a tiny model: members, budgets, what is refused, and the result file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.suite_parts import TEMPLATE, save_adapter, save_model, suite_data, write_suite, write_sums
from vlm_reason.cli.main import main
from vlm_reason.config import from_dict
from vlm_reason.engines.base import Engine
from vlm_reason.errors import UserError
from vlm_reason.evaluation.members import Member, load_members
from vlm_reason.evaluation.requirements import Requirement
from vlm_reason.evaluation.suite import SuiteConfig
from vlm_reason.evaluation.suite_run import run_suite
from vlm_reason.store import SampleRecord, SampleStore

Suite = Callable[..., SuiteConfig]


@pytest.fixture
def model(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    return save_model(tiny_llama, tiny_tokenizer, tmp_path / "model")


@pytest.fixture
def suite(model: Path, tmp_path: Path) -> Suite:
    def make(**keys: Any) -> SuiteConfig:
        return from_dict(SuiteConfig, {**suite_data(tmp_path / "suite", model), **keys})

    return make


def adapters(model: Path, folder: Path, count: int) -> list[str]:
    return [str(save_adapter(folder / f"adapter{m}", model, seed=m)) for m in range(count)]


def stored(config: SuiteConfig, task: str) -> list[SampleRecord]:
    return list(SampleStore.open(Path(config.output_dir) / task / "samples").records())


def rows(result: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in result["rows"] if r["task"] == task}


# ---- what a run leaves behind


def test_the_result_says_what_was_run_and_every_row_has_an_interval(suite: Suite) -> None:
    config = suite()
    result = run_suite(config, [Requirement.parse("accuracy>=0"), Requirement.parse("low:accuracy.low>=0.9")])
    written = json.loads(Path(result["file"]).read_text())
    assert written == {k: v for k, v in result.items() if k != "file"}
    assert {"schema", "suite", "config", "commit", "machine", "date", "rows"} <= set(written)
    assert written["schema"] == 1 and written["suite"] == "sums" and written["kind"] == "suite"
    assert from_dict(SuiteConfig, written["config"]) == config
    for row in written["rows"]:
        assert {"task", "metric", "value", "se", "ci", "n", "n_dropped", "method", "flags"} == set(row) & {
            "task", "metric", "value", "se", "ci", "n", "n_dropped", "method", "flags",
        }  # fmt: skip
    low = rows(written, "low")
    assert list(low)[:6] == ["accuracy", "unparsed", "truncated", "trace_tokens", "pass@2", "pass@4"]
    records = stored(config, "low")
    assert len(records) == low["accuracy"]["n"] == 24
    assert low["accuracy"]["value"] == sum(bool(r.correct) for r in records) / 24
    assert low["truncated"]["value"] == sum(not r.complete for r in records) / 24
    tokens = sum(len(r.trace_ids) + len(r.answer_ids) for r in records)
    assert written["tasks"]["low"]["tokens"] == tokens == written["tasks"]["low"]["tokens"]
    assert written["cost"]["tokens"] == sum(t["tokens"] for t in written["tasks"].values())
    assert [r["kept"] for r in written["requirements"]] == [True, True, False]
    assert all(r.member is None and r.proposal == "base/prior" for r in records)


def test_a_second_run_draws_nothing_and_more_traces_keep_what_is_there(suite: Suite) -> None:
    first = run_suite(suite())
    before = {r.key: r for r in stored(suite(), "low")}
    again = run_suite(suite())
    assert (
        again["cost"]["tokens_drawn_now"] == 0
        and again["rows"] == first["rows"]
        and again["items"] == first["items"]
    )
    more = suite(sampling={"traces": 6, "temperature": 1.0, "max_trace_tokens": 12, "max_answer_tokens": 4})
    assert run_suite(more)["tasks"]["low"]["samples"] == 36
    after = {r.key: r for r in stored(more, "low")}
    assert before.items() <= after.items() and len(after) == 36


# ---- members of a posterior


def test_members_are_mixed_and_their_ids_are_in_the_store(suite: Suite, model: Path, tmp_path: Path) -> None:
    folders = adapters(model, tmp_path, 3)
    config = suite(members=folders)
    result = run_suite(config)
    records = stored(config, "low")
    assert Counter(r.member for r in records) == {0: 24, 1: 24, 2: 24}
    assert len({r.weights for r in records}) == 3
    assert [m["weights"] for m in result["model"]["members"]] == [
        next(r.weights for r in records if r.member == m) for m in range(3)
    ]
    # members draw with seeds of their own: equal seeds would make equal members agree by construction
    assert len({r.seed for r in records}) == len(records)
    assert rows(result, "low")["accuracy"]["n"] == 72
    # the mixture is the mean of the members' vote shares, whatever the number of readable answers of each
    for problem, item in result["items"]["low"].items():
        shares = []
        for m in range(3):
            votes = Counter(
                r.canonical for r in records if (r.problem_id, r.member) == (problem, m) and r.canonical
            )
            if votes:
                shares.append({c: n / votes.total() for c, n in votes.items()})
        if not shares:
            assert item["answer"] is None and item["confidence"] == 0
            continue
        mixture = Counter()
        for share in shares:
            mixture.update({c: p / len(shares) for c, p in share.items()})
        total = -sum(p * math.log(p) for p in mixture.values())
        expected = -sum(p * math.log(p) for share in shares for p in share.values()) / len(shares)
        assert item["confidence"] == pytest.approx(max(mixture.values()))
        assert item["entropy"] == pytest.approx(total, abs=1e-12)
        assert item["expected_entropy"] == pytest.approx(expected, abs=1e-12)
        if len(shares) > 1:
            assert item["mutual_information"] == pytest.approx(total - expected, abs=1e-9)
            assert 0 <= item["mutual_information_corrected"] <= item["mutual_information"] + 1e-9
    assert {"total_entropy", "expected_entropy", "mutual_information"} <= set(rows(result, "low"))


def test_a_member_samples_what_its_adapter_alone_samples(suite: Suite, model: Path, tmp_path: Path) -> None:
    """Member 0 of three and the same adapter by itself are the same draws: same key, same ids."""
    folders = adapters(model, tmp_path, 3)
    run_suite(suite(members=folders))
    alone = suite(members=folders[:1], output_dir=str(tmp_path / "alone"))
    run_suite(alone)
    of_three = {r.key: r for r in stored(suite(members=folders), "low") if r.member == 0}
    by_itself = {r.key: r for r in stored(alone, "low")}
    assert of_three.keys() == by_itself.keys()
    assert all(of_three[k].trace_ids == by_itself[k].trace_ids for k in of_three)


def test_whole_models_are_members_too(suite: Suite, model: Path, tmp_path: Path) -> None:
    """An adapter merged into its base and exported answers as the adapter does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = adapters(model, tmp_path, 2)
    merged = []
    for m, folder in enumerate(folders):
        whole = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model), folder
        ).merge_and_unload()
        whole.save_pretrained(tmp_path / f"merged{m}")
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / f"merged{m}")
        merged.append(str(tmp_path / f"merged{m}"))
    as_adapters = run_suite(suite(members=folders))
    as_models = run_suite(suite(members=merged, output_dir=str(tmp_path / "whole")))
    assert _close(as_models["items"], as_adapters["items"])
    assert as_models["model"]["weights"] is None and as_adapters["model"]["weights"] is not None
    with pytest.raises(UserError, match="all adapters or all whole models"):
        run_suite(suite(members=[folders[0], merged[1]]))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    return a == pytest.approx(b, abs=1e-9) if isinstance(a, float) else a == b


class InPlace:
    """A posterior that writes each of its draws into the one model: what a family of its own may do."""

    resident, base = True, None

    def __init__(self, folder: Path, count: int) -> None:
        from vlm_reason.engines.hf import HFEngine
        from vlm_reason.models.load import load_model

        self.model, self.tokenizer = load_model(folder, dtype="float32")
        self.engine = HFEngine(self.model, self.tokenizer)
        self.mean = self.model.lm_head.weight.detach().clone()
        self.members = [Member(m, f"draw {m}", None, f"head+{m}") for m in range(count)]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @contextmanager
    def serve(self, member: Member) -> Iterator[Engine]:
        generator = torch.Generator().manual_seed(member.index or 0)
        with torch.no_grad():
            self.model.lm_head.weight.copy_(
                self.mean + 0.3 * torch.randn(self.mean.shape, generator=generator)
            )
        yield self.engine


def test_a_posterior_of_its_own_kind_takes_part(suite: Suite, model: Path, tmp_path: Path) -> None:
    config = suite(rank="mixture")
    result = run_suite(config, members=InPlace(model, 3), audit=True)
    assert (
        result["audit"]["passed"] and result["audit"]["largest"] < 1e-4
    )  # each scored by the draw that sampled
    records = stored(config, "low")
    assert Counter(r.weights for r in records) == {"head+0": 24, "head+1": 24, "head+2": 24}
    firsts = {r.member: r.trace_ids for r in records if r.problem_id == "p0" and r.k == 0}
    assert len(set(firsts.values())) == 3
    assert run_suite(config, members=InPlace(model, 3))["items"] == result["items"]


def test_an_adapter_that_does_not_fit_is_named(suite: Suite, model: Path, tmp_path: Path) -> None:
    (folder,) = adapters(model, tmp_path, 1)
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        load_members(str(model), "float32", ["nowhere"], {})
    with pytest.raises(UserError, match="sync adapter needs adapters, and the model has none"):
        load_members(
            "no such model", "float32", [], {"kind": "vllm", "sync": "adapter"}
        )  # before it is looked for
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    del tensors[sorted(tensors)[0]]
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the model: 1 tensors are missing"):
        load_members(str(model), "float32", [folder], {})
    (Path(folder) / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="does not fit the model"):
        load_members(str(model), "float32", [folder], {})


@pytest.mark.parametrize("method", ["mixture", "best_of_n", "weighted_vote"])
def test_any_ranker_runs_over_members(suite: Suite, model: Path, tmp_path: Path, method: str) -> None:
    result = run_suite(suite(members=adapters(model, tmp_path, 2), rank=method))
    for item in result["items"]["low"].values():
        assert (item["answer"] is None) == (item["confidence"] == 0) and 0 <= item["confidence"] <= 1


# ---- budgets


def test_a_token_budget_is_never_exceeded_and_says_what_was_left_out(suite: Suite) -> None:
    worst = 4 * (12 + 4)
    config = suite(budget={"tokens": 400})
    result = run_suite(config)
    assert 400 - 2 * worst < result["cost"]["tokens"] <= 400
    for task, report in result["tasks"].items():
        assert 0 < report["left_out"] < 6 and report["left_out_why"] == "budget.tokens"
        assert report["problems"] == 6 - report["left_out"] == len(result["items"][task])
    again = run_suite(config)  # what is stored counts: no more is drawn
    assert again["cost"]["tokens_drawn_now"] == 0 and again["items"] == result["items"]
    whole = run_suite(suite())
    assert all(result["items"]["low"][i] == whole["items"]["low"][i] for i in result["items"]["low"])


def test_a_budget_of_problems_and_one_too_small_for_any(suite: Suite, tmp_path: Path) -> None:
    few = run_suite(suite(budget={"problems": 2}))
    assert [r["left_out"] for r in few["tasks"].values()] == [4, 4]
    assert few["tasks"]["low"]["left_out_why"] == "budget.problems"
    none = run_suite(suite(budget={"tokens": 5}, output_dir=str(tmp_path / "none")))
    row = rows(none, "low")["accuracy"]
    assert row["value"] is None and "empty" in row["flags"] and none["tasks"]["low"]["left_out"] == 6
    bounds = [Requirement.parse(text) for text in ("accuracy>=0", "answer_accuracy>=0", "pass@4>=0")]
    kept = run_suite(suite(budget={"tokens": 5}, output_dir=str(tmp_path / "none")), bounds)
    assert [r["kept"] for r in kept["requirements"]] == [False] * 6  # NaN keeps no bound
    late = run_suite(suite(budget={"seconds": 1e-9}, output_dir=str(tmp_path / "late")))
    assert late["tasks"]["high"]["left_out_why"] == "budget.seconds"
    for bad in ({"tokens": 0}, {"seconds": -1}, {"problems": 0}):
        with pytest.raises(UserError, match="must be > 0"):
            suite(budget=bad)


# ---- the faults a harness must not have


def test_a_prompt_longer_than_the_context_is_an_error_or_counted_never_cut(
    suite: Suite, tmp_path: Path
) -> None:
    """Peers cut the start of a long prompt with a warning, or without."""
    config = suite()
    long = {"id": "long", "question": "1+" * 300 + "1", "answer": "301"}
    with (tmp_path / "suite" / "low.jsonl").open("a") as stream:
        stream.write(json.dumps(long) + "\n")
    with pytest.raises(UserError, match=r"1 of 7 problems do not fit .* 512 .*'long' may take") as refused:
        run_suite(config)
    assert "\n" not in str(refused.value) and not (tmp_path / "suite" / "out").exists()
    data = suite_data(tmp_path / "suite", Path(config.model), long_prompts="wrong")
    with (tmp_path / "suite" / "low.jsonl").open("a") as stream:
        stream.write(json.dumps(long) + "\n")
    result = run_suite(from_dict(SuiteConfig, data))
    assert result["tasks"]["low"]["too_long"] == ["long"] and result["tasks"]["low"]["problems"] == 7
    row = rows(result, "low")["accuracy"]
    assert "too_long=1" in row["flags"] and row["n"] == 28
    assert rows(result, "low")["pass@4"]["n"] == 7 and rows(result, "low")["truncated"]["n"] == 24
    assert rows(result, "low")["answer_accuracy"]["n"] == 7 and result["items"]["low"]["long"]["correct"] == 0
    assert all(r.problem_id != "long" for r in stored(config, "low"))
    assert not any("too_long" in flag for flag in rows(result, "high")["accuracy"]["flags"])


def test_stored_samples_are_of_this_model_and_this_prompt(suite: Suite, model: Path, tmp_path: Path) -> None:
    """Peers answer from a cache that knows neither."""
    (folder,) = adapters(model, tmp_path, 1)
    base = run_suite(suite())
    other = run_suite(suite(members=[folder]))  # same output_dir, same store
    assert other["cost"]["tokens_drawn_now"] == other["cost"]["tokens"] > 0
    assert len(stored(suite(), "low")) == 48
    assert run_suite(suite())["items"] == base["items"]
    changed = suite()
    task = changed.tasks["low"]
    template = {**task.template, "prior": "{question} ="}  # type: ignore[dict-item]
    changed.tasks["low"] = type(task)(task.task, template, task.shots, task.verifier)
    edited = run_suite(changed)
    assert edited["tasks"]["low"]["new"] == 24 and edited["tasks"]["high"]["new"] == 0
    assert edited["tasks"]["low"]["prompts"] != base["tasks"]["low"]["prompts"]


def test_samples_of_one_problem_are_different_draws(suite: Suite) -> None:
    """Peers repeat one sample K times when a seed or a cache is shared."""
    run_suite(suite())
    for problem in range(6):
        own = [r for r in stored(suite(), "low") if r.problem_id == f"p{problem}"]
        assert len({r.seed for r in own}) == 4 and len({r.trace_ids for r in own}) == 4


def test_a_model_of_nan_is_an_error_and_stores_nothing(suite: Suite, model: Path, tiny_llama: Any, tiny_tokenizer: Any,
                                                       tmp_path: Path) -> None:  # fmt: skip
    """A peer gave such a model an accuracy of 0.22: argmax of NaN is 0."""
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(math.nan)
    broken = save_model(tiny_llama, tiny_tokenizer, tmp_path / "broken")
    config = suite(model=str(broken))
    with pytest.raises(UserError, match="next-token scores are not finite"):
        run_suite(config)
    greedy = suite(model=str(broken), sampling={"max_trace_tokens": 12, "max_answer_tokens": 4})
    with pytest.raises(UserError, match="log-probability that is not finite"):
        run_suite(greedy)
    assert not list((tmp_path / "suite" / "out").rglob("segment-*.jsonl"))
    assert not (tmp_path / "suite" / "out" / "result.json").exists()


def test_what_cannot_be_read_or_was_cut_is_wrong_and_counted(suite: Suite) -> None:
    result = run_suite(suite())
    for task in ("low", "high"):
        records = stored(suite(), task)
        unread = [r for r in records if r.answered and r.canonical is None]
        cut = [r for r in records if not r.answered]
        assert unread and cut, "the tiny model babbles: both must occur"
        assert not any(r.correct for r in (*unread, *cut)) and all(r.answer_ids == () for r in cut)
        table = rows(result, task)
        assert table["accuracy"]["n"] == len(records)
        assert table["unparsed"]["value"] == pytest.approx(len(unread) / (len(records) - len(cut)))
        assert all(item["answer"] is None or item["answer"] for item in result["items"][task].values())


def test_stored_verdicts_are_not_passed_on_to_another_reference_or_verifier(
    suite: Suite, tmp_path: Path
) -> None:
    config = suite()
    run_suite(config)
    rows_now = [json.loads(line) for line in (tmp_path / "suite" / "low.jsonl").read_text().splitlines()]
    rows_now[2]["answer"] = "999"
    (tmp_path / "suite" / "low.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_now))
    with pytest.raises(UserError, match="'p2' was judged against the answer '5', and the data now say '999'"):
        run_suite(config)
    task = config.tasks["high"]
    config.tasks["high"] = type(task)(task.task, task.template, task.shots, "exact")
    with pytest.raises(UserError, match="judged by verifier 'number', and the suite says 'exact'"):
        run_suite(config)


def test_a_question_that_a_generator_repeats_is_one_item(suite: Suite) -> None:
    spec = {"kind": "reasoning_gym", "name": "chain_sum", "size": 40, "seed": 5,
            "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}  # fmt: skip
    entry = {"task": spec, "template": TEMPLATE, "verifier": "number"}
    result = run_suite(suite(tasks={"sums": entry}))
    report = result["tasks"]["sums"]
    asked = {r.question for r in stored(suite(), "sums")}
    assert report["repeated"] > 0 and report["problems"] == len(asked) == 40 - report["repeated"]


# ---- the audit


def test_the_audit_finds_a_store_of_other_weights(suite: Suite, model: Path, tmp_path: Path) -> None:
    config = suite(members=adapters(model, tmp_path, 2))
    good = run_suite(config, audit=True)["audit"]
    assert good["items"] == 32 and good["passed"] and good["largest"] < 1e-4 and good["tokens"] > 100
    for segment in (tmp_path / "suite" / "out").rglob("segment-*.jsonl"):
        lines = [json.loads(line) for line in segment.read_text().splitlines()]
        for line in lines:
            line["trace_logps"] = [p - 0.01 for p in line["trace_logps"]]
        segment.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = run_suite(config, audit=True)["audit"]
    assert not bad["passed"] and bad["largest"] == pytest.approx(0.01, abs=1e-4)
    assert run_suite(config, audit=True, tolerance=0.02)["audit"]["passed"]


# ---- the command


def test_the_command_and_its_exit_status(model: Path, tmp_path: Path, capfd: Any) -> None:
    path = str(write_suite(tmp_path / "suite", model))
    assert main(["eval", path, "--json", "--quiet", "--require", "accuracy>=0"]) == 0
    printed = capfd.readouterr().out
    result = json.loads(printed)
    assert printed.count("\n") == 1 and result["suite"] == "sums"
    broken = ["--require", "low:accuracy.low>=0.9", "--require", "truncated<=1"]
    assert main(["eval", path, "--quiet", "--audit", *broken]) == 3
    shown = capfd.readouterr().out
    assert (
        "NOT KEPT: low:accuracy.low>=0.9 on low (it is 0.0" in shown and "kept: truncated<=1 on high" in shown
    )
    assert "audit: 32 samples scored again alone" in shown and "(0 now)" in shown
    assert main(["eval", path, "--quiet", "--audit", "--audit-tolerance", "1e-12"]) == 3
    assert "NOT PASSED" in capfd.readouterr().out
    assert main(["eval", path, "budget.problems=2", "--quiet", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tasks"]["low"]["left_out"] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--require", "acuracy>=0.6"], "did you mean 'accuracy'"),
        (["--require", "mid:accuracy>=0.6"], "no task 'mid'"),
        (["--require", "pass@8>=0.6"], "no metric 'pass@8'"),
        (["--require", "mutual_information>=0"], "no metric 'mutual_information'"),
        (["--require", "60%"], "cannot read the requirement"),
        (["--from-store"], "--from-store is for training recipes"),
        (["--audit-tolerance", "1"], "no meaning without --audit"),
        (["--audit", "--audit-tolerance", "nan"], "--audit-tolerance must be a number >= 0, got nan"),
        (["--on", "task"], "--on is for training recipes"),
        (["sampling.temperature=.nan"], "temperature must be a number >= 0, got nan"),
        (["sampling.temperature=-1"], "temperature must be a number >= 0, got -1"),
        (["sampling.top_p=0"], "top_p must be in (0, 1], got 0"),
        (["sampling.temprature=1"], "unknown config key"),
        (["members=[nowhere]"], "no folder 'nowhere'"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_draws(
    model: Path, tmp_path: Path, capfd: Any, arguments: list[str], said: str
) -> None:
    assert main(["eval", str(write_suite(tmp_path / "suite", model)), "--quiet", *arguments]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlm-reason: ") and said in error
    assert not (tmp_path / "suite" / "out").exists()


# ---- what a config may say


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"suite": "../x"}, "names a folder"),
        ({"rank": "majorty"}, "did you mean 'majority'"),
        ({"sampling": {"traces": 2}}, "greedy decoding"),
        ({"sampling": {"adapter": "x"}}, "give the adapter's folder in members"),
        ({"members": ["a", "a"]}, "names a folder twice"),
        ({"dat": "x"}, "did you mean 'data'"),
    ],
)
def test_mistakes_are_one_clear_line(suite: Suite, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        run_suite(suite(**change))
    assert "\n" not in str(error.value)


def test_relative_names_start_from_data_and_absolute_ones_do_not(suite: Suite, tmp_path: Path) -> None:
    config = suite()
    assert config.problems_of("low").name == str(tmp_path / "suite" / "low.jsonl")
    elsewhere = write_sums(tmp_path / "else.jsonl", 2)
    task = config.tasks["low"]
    config.tasks["low"] = type(task)(type(task.task)("jsonl", str(elsewhere)), task.template, 0, "number")
    assert run_suite(config)["tasks"]["low"]["problems"] == 2


def test_the_suites_of_the_project_are_valid() -> None:
    from vlm_reason.config import load_config
    from vlm_reason.ranking import METHODS

    folder = Path(__file__).resolve().parents[2] / "evals" / "suites"
    found = sorted(folder.glob("*.yaml"))
    assert {p.stem for p in found} >= {"arithmetic", "math_words", "choices", "reasoning", "hub"}
    for path in found:
        assert path.read_text().startswith(f"# vlm-reason eval evals/suites/{path.name}")
        if path.stem == "bayes_lora":  # compares posteriors: tests/unit/test_weight_suite.py
            continue
        config = from_dict(SuiteConfig, load_config(path))
        assert config.suite == path.stem and config.rank in METHODS
        for task in config.tasks:
            assert config.sampling_of(task).traces == 8


def test_suites_over_real_data_ask_real_questions(shared_data: Path) -> None:
    from vlm_reason.config import load_config
    from vlm_reason.tasks.sources import load_problems

    folder = Path(__file__).resolve().parents[2] / "evals" / "suites"
    sizes = {}
    for name in ("math_words", "choices"):
        config = from_dict(SuiteConfig, load_config(folder / f"{name}.yaml", [f"data={shared_data}"]))
        sizes |= {task: len(load_problems(config.problems_of(task))) for task in config.tasks}
    assert sizes == {"gsm8k": 1319, "svamp": 1000, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500}
