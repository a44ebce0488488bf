"""docs/weights.md against the code: methods, settings and functions it names are there, and none is left out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from vlm_reason import weights
from vlm_reason.weights import FAMILIES, IVON, Posterior

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text()


def test_every_method_of_a_posterior_is_named() -> None:
    rows = re.findall(r"^\| ((?:`\w+\([^`]*\)`(?:, )?)+) \|", PAGE, re.MULTILINE)
    named = set(re.findall(r"`(\w+)\(", " ".join(rows))) | {"from_optimizer"}
    own = {n for n, f in inspect.getmembers(Posterior, callable) if not n.startswith("_")}
    assert named == own - {"tensors", "from_tensors", "files", "from_folder"}  # those are for families


def test_settings_and_families_are_the_codes() -> None:
    table = PAGE.split("### Settings")[1].split("`diagnose")[0]
    named = {
        n for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for n in re.findall(r"`(\w+)`", cell)
    }
    arguments = set(inspect.signature(IVON).parameters)
    assert named == arguments - {"params", "mc_samples", "hess_approx", "seed", "horizon", "data_size"}
    assert set(weights.__all__) - set(re.findall(r"\w+", PAGE)) <= {
        "DiagonalGaussian", "Diagnostics", "Origin", "Settings"
    }  # fmt: skip
    assert all(f"`{name}`" in PAGE for name in FAMILIES)
