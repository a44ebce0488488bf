from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from vlm_reason.cli import main as entry
from vlm_reason.cli import output, wiring
from vlm_reason.cli.output import estimate, plain, table
from vlm_reason.errors import UserError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: smollm2-135m\noutput_dir: {tmp_path / 'run'}\n")
    return path


def use(monkeypatch: pytest.MonkeyPatch, run, show=lambda result: print(result)) -> None:
    """Give the `train` command another body."""
    commands = [replace(c, run=run, show=show) if c.name == "train" else c for c in entry.COMMANDS]
    monkeypatch.setattr(entry, "COMMANDS", tuple(commands))


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("train", "sample", "rank", "eval"))]
)
def test_help_has_examples_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom vlm_reason.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  vlm-reason " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm_reason", "train", "no.yaml"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vlm-reason: no config file 'no.yaml'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "RECIPE", "modle=x"], "unknown config key 'modle'; did you mean 'model'?"),
        (["train", "RECIPE", "seed=x"], "seed: expected a whole number, got 'x' (text)"),
        (["eval", "RECIPE", "seed"], "override 'seed' is not of the form key=value (or section.key=value)"),
        (["sample", "RECIPE"], "the config has no section 'eval_task': give it, or say --on task"),
        (
            ["sample", "RECIPE", "sampling.trace=3"],
            "unknown config key 'sampling.trace'; did you mean 'traces'?",
        ),
        (["sample", "RECIPE", "sampling.traces=0"], "sampling: traces must be >= 1, got 0"),
        (["sample", "RECIPE", "sampling.adapter=x"], "sampling.adapter is chosen by --system base|trained"),
        (
            ["rank", "RECIPE", "--method", "majorty"],
            "unknown ranking method 'majorty'; did you mean 'majority'?",
        ),
        (
            ["eval", "RECIPE", "--from-store"],
            "no samples in 'RUN/samples'; draw some first (vlm-reason sample)",
        ),
        (
            ["eval", "RECIPE", "evaluation.temprature=1"],
            "'evaluation.temprature'; did you mean 'temperature'?",
        ),
        (["eval", "RECIPE", "evaluation.traces=4"], "greedy decoding (temperature 0) gives one text"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_one_line_and_exit_2(recipe: Path, capfd, arguments, message, as_json) -> None:
    arguments = [str(recipe) if a == "RECIPE" else a for a in arguments] + ["--json"] * as_json
    assert entry.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("vlm-reason: ")
    assert message.replace("RUN", str(recipe.parent / "run")) in err
    assert not (recipe.parent / "run").exists()  # nothing half-written


def test_key_values_are_taken_behind_options_too(recipe: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")  # put back what --quiet sets
    seen: list[Namespace] = []
    use(monkeypatch, lambda options: seen.append(options) or {})
    assert entry.main(["train", "--quiet", str(recipe), "seed=1", "--json", "model=x"]) == 0
    assert seen[0].overrides == ["seed=1", "model=x"] and seen[0].quiet and seen[0].json
    with pytest.raises(SystemExit) as stop:
        entry.main(["train", str(recipe), "--jsn"])
    assert stop.value.code == 2 and "unrecognized argument '--jsn'" in capfd.readouterr().err


def test_json_is_alone_on_stdout_whatever_libraries_print(recipe: Path, monkeypatch, capfd) -> None:
    def run(options: Namespace) -> dict:
        print("a library prints")
        os.write(1, b"and so does its C code\n")
        subprocess.run([sys.executable, "-c", "print('and a child')"], check=True)
        return {"value": float("nan"), "ci": (0.0, float("inf")), "text": "ü"}

    use(monkeypatch, run)
    assert entry.main(["train", str(recipe), "--json"]) == 0
    out, err = capfd.readouterr()
    assert out == '{"value": null, "ci": [0.0, null], "text": "ü"}\n'
    assert all(line in err for line in ("a library prints", "and so does its C code", "and a child"))
    print("stdout is back")
    assert capfd.readouterr().out == "stdout is back\n"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last checkpoint"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/y"),
            1,
            "the disk is full (x/y); free some space",
        ),
        (
            RuntimeError("writer: No space left on device (os error 28)"),
            1,
            "the disk is full; free some space",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 64"),
            1,
            "the disk is full; free some space",
        ),
        (OSError(errno.EFBIG, "File too large"), 1, "a file is larger than the file system or the limit"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 1, "Permission denied: x/y"),
        (UserError("two\nlines"), 2, "two lines"),
    ],
)
def test_failures_are_one_line_with_their_status(
    recipe, monkeypatch, capfd, error, status, message, as_json
) -> None:
    def run(options: Namespace) -> dict:
        raise error

    use(monkeypatch, run)
    assert entry.main(["train", str(recipe)] + ["--json"] * as_json) == status
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"vlm-reason: {message}") and err.count("\n") == 1


def test_a_full_disk_behind_another_error_is_still_a_full_disk(recipe, monkeypatch, capfd) -> None:
    def run(options: Namespace) -> dict:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("could not save") from error

    use(monkeypatch, run)
    assert entry.main(["train", str(recipe)]) == 1
    assert "the disk is full" in capfd.readouterr().err


def test_our_own_mistakes_keep_their_traceback(recipe, monkeypatch) -> None:
    def run(options: Namespace) -> dict:
        raise ZeroDivisionError

    use(monkeypatch, run)
    with pytest.raises(ZeroDivisionError):
        entry.main(["train", str(recipe)])


def test_estimates_and_plain_values() -> None:
    assert estimate({"value": 0.5, "ci": [0.25, 0.75]}, ".2f") == "0.50 [0.25, 0.75]"
    assert estimate({"value": 0.5, "ci": [float("nan")] * 2}) == "0.500" and estimate(None) == "-"
    assert estimate({"value": float("nan"), "ci": [0, 1]}) == "-"
    assert plain({"a": (1, float("-inf")), 2: None}) == {"a": [1, None], "2": None}


def test_tables_are_plain_text_off_a_terminal_and_never_read_markup(capsys) -> None:
    output.console().print(table("t", ("", "x" * 50, "y" * 50), [("[red]a[/red]", "[b]", "\\boxed{3}")]))
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.isascii() and "[red]a[/red]" in out and "\\boxed{3}" in out
    assert sum("y" * 50 in line for line in out.splitlines()) == 1  # not wrapped to 80 columns


def test_trained_is_found_only_when_whole(tmp_path: Path) -> None:
    from vlm_reason.config import RunConfig

    config = RunConfig(output_dir=str(tmp_path))
    assert wiring.trained_folder(config) is None and wiring.default_system(config) == "base"
    with pytest.raises(UserError, match="nothing trained in"):
        wiring.serve(config, ("trained",))
    folder = tmp_path / "adapters" / "reasoner"
    folder.mkdir(parents=True)
    assert wiring.trained_folder(config) is None
    (folder / "adapter_model.safetensors").touch()
    assert wiring.trained_folder(config) == folder and wiring.default_system(config) == "trained"


def test_recipe_of_this_test_is_read(recipe: Path) -> None:
    config = wiring.read_config(
        Namespace(config=str(recipe), overrides=["trainer.max_trace_tokens=5", "seed=3"])
    )
    settings = wiring.sampling_config(config, "sampling", {"traces": 4, "temperature": 1.0})
    assert (settings.max_trace_tokens, settings.seed, settings.traces) == (5, 3, 4)
    assert json.loads(output.to_json({"a": 1})) == {"a": 1}


def test_half_a_surrogate_pair_is_printed_as_the_escape_that_it_was() -> None:
    text = output.to_json({"question": "\ud800 \U0001f600"})
    assert text.encode() and text == '{"question": "\\ud800 \U0001f600"}'
    assert json.loads(text) == {"question": "\ud800 \U0001f600"}


def test_what_the_terminal_cannot_show_is_an_escape(tmp_path: Path) -> None:
    line = {"id": "a", "question": "\ud800 \u00e9?", "answer": "1", "samples": [{"text": "1"}, {"text": "2"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    steps = [
        ["import", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "s")],
        ["select", str(tmp_path / "s"), "--by", "entropy"],
    ]
    code = f"import sys; from vlm_reason.cli.main import main; sys.exit(max(map(main, {steps!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert rb"\ud800 \xe9?" in done.stdout
