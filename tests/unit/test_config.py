from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from vlm_reason.config import RunConfig, apply_overrides, from_dict, load_config, save_resolved, to_dict
from vlm_reason.errors import UserError


@dataclass(frozen=True)
class Trainer:
    learning_rate: float = 1e-4
    steps: int = 10
    bf16: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    layers: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")


@dataclass(frozen=True)
class Run:
    name: str
    trainer: Trainer = field(default_factory=Trainer)
    folder: Path = Path("runs")
    mixed: int | str = 0
    table: dict[str, Trainer] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


def test_builds_nested_dataclasses_and_converts() -> None:
    data = {
        "name": "a",
        "trainer": {
            "learning_rate": "1e-3",
            "steps": 20.0,
            "betas": [0, 1],
            "layers": ["q", "v"],
            "clip": None,
        },
        "folder": "x/y",
        "mixed": "3",
        "table": {"one": {"steps": "2e1"}},
        "free": {"anything": [1, {"b": 2}]},
    }
    run = from_dict(Run, data)
    assert run.trainer == Trainer(1e-3, 20, False, (0.0, 1.0), ("q", "v"))
    assert isinstance(run.trainer.steps, int) and isinstance(run.trainer.betas[0], float)
    assert run.folder == Path("x/y") and run.mixed == "3" and run.table == {"one": Trainer(steps=20)}
    assert run.free == {"anything": [1, {"b": 2}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "a"}, r"unknown config key 'nmae'; did you mean 'name'\?"),
        (
            {"name": "a", "trainer": {"lerning_rate": 1}},
            r"'trainer.lerning_rate'; did you mean 'learning_rate'\?",
        ),
        ({}, "missing config key 'name'"),
        ({"name": 5}, r"name: expected text, got 5 \(int\)"),
        (
            {"name": "a", "trainer": {"steps": 1.5}},
            r"trainer.steps: expected a whole number, got 1.5 \(float\)",
        ),
        ({"name": "a", "trainer": {"steps": True}}, "trainer.steps: expected a whole number, got True"),
        ({"name": "a", "trainer": {"bf16": "yes"}}, "trainer.bf16: expected true or false, got 'yes'"),
        ({"name": "a", "trainer": {"clip": "big"}}, "trainer.clip: expected a number, got 'big'"),
        ({"name": "a", "trainer": {"betas": [1]}}, "trainer.betas: expected a list of 2"),
        ({"name": "a", "trainer": {"layers": "q"}}, r"trainer.layers: expected a list, got 'q' \(text\)"),
        ({"name": "a", "trainer": {"layers": [1]}}, r"trainer.layers\[0\]: expected text"),
        ({"name": "a", "trainer": {"schedule": "cosin"}}, "'cosin' is not one of .* did you mean 'cosine'"),
        ({"name": "a", "trainer": {"steps": 0}}, "trainer: steps must be >= 1, got 0"),
        ({"name": "a", "trainer": None}, r"trainer: expected a section with keys, got None \(null\)"),
        ({"name": "a", "mixed": [1]}, "mixed: expected int or str"),
        ({"name": "a", "table": {"one": {"stepz": 1}}}, "'table.one.stepz'; did you mean 'steps'"),
    ],
)
def test_errors_name_the_place_the_value_and_the_nearest_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Run, data)


def test_a_date_stays_text() -> None:
    assert apply_overrides({}, ["name=2026-01-31"]) == {"name": "2026-01-31"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32}, "seed must be in"),
        ({"output_dir": " "}, "output_dir is empty"),
    ],
)
def test_a_run_needs_a_seed_that_numpy_takes_and_a_folder(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        from_dict(RunConfig, data)


def test_overrides_are_yaml_values_at_dotted_places_and_leave_the_input_alone() -> None:
    data = {"trainer": {"steps": 1}}
    changed = apply_overrides(
        data, ["trainer.steps=5", "trainer.betas=[0.5, 0.9]", "a.b.c=null", 'name="7"', "q=a=b"]
    )
    assert changed == {
        "trainer": {"steps": 5, "betas": [0.5, 0.9]},
        "a": {"b": {"c": None}},
        "name": "7",
        "q": "a=b",
    }
    assert data == {"trainer": {"steps": 1}}


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", "name.x=3", "name=[1"])
def test_bad_overrides_are_refused(override: str) -> None:
    with pytest.raises(UserError, match="override"):
        apply_overrides({"name": "a"}, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- 1", "must hold a mapping"),
        ("a: [1", "not valid YAML"),
        ("seed: 1\nseed: 2", "line 2 column 1: not valid YAML: key 'seed' is given twice"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read config file"):
        load_config(tmp_path)


def test_resolved_config_loads_back_equal_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    run = Run("ü", Trainer(1e-5, layers=("a", "b"), clip=1.0), table={"t": Trainer(steps=3)})
    path = save_resolved(run, tmp_path / "new")
    assert from_dict(Run, load_config(path)) == run
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]
    assert from_dict(RunConfig, to_dict(RunConfig(seed=3))) == RunConfig(seed=3)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_resolved(RunConfig(), tmp_path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_resolved(RunConfig(seed=9), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_cannot_hold_objects() -> None:
    with pytest.raises(TypeError):
        to_dict({"x": object()})
