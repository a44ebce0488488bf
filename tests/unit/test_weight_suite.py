"""A comparison of methods: the same problems for all, cells that are run once, a table that is recomputed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_reason.config import from_dict, load_config, to_dict
from vlm_reason.errors import UserError
from vlm_reason.evaluation import weight_suite
from vlm_reason.evaluation.weight_suite import WeightSuite, run_weight_suite
from vlm_reason.evaluation.weight_suite.plot import plot
from vlm_reason.evaluation.weight_suite.table import losses, measure, read_cells, table, verdicts

WORDS = ["good film", "bad film", "fine plot", "poor plot", "nice cast", "weak cast", "sad end", "glad end"]


def rows(path: Path, count: int, start: int) -> None:
    lines = [
        {"id": f"{path.stem}-{n}", "text": f"{WORDS[n % 8]} {start + n}", "label": n % 2,
         "label_name": "no" if n % 2 else "yes"}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tiny_tokenizer: Any
) -> dict[str, Any]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows(tmp_path / name / "train.jsonl", 24, 100)
        rows(tmp_path / name / "test.jsonl", 12, 500 if name == "a" else 700)
    monkeypatch.setattr(weight_suite.run, "load_model", lambda *_: (tiny_llama, tiny_tokenizer))

    def entry(name: str) -> dict[str, Any]:
        task = {"kind": "jsonl", "name": f"{{data}}/{name}"}
        return {"task": {**task, "split": "train"}, "eval_task": {**task, "split": "test"}, "train": 12, "held_out": 4,
                "test": 10, "template": "labels"}  # fmt: skip

    return {
        "sets": {"a": {**entry("a"), "out_of_domain": "b"}, "b": entry("b")},
        "methods": {"map": {"method": "map"}, "temperature": {"method": "temperature", "start": "map"}},
        "adapter": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "layers": [1]},
        "training": {"epochs": 1, "batch_size": 4},
        "seeds": [0, 1],
        "data": str(tmp_path),
        "dtype": "float32",
        "output_dir": str(tmp_path / "out"),
    }


def run(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run_weight_suite(from_dict(WeightSuite, {**config, **changes}), progress=False)


def test_every_cell_is_run_once_and_the_table_follows_from_the_cells(config: dict[str, Any]) -> None:
    first = run(config, only=["a"])
    assert first["cells_run"] == 4
    result = run(config)
    assert result["cells_run"] == 4 and run(config)["cells_run"] == 0
    cells = read_cells(Path(config["output_dir"]))
    own = {c["seed"]: c for c in cells if (c["set"], c["method"]) == ("a", "temperature")}
    base = {c["seed"]: c for c in cells if (c["set"], c["method"]) == ("a", "map")}
    assert [len(c["labels"]) for c in own.values()] == [10, 10]
    row = next(r for r in result["rows"] if (r["set"], r["method"]) == ("a", "temperature"))
    p = np.array(own[0]["test"]["probs"])
    by_hand = -np.log(p[np.arange(10), own[0]["labels"]])
    np.testing.assert_allclose(losses(own[0]), by_hand)
    assert row["nll"]["value"] == pytest.approx(np.mean([losses(c).mean() for c in own.values()]))
    apart = np.mean([losses(own[s]) - losses(base[s]) for s in (0, 1)], axis=0)
    assert row["nll_difference"]["value"] == pytest.approx(apart.mean()) and row["nll_difference"]["n"] == 10
    assert row["accuracy"]["value"] == pytest.approx(np.mean([measure(c)["accuracy"] for c in own.values()]))
    assert row["ood_auroc"] is not None and row["ood_auroc_mi"] is None  # a point has no mutual information
    # scaling by a temperature never changes the first choice
    np.testing.assert_array_equal(p.argmax(1), np.array(base[0]["test"]["probs"]).argmax(1))


def test_seeds_train_on_other_problems_and_test_on_the_same(config: dict[str, Any]) -> None:
    run(config, only=["a"], methods={"map": {"method": "map"}})
    one, other = (
        json.loads((Path(config["output_dir"]) / f"cells/a/{s}/map.json").read_text()) for s in (0, 1)
    )
    assert one["test"]["ids"] == other["test"]["ids"] and one["labels"] == other["labels"]
    assert one["test"]["probs"] != other["test"]["probs"]


def test_a_method_may_join_that_starts_from_one_that_has_run(config: dict[str, Any]) -> None:
    asked = {"only": ["b"], "seeds": [0]}
    assert run(config, **asked, methods={"map": {"method": "map"}})["cells_run"] == 1
    assert run(config, **asked)["cells_run"] == 2  # map once more, for its posterior
    assert run(config, **asked)["cells_run"] == 0


def test_one_seed_has_no_interval_and_the_result_is_json(config: dict[str, Any]) -> None:
    run(config, only=["b"], seeds=[0], methods={"map": {"method": "map"}})
    text = (Path(config["output_dir"]) / "result.json").read_text()
    [row] = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert row["nll"]["ci"] == [None, None] and row["nll"]["value"] > 0


def test_strangers_are_asked_with_labels(config: dict[str, Any], tmp_path: Path) -> None:
    lines = [
        {"id": f"q{n}", "question": f"{n} or {n + 1}?", "choices": [str(n), str(n + 1)], "label": 0}
        for n in range(40)
    ]
    for name, part in (("train", lines[:20]), ("test", lines[20:])):
        (tmp_path / "a" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    sets = {**config["sets"], "a": {**config["sets"]["a"], "template": "choices"}}
    with pytest.raises(UserError, match="sets.a.out_of_domain: its own problems have no labels"):
        run(config, sets=sets, only=["a"])


def test_another_setting_in_the_same_folder_is_refused(config: dict[str, Any]) -> None:
    run(config, only=["b"], seeds=[0])
    with pytest.raises(UserError, match=r"methods.map = .* choose another"):
        run(config, methods={"map": {"method": "map", "n": 3}})
    with pytest.raises(UserError, match="training = "):
        run(config, training={"epochs": 2})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": {"x": {"method": "mapp"}}, "reference": "x"}, "unknown method 'mapp'"),
        ({"reference": "swag"}, "reference: 'swag' is not there"),
        ({"only": ["c"]}, "only: 'c' is not there"),
        ({"data": None}, r"say where the data are \(data=FOLDER\)"),
        ({"seeds": []}, "at least one set, one method and one seed"),
        ({"training": {"epoch": 1}}, "epoch"),
    ],
)
def test_bad_settings_are_one_line(config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(config, **changes)


def test_too_few_problems(config: dict[str, Any]) -> None:
    sets = {"b": {**config["sets"]["b"], "train": 30}}
    with pytest.raises(UserError, match="24 training problems"):
        run(config, sets=sets)
    with pytest.raises(UserError, match="24 training problems and 12 others; wanted 16 and 13"):
        run(config, sets={"b": {**config["sets"]["b"], "test": 13}}, output_dir=f"{config['output_dir']}2")


def test_verdicts_read_the_interval_of_the_difference() -> None:
    def row(method: str, low: float, high: float) -> dict[str, Any]:
        return {"set": "s", "method": method, "nll_difference": {"ci": [low, high]}}

    found = verdicts(
        [row("a", -0.2, -0.1), row("b", 0.1, 0.2), row("c", -0.1, 0.1), {"set": "s", "method": "map"}], "map"
    )
    assert found == {"s": {"better": ["a"], "worse": ["b"], "no difference shown": ["c"]}}


def test_ood_auroc_is_one_where_strangers_are_always_less_certain() -> None:
    def cell(inside: list[float], outside: list[float]) -> dict[str, Any]:
        test = {"probs": [[0.9, 0.1], [0.2, 0.8]], "total_entropy": inside, "mutual_information": [0.0, 0.0]}
        return {"set": "s", "seed": 0, "method": "map", "labels": [0, 1], "test": test, "fit_seconds": 1.0,
                "predict_seconds": 1.0,
                "out_of_domain": {"total_entropy": outside, "mutual_information": [0.0, 0.0]}}  # fmt: skip

    values = measure(cell([0.1, 0.2], [0.5, 0.6]))
    assert values["ood_auroc"] == 1.0 and "ood_auroc_mi" not in values
    assert values["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2) and values["accuracy"] == 1.0
    assert table([cell([0.5, 0.6], [0.1, 0.2])], "map")[0]["ood_auroc"]["value"] == 0.0


def test_the_plot_is_written(config: dict[str, Any], tmp_path: Path) -> None:
    result = run(config, only=["a"])
    path = plot(result["rows"], "map", tmp_path / "plot.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_the_suite_of_the_project_is_valid() -> None:
    path = Path(__file__).resolve().parents[2] / "evals" / "suites" / "bayes_lora.yaml"
    suite = from_dict(WeightSuite, load_config(path))
    assert set(suite.sets) == {"sst2", "trec", "arc_easy", "openbookqa", "syllogism"}
    assert {m.method for m in suite.methods.values()} == {
        "map", "temperature", "dropout", "ensemble", "laplace", "tfb", "blob", "ivon", "swag", "vbll"
    }  # fmt: skip


def test_the_published_figures_follow_the_suite() -> None:
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "evals" / "results" / "bayes_lora.json").read_text())
    suite = from_dict(WeightSuite, load_config(root / "evals" / "suites" / "bayes_lora.yaml"))
    assert (
        found["config"]["methods"] == to_dict(suite)["methods"]
        and found["config"]["sets"] == to_dict(suite)["sets"]
    )
    assert {(r["set"], r["method"]) for r in found["rows"]} == {
        (s, m) for s in suite.sets for m in suite.methods
    }
    assert all(r["seeds"] == [0, 1, 2] for r in found["rows"])
    page = (root / "docs" / "weights.md").read_text()
    for row in found["rows"]:
        assert f"{row['nll']['value']:.3f} ± " in page, (row["set"], row["method"])
