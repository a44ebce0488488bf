"""docs/weights.md against the code: methods, settings and functions it names are there, and none is left out."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from vlm_reason import weights
from vlm_reason.weights import FAMILIES, IVON, METHODS, Posterior

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("weights", "ivon", "bayesian_lora", "predictive", "merging", "bayes")
PAGE, IVON_PAGE, METHODS_PAGE = ((DOCS / f"{name}.md").read_text() for name in PAGES[:3])


def test_every_method_of_a_posterior_is_named() -> None:
    rows = re.findall(r"^\| ((?:`\w+\([^`]*\)`(?:, )?)+) \|", PAGE, re.MULTILINE)
    named = set(re.findall(r"`(\w+)\(", " ".join(rows))) | {"from_optimizer"}
    own = {n for n, f in inspect.getmembers(Posterior, callable) if not n.startswith("_")}
    assert named == own - {"tensors", "from_tensors", "files", "from_folder"}  # those are for families


def test_settings_and_families_are_the_codes() -> None:
    table = IVON_PAGE.split("## Settings")[1].split("`diagnose")[0]
    named = {
        n for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for n in re.findall(r"`(\w+)`", cell)
    }
    arguments = set(inspect.signature(IVON).parameters)
    assert named == arguments - {"params", "mc_samples", "hess_approx", "seed", "horizon", "data_size"}
    everything = "".join((DOCS / f"{name}.md").read_text() for name in PAGES)
    returned = {
        "Batch",
        "Choices",
        "DiagonalGaussian",
        "Diagnostics",
        "LeaveOneOut",
        "Likelihood",
        "MergeReport",
        "Predictive",
        "Origin",
        "Settings",
    }
    assert set(weights.__all__) - set(re.findall(r"\w+", everything)) <= returned
    assert all(f"`{name}`" in PAGE for name in FAMILIES)


def test_every_method_is_on_both_pages_and_its_settings_are_explained() -> None:
    for name, cls in METHODS.items():
        assert f"`{name}`" in PAGE, name
        if name == "map":
            continue  # a baseline without settings but its prior
        assert name in METHODS_PAGE, name
        missing = [f.name for f in dataclasses.fields(cls) if f"`{f.name}`" not in METHODS_PAGE]
        assert not missing, (name, missing)
