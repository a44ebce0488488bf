"""vlm-reason bayes: runs that are killed, refused and resumed; adapters of others; what a posterior is."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vlm_reason.cli.bayes_metrics import measure
from vlm_reason.cli.main import main
from vlm_reason.config import from_dict, load_config
from vlm_reason.errors import UserError
from vlm_reason.tasks.prompts import PromptBuilder
from vlm_reason.tasks.resolve import resolve_template
from vlm_reason.types import Problem
from vlm_reason.weights import (
    BradleyTerry,
    DiagonalGaussian,
    Example,
    Origin,
    Posterior,
    choice_examples,
    make_batch,
)
from vlm_reason.weights.config import BayesConfig
from vlm_reason.weights.data import token_examples
from vlm_reason.weights.families.last_layer import LastLayer
from vlm_reason.weights.inspection import inspect
from vlm_reason.weights.methods.ensemble import Ensemble
from vlm_reason.weights.run import run_bayes
from vlm_reason.weights.start import load_start

REPO = Path(__file__).resolve().parents[2]
RECIPES = [
    p for p in sorted((REPO / "configs" / "recipes").glob("*.yaml")) if load_config(p).get("kind") == "bayes"
]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A tiny model, rows of two classes, and run.yaml."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"id": f"r{i}", "text": f"{i} {'ab'[i % 2]}", "label": i % 2, "label_name": "xy"[i % 2]}
        for i in range(24)
    ]
    for name, part in (("train", rows[:12]), ("dev", rows[12:16]), ("test", [rows[0], *rows[16:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {"kind": "jsonl", "name": str(tmp_path)}
    config = {
        "kind": "bayes", "model": str(tmp_path / "model"), "template": "labels", "task": task,
        "held_out": {**task, "split": "dev"}, "eval_task": {**task, "split": "test"}, "adapter": {"r": 2, "alpha": 4},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}, "predictive": {"n": 4},
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def config_of(folder: Path, *overrides: str) -> BayesConfig:
    return from_dict(BayesConfig, load_config(folder / "run.yaml", overrides))


def ask(capfd: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What a command prints with --json."""
    assert main([*map(str, arguments), "--json", "--quiet"]) == 0
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capfd.readouterr()
    assert main([*map(str, arguments), "--quiet"]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("vlm-reason: ")]
    assert out == "" and lines, err
    return lines[-1].removeprefix("vlm-reason: ")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --------------------------------------------------------------------------------------------------------------- fit


def test_fit_writes_a_posterior_its_predictions_and_what_they_are_worth(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = ask(capfd, "bayes", "fit", folder / "run.yaml", "method=ivon")
    run = folder / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml", "fit.json", "posterior", "predictions.jsonl", "summary.json",
    ]  # fmt: skip
    assert result["family"] == "diagonal" and result["report"]["steps"] == 6
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    posterior = Posterior.load(run / "posterior", base)
    stock = PeftModel.from_pretrained(base, str(run / "posterior"))
    assert {k for k, _ in stock.named_parameters() if "lora" in k}
    assert posterior.origin.data_size == 12
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == [f"r{i}" for i in range(16, 24)]  # r0 is trained on
    for row in rows:
        p = np.array(row["probs"])
        assert p.sum() == pytest.approx(1, abs=1e-9)
        assert row["total_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
        gap = row["total_entropy"] - row["expected_entropy"]
        assert row["mutual_information"] == pytest.approx(gap, abs=1e-9) and gap > 0
    label = np.array([r["label"] for r in rows])
    probs = np.array([r["probs"] for r in rows])
    assert label.tolist() == [i % 2 for i in range(16, 24)]
    metrics = result["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx((probs.argmax(1) == label).mean())
    assert metrics["nll"]["value"] == pytest.approx(-np.log(probs[np.arange(8), label]).mean(), rel=1e-9)
    squared = ((probs - np.eye(2)[label]) ** 2).sum(1).mean()
    assert metrics["brier"]["value"] == pytest.approx(squared, rel=1e-9)
    assert all(len(m["ci"]) == 2 for m in metrics.values()) and metrics["ece"]["n"] == 8

    before = files_of(run)
    assert ask(capfd, "bayes", "fit", folder / "run.yaml", "method=ivon") == {
        **result,
        "already_finished": True,
    }
    assert ask(capfd, "train", folder / "run.yaml", "method=ivon")["already_finished"] is True
    message = refused(capfd, "bayes", "fit", folder / "run.yaml", "method=ivon", "training.epochs=3")
    assert "holds a run with training = " in message and "choose another output_dir" in message
    assert files_of(run) == before


@pytest.mark.parametrize("method", ["map", "ensemble"])
def test_killed_anywhere_and_repeated_is_uninterrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed in training, before the posterior is saved, before the predictions, before the summary."""
    from vlm_reason.weights import run as module
    from vlm_reason.weights.training import AdapterTrainer

    own = (f"method={method}", *(["options.members=2"] if method == "ensemble" else []))
    run_bayes(config_of(folder, *own, f"output_dir={folder / 'whole'}"), False, measure)
    config = config_of(folder, *own)
    steps: list[int] = []
    step = AdapterTrainer.training_step

    def killed_at_five(self: Any, *args: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(AdapterTrainer, "training_step", killed_at_five)
        run_bayes(config, False, measure)
    for target, name in ((Posterior, "save"), (module, "_predicted")):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(target, name, killed)
            run_bayes(config, False, measure)
    with pytest.raises(KeyboardInterrupt):
        run_bayes(config, False, killed)
    assert not (folder / "run" / "summary.json").exists()
    run_bayes(config, False, measure)
    ours, theirs = files_of(folder / "run"), files_of(folder / "whole")
    assert ours.keys() == theirs.keys()
    same = [k for k in ours if k not in ("config.yaml", "summary.json", "fit.json")]
    assert len(same) == 5 and all(ours[k] == theirs[k] for k in same)
    fits = [json.loads(files["fit.json"]) for files in (ours, theirs)]
    assert {**fits[0], "seconds": 0} == {**fits[1], "seconds": 0}


@pytest.mark.parametrize("method", ["blob", "langevin", "swag"])
def test_methods_with_states_of_their_own_resume_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from vlm_reason.weights.training import AdapterTrainer

    step = AdapterTrainer.training_step

    def killed_at_five(self: Any, *args: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    own = (f"method={method}", "eval_task=null", "training.epochs=3")
    run_bayes(config_of(folder, *own, f"output_dir={folder / 'whole'}"), False)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(AdapterTrainer, "training_step", killed_at_five)
        run_bayes(config_of(folder, *own), False)
    assert [p.name for p in (folder / "run").rglob("checkpoint-*")] == ["checkpoint-4"]
    run_bayes(config_of(folder, *own), False)
    assert files_of(folder / "run" / "posterior") == files_of(folder / "whole" / "posterior")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=mapp"], "unknown method 'mapp'; did you mean 'map'?"),
        (["options.x=1"], "unknown config key 'options.x' of method 'map'; known: prior; options={} drops"),
        (["training.epoch=1"], "unknown config key 'training.epoch'; did you mean 'epochs'?"),
        (["predictive.mode=bached"], "predictive.mode: unknown 'bached'; did you mean 'batched'?"),
        (["adapter.rank=1"], "unknown config key 'adapter.rank'"),
        (["task={}"], "the config has no section 'task'"),
        (["eval_task.split=train"], "every problem of 'eval_task' is trained on too: name other problems"),
        (["start=nowhere"], "the adapter of `start` is what is fitted: drop the section 'adapter'"),
        (["start=nowhere", "adapter={}"], "'nowhere' holds no adapter: adapter_config.json is missing"),
        (["method=temperature", "held_out=null"], "needs held-out examples: give held_out, or options.split"),
        (["model=no/such/model/at/all"], "no model folder"),
        (["template=labls"], "'labls'"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(
    folder: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in refused(capfd, "bayes", "fit", folder / "run.yaml", *overrides)
    assert not (folder / "run" / "posterior").exists() and not (folder / "run" / "summary.json").exists()


def test_text_answers_have_a_likelihood_too(
    folder: Path, capfd: pytest.CaptureFixture[str], tiny_tokenizer: Any
) -> None:
    rows = [{"id": f"q{i}", "question": f"{i}+1", "answer": str(i + 1)} for i in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"{{kind: jsonl, name: {folder / 'sums.jsonl'}, limit: 8}}"
    asked = ["likelihood=tokens", "template=steps", f"task={task}", "held_out=null"]
    asked.append(f"eval_task={{kind: jsonl, name: {folder / 'sums.jsonl'}}}")
    result = ask(capfd, "bayes", "fit", folder / "run.yaml", *asked)
    (first, second) = (json.loads(x) for x in (folder / "run" / "predictions.jsonl").read_text().splitlines())
    assert (first["id"], second["id"]) == ("q8", "q9") and second["tokens"] > first["tokens"]  # 9, 10
    loss = -(first["logp"] + second["logp"])
    assert result["metrics"]["nll"]["value"] == pytest.approx(loss / 2)
    tokens = first["tokens"] + second["tokens"]
    assert result["metrics"]["nll_per_token"]["value"] == pytest.approx(loss / tokens)

    builder = PromptBuilder(tiny_tokenizer, resolve_template("steps"))
    plain = Problem("a", "1+1", "2")
    told = Problem("b", "1+1", "2", metadata={"rationale": "one more"})
    (direct, traced) = token_examples([plain, told], builder)
    answer = builder.answer_ids("2")
    assert direct.ids == (*builder.direct_ids(plain), *answer)
    assert direct.ids[int(direct.target) :] == answer
    assert traced.ids[int(traced.target) :] == (*builder.trace_ids("one more"), *builder.cue_ids, *answer)
    assert traced.ids[: int(traced.target)] == builder.prior_ids(told)


# ------------------------------------------------------------------------------------------------ adapters of others


@pytest.fixture
def stranger(folder: Path, tiny_llama: Any) -> Path:
    """An adapter that stock PEFT wrote."""
    torch.manual_seed(4)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["v_proj", "o_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    model.save_pretrained(str(folder / "stranger"))
    return folder / "stranger"


@pytest.mark.parametrize("method", ["tfb", "laplace"])
def test_a_posterior_around_anybodys_adapter(
    folder: Path, stranger: Path, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    data = yaml.safe_load((folder / "run.yaml").read_text())
    data.pop("model")  # the adapter names it
    (folder / "data.yaml").write_text(yaml.safe_dump({**data, "method": "map"}))
    start = files_of(stranger)
    result = ask(capfd, "bayes", method, stranger, "--data", folder / "data.yaml", "-o", folder / method)
    assert result["method"] == method and result["output_dir"] == str(folder / method)
    posterior = Posterior.load(folder / method / "posterior")
    assert posterior.uncertain() and posterior.adapter_config["r"] == 3
    assert files_of(stranger) == start
    one = next(posterior.sample(1, seed=0))
    saved = load_file(stranger / "adapter_model.safetensors")
    assert one.keys() == saved.keys()
    if method == "laplace":  # tfb writes the same update in other factors
        assert all(torch.equal(posterior.mean()[k], v) for k, v in saved.items())


def test_labels_that_the_tokenizer_writes_alike_become_letters(tiny_tokenizer: Any) -> None:
    builder = PromptBuilder(tiny_tokenizer, resolve_template("labels"))

    def labels(*names: str) -> tuple[int, ...]:
        problem = Problem("p", "fine", names[0], metadata={"labels": names})
        return choice_examples([problem], builder).label_ids

    letters = tuple(tiny_tokenizer.convert_tokens_to_ids(["a", "b"]))
    assert labels("yes", "Yes") == letters  # it lowers case
    assert labels("yes", "no") == tuple(tiny_tokenizer.convert_tokens_to_ids(["y", "n"]))


def test_pairs_have_two_halves() -> None:
    with pytest.raises(UserError, match="example 'b' has no rejected sequence, others of its batch have one"):
        make_batch([Example("a", (3, 4), rejected=(5,)), Example("b", (3, 4))])
    with pytest.raises(UserError, match="example 'b' has no rejected sequence: preferences are between two"):
        BradleyTerry(torch.ones(4)).outputs(torch.nn.Linear(4, 4), make_batch([Example("b", (3, 4))]))


def test_what_is_no_adapter_is_said(folder: Path, stranger: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(adapter: Path, *more: str) -> str:
        asked = ["bayes", "tfb", adapter, "--data", folder / "run.yaml", "-o", folder / "out"]
        return refused(capfd, *asked, *more)

    assert "holds no adapter: adapter_config.json is missing" in said(folder / "model")
    pickled = folder / "pickled"
    shutil.copytree(stranger, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "holds a pickled adapter_model.bin, which may run code" in said(pickled)
    broken = folder / "broken"
    shutil.copytree(stranger, broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    assert "has rank 3, adapter_config.json says r = 4" in said(broken)
    elsewhere = folder / "elsewhere"
    shutil.copytree(stranger, elsewhere)
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
    assert "the adapter does not fit this model: Target modules {'c_attn'} not found" in said(elsewhere)
    assert not (folder / "out" / "posterior").exists()


def test_a_plain_adapter_is_a_point_and_map_goes_on_from_it(folder: Path, stranger: Path) -> None:
    start = load_start(stranger)
    assert isinstance(start, DiagonalGaussian) and start.uncertain() == [] and start.origin.base is None
    config = config_of(folder, f"start={stranger}", "adapter={}", "training.learning_rate=1e-12")
    run_bayes(config, False)
    mean = Posterior.load(folder / "run" / "posterior").mean()
    for key, value in start.mean().items():
        torch.testing.assert_close(mean[key], value, rtol=0, atol=1e-9)
    assert load_start(folder / "run" / "posterior").origin.data_size == 12  # a posterior is taken as one


# ------------------------------------------------------------------------------------------------ predict and export


@pytest.mark.parametrize("method", ["ivon", "ensemble", "vbll"])
def test_predict_says_what_the_fit_said(folder: Path, capfd: pytest.CaptureFixture[str], method: str) -> None:
    own = ("options.members=2",) if method == "ensemble" else ()
    fitted = ask(capfd, "bayes", "fit", folder / "run.yaml", f"method={method}", *own)
    run, out = folder / "run", folder / "out"
    before = files_of(run)
    asked = ["bayes", "predict", run, "--data", folder / "run.yaml"]
    result = ask(capfd, *asked, "-o", out)
    assert sorted(p.name for p in out.iterdir()) == ["predictions.jsonl", "summary.json"]
    assert (out / "predictions.jsonl").read_bytes() == (run / "predictions.jsonl").read_bytes()
    assert result["metrics"] == fitted["metrics"] and result["family"] == fitted["family"]
    assert result["problems"] == 8 and json.loads((out / "summary.json").read_text()) == result
    alone = ask(capfd, "bayes", "predict", run / "posterior", "--data", folder / "run.yaml")
    assert alone["metrics"] == result["metrics"] and alone["output"] is None
    assert files_of(run) == before
    if method == "vbll":
        message = refused(capfd, "bayes", "export", run, "-o", folder / "draws")
        assert "no draws of adapters" in message and not (folder / "draws").exists()
    if method == "ivon":  # the mean is another prediction of the same problems
        mean = ask(capfd, *asked, "predictive.mode=mean")["metrics"]
        assert mean["mutual_information"]["value"] == 0 and mean["nll"] != result["metrics"]["nll"]
        assert ask(capfd, *asked, "eval_task.limit=4")["problems"] == 3  # r0 is trained on
        assert main([*map(str, asked), "--quiet"]) == 0
        assert "accuracy" in capfd.readouterr().out


def test_what_cannot_be_predicted_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_bayes(config_of(folder, "method=ivon", "eval_task=null"), False)

    def said(*more: Any, of: Path = folder / "run") -> str:
        return refused(
            capfd, "bayes", "predict", of, "--data", folder / "run.yaml", "-o", folder / "out", *more
        )

    assert said("eval_task=null") == "the config has no section 'eval_task': it names the problems to predict"
    message = said("dtype=bfloat16")
    about = json.loads((folder / "run" / "posterior" / "posterior_config.json").read_text())["origin"]
    assert (about["model"], about["dtype"]) == ("model", "float32")
    assert f"fitted on a base model with hash {about['base']} (model, float32), this one has " in message
    assert message.endswith("(model, bfloat16): load that model, in that dtype")
    assert "predictive.mode: unknown 'bached'; did you mean 'batched'?" in said("predictive.mode=bached")
    assert "holds no posterior: posterior_config.json is missing" in said(of=folder / "model")
    assert not (folder / "out").exists()
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")
    assert "exists and is not an empty folder" in said()
    assert files_of(folder / "out") == {"mine": b"x"}


def test_export_writes_draws_that_stock_peft_loads(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_bayes(config_of(folder, "method=ivon", "eval_task=null"), False)
    posterior = Posterior.load(folder / "run" / "posterior")
    asked = ["bayes", "export", folder / "run", "-n", 3, "--seed", 5]
    result = ask(capfd, *asked, "-o", folder / "draws")
    folders = [Path(f) for f in result["adapters"]]
    assert folders == [folder / "draws" / f"draw00{k}" for k in range(3)]
    assert sorted((folder / "draws").iterdir()) == folders
    for one, tree in zip(folders, posterior.sample(3, 5), strict=True):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), str(one))
        found = get_peft_model_state_dict(stock)
        assert found.keys() == tree.keys() and all(torch.equal(found[k], v) for k, v in tree.items())
    pairs = ask(capfd, *asked[:-4], "-n", 2, "--antithetic", "-o", folder / "pairs")["adapters"]
    first, second = (load_file(Path(f) / "adapter_model.safetensors") for f in pairs)
    for key, value in posterior.mean().items():
        torch.testing.assert_close((first[key] + second[key]) / 2, value, rtol=1e-5, atol=1e-6)
    assert main([*map(str, asked), "-o", str(folder / "shown")]) == 0
    assert capfd.readouterr().out.split() == [str(folder / "shown" / f"draw00{k}") for k in range(3)]

    assert "exists and is not an empty folder" in refused(capfd, *asked, "-o", folder / "draws")
    few = refused(capfd, "bayes", "export", folder / "run", "-n", 0, "-o", folder / "none")
    assert few == "the number of draws must be at least 1, got 0"
    message = refused(capfd, "bayes", "export", folder / "model", "-o", folder / "none")
    assert "holds no posterior: posterior_config.json is missing" in message
    assert not (folder / "none").exists()


# ------------------------------------------------------------------------------------------------- merge and inspect


def gaussian(sigma: float, seed: int = 0) -> DiagonalGaussian:
    g = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    a = torch.randn(2, 5, generator=torch.Generator().manual_seed(9))
    mean = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": torch.randn(4, 2, generator=g)}
    return DiagonalGaussian(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4}, mean, {k: torch.full_like(v, sigma) for k, v in mean.items()},
        Origin("feed", 50.0, 100, 7, prior=dict.fromkeys(mean, 2.0)),
    )  # fmt: skip


def test_inspect_gives_what_was_put_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    posterior = gaussian(0.1)
    posterior.save(tmp_path / "q")
    result = ask(capfd, "bayes", "inspect", tmp_path / "q")
    assert (result["family"], result["base"], result["data_size"], result["ess"]) == (
        "diagonal",
        "feed",
        100,
        50.0,
    )
    assert (result["temperature"], result["updates"], result["weights"]) == (2.0, 7, 18)
    assert result["uncertain_weights"] == 18 and result["sigma_from"] == "covariance"
    assert result["kl_to_prior"] == pytest.approx(posterior.kl(), rel=1e-9)
    assert result["prior"] == [{"value": 2.0, "tensors": 2}]
    assert result["quantiles"]["sigma"] == pytest.approx([0.1] * 5, rel=1e-6)
    weights = torch.cat([v.flatten() for v in posterior.mean().values()]).abs().double()
    ratio = torch.quantile(0.1 / weights, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
    assert result["quantiles"]["noise_to_weight"] == pytest.approx(ratio.tolist(), rel=1e-6)
    assert {k: v["shape"] for k, v in result["tensors"].items()} == {
        k: list(v.shape) for k, v in posterior.mean().items()
    }
    assert main(["bayes", "inspect", str(tmp_path / "q")]) == 0
    assert "sigma / |mean|" in capfd.readouterr().out
    message = refused(capfd, "bayes", "inspect", tmp_path / "none")
    assert message.endswith("none' holds no posterior: posterior_config.json is missing")


def test_inspect_measures_what_has_no_diagonal(tmp_path: Path) -> None:
    from vlm_reason.weights.families.particles import Particles

    q = gaussian(0.1)
    Particles(q.adapter_config, [q.mean(), {k: v + 1 for k, v in q.mean().items()}], Origin()).save(
        tmp_path / "p"
    )
    found = inspect(tmp_path / "p")
    assert found["sigma_from"] == "draws" and found["kl_to_prior"] is None and found["prior"] == []
    # half of the 32 draws each: variance 1/4, times 32/31
    assert found["quantiles"]["sigma"] == pytest.approx([math.sqrt(8 / 31)] * 5, rel=1e-5)
    DiagonalGaussian(q.adapter_config, q.mean(), {}, Origin()).save(tmp_path / "point")
    assert inspect(tmp_path / "point")["quantiles"] is None


def test_inspect_looks_at_a_last_layer(folder: Path) -> None:
    run_bayes(config_of(folder, "method=vbll", "eval_task=null"), False)
    found = inspect(folder / "run" / "posterior")
    posterior = Posterior.load(folder / "run" / "posterior")
    assert isinstance(posterior, LastLayer)
    sigma = posterior.head.covariance.diagonal().sqrt().expand_as(posterior.head.mean)
    assert found["uncertain_weights"] == posterior.head.mean.numel() and found["sigma_from"] == "covariance"
    assert found["tensors"]["head"] == {
        "shape": list(sigma.shape),
        "sigma": pytest.approx(float(sigma.median())),
    }
    assert sum(t["sigma"] > 0 for t in found["tensors"].values()) == 1


def test_merge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = gaussian(0.1, 1), gaussian(0.2, 2)
    for name, q in (("a", a), ("b", b)):
        q.save(tmp_path / name)
    result = ask(capfd, "bayes", "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "ab")
    assert result["report"]["tasks"] == 2 and result["family"] == "diagonal"
    merged = Posterior.load(tmp_path / "ab")
    for key, value in merged.mean().items():  # precisions 100 and 25 with a prior of 2 in each: 98 + 23 + 2
        expected = (100 * a.mean()[key] + 25 * b.mean()[key]) / 123
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert "at least two posteriors, got 1" in refused(
        capfd, "bayes", "merge", tmp_path / "a", "-o", tmp_path / "x"
    )
    again = refused(capfd, "bayes", "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "ab")
    assert "exists and is not an empty folder" in again
    asked = ["bayes", "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "x"]
    assert "unknown config key 'spce'; did you mean 'space'?" in refused(capfd, *asked, "spce=delta")


def test_a_point_outweighs_what_is_uncertain_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sure, unsure = gaussian(0.1, 1), gaussian(0.2, 2)
    point = DiagonalGaussian(sure.adapter_config, sure.mean(), {}, sure.origin)
    for name, q in (("point", point), ("unsure", unsure), ("again", point)):
        q.save(tmp_path / name)
    asked = ["bayes", "merge", tmp_path / "unsure"]
    result = ask(capfd, *asked, tmp_path / "point", "-o", tmp_path / "both")
    (line,) = result["warnings"]
    assert line.startswith("merge: posterior 1 is certain of every weight and others are not: it outweighs")
    merged = Posterior.load(tmp_path / "both")
    assert merged.uncertain() == [] and all(torch.equal(merged.mean()[k], v) for k, v in point.mean().items())
    result = ask(capfd, *asked, tmp_path / "unsure", f"base={tmp_path / 'point'}", "-o", tmp_path / "on")
    assert "the base is certain of every weight" in result["warnings"][0]
    assert main([*map(str, asked), str(tmp_path / "point"), "-o", str(tmp_path / "shown"), "--quiet"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"warning: {line}"
    for pair in (("point", "again"), ("unsure", "unsure")):
        folders = [tmp_path / name for name in pair]
        assert ask(capfd, "bayes", "merge", *folders, "-o", tmp_path / f"{pair[0]}2")["warnings"] == []


# --------------------------------------------------------------------------------------------------- help and recipes


@pytest.mark.parametrize("command", ["", "fit", "tfb", "laplace", "predict", "export", "merge", "inspect"])
def test_help_has_examples_and_imports_nothing_heavy(command: str) -> None:
    arguments = ["bayes", *([command] if command else []), "--help"]
    code = (
        "import sys\nfrom vlm_reason.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "110"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "examples:\n  vlm-reason bayes " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes(path: Path, folder: Path) -> None:
    """The first line is the command, every key is known, and it runs at toy size."""
    name = re.escape(path.relative_to(REPO).as_posix())
    command = re.match(rf"# vlm-reason train {name}((?: [\w.]+=\S+)*)", path.read_text().splitlines()[0])
    assert command
    config = from_dict(BayesConfig, load_config(path, command[1].split()))
    assert config.training_settings() and config.adapter_settings() and config.prediction_settings()
    if config.template == "choices":
        rows = [
            {"id": f"c{i}", "question": f"which {i}", "choices": ["p", "q"], "label": i % 2} for i in range(6)
        ]
        for split, part in (("train", rows[:4]), ("test", rows[4:])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    toy = [f"task.name={folder}", f"eval_task.name={folder}", f"model={folder / 'model'}", "dtype=float32"]
    toy += [f"output_dir={folder / 'run'}", "training.epochs=1", "predictive.n=2"]
    toy += [f"held_out.name={folder}"] if config.held_out else []
    result = run_bayes(from_dict(BayesConfig, load_config(path, toy)), False, measure)
    assert result["method"] == config.method and (folder / "run" / "posterior").is_dir()
    assert set(result["metrics"]) >= {"accuracy", "nll", "ece", "brier"}


def test_a_run_that_has_made_nothing_yet_may_change(folder: Path) -> None:
    with pytest.raises(UserError, match="needs held-out examples"):
        run_bayes(config_of(folder, "method=temperature", "held_out=null"), False)
    assert run_bayes(config_of(folder, "method=temperature"), False)["report"]["details"]["of"] == "map"


def test_how_it_predicts_may_change_until_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("method=ensemble", "options.members=2")
    with pytest.raises(UserError, match="no predictive in closed form"):
        run_bayes(config_of(folder, *own, "predictive.mode=closed_form"), False)
    with monkeypatch.context() as m:
        m.setattr(Ensemble, "fit", None)  # it is fitted
        run_bayes(config_of(folder, *own), False)
    with pytest.raises(UserError, match="holds a run with predictive"):
        run_bayes(config_of(folder, *own, "predictive.n=3"), False)


def test_a_folder_that_lost_its_config_is_left_alone(folder: Path) -> None:
    (folder / "odd").mkdir()
    (folder / "odd" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run without its config.yaml"):
        run_bayes(config_of(folder, f"output_dir={folder / 'odd'}"), False)
