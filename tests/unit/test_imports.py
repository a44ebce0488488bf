"""Dependencies point one way. Walks every import of the package, lazy ones inside functions included.

    types, config, errors <- objectives <- exact
    types <- stats, store, tasks, models <- scoring <- engines <- {traces, prompts, thoughts, weights}
          <- ranking <- evaluation <- cli

What stands in one tier never imports its neighbours, so the four latents never see one another. An engine scores with
scoring/, never the other way round. Private names of the libraries we build on are imported by compat/ alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = "vlm_reason"

BASE = {"types", "errors", "atomic", "config"}
SOURCES = {"stats", "store", "tasks", "models"}
ENGINES = {"scoring", "engines"}
LATENTS = {"traces", "prompts", "thoughts", "weights"}
JUDGES = {"ranking", "evaluation"}

_shared = BASE | {"objectives", "compat"} | SOURCES | ENGINES
ALLOWED: dict[str, set[str]] = {
    "": {"types", "errors"},  # vlm_reason/__init__.py
    "errors": set(),
    "types": set(),
    "atomic": {"errors"},
    "config": {"errors", "types", "atomic"},
    "compat": BASE,
    "objectives": BASE,
    "exact": BASE | {"objectives"},
    **{name: BASE | {"compat"} for name in SOURCES},
    "scoring": BASE | {"compat"} | SOURCES,
    "engines": BASE | {"compat"} | SOURCES | {"scoring"},
    **{name: _shared for name in LATENTS},
    "ranking": _shared | LATENTS,
    "evaluation": _shared | LATENTS | {"ranking"},  # the harness runs rankers
    "planning": BASE | SOURCES | ENGINES | {"traces"},
    "__main__": {"cli"},
    "cli": _shared | {"exact", "planning"} | LATENTS | JUDGES,
}

# One module, not its whole folder, may reach further: the engine over an enumerable world.
EXTRA: dict[str, set[str]] = {f"{PACKAGE}.engines.exact": {"exact"}}

LIBRARIES = {"transformers", "trl", "peft", "vllm"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the file; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                here = module.split(".")
                source = ".".join([*here[: len(here) - up], *filter(None, [source])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def component(dotted: str) -> str:
    """The folder or top-level module a name of ours belongs to: vlm_reason.engines.base.Law -> engines."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def wrong_ways(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of `source` that point the wrong way, one line of text each."""
    own = component(module)
    found = []
    for line, name in imported_names(ast.parse(source), module, is_package):
        if name.split(".")[0] != PACKAGE:
            continue
        target = component(name)
        if target != own and target not in ALLOWED[own] | EXTRA.get(module, set()):
            found.append(f"{module}:{line} imports {name}: {own or PACKAGE} may not import {target}")
    return found


def private_uses(source: str, module: str, is_package: bool = False) -> list[str]:
    """Private names of LIBRARIES that `source` imports, or reaches through a module it imported."""
    tree = ast.parse(source)
    found = []
    bound: set[str] = set()  # local names that stand for something of these libraries
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname or a.name.split(".")[0] for a in node.names if _library(a.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and _library(node.module or ""):
            bound |= {a.asname or a.name for a in node.names}
    for line, name in imported_names(tree, module, is_package):
        if _library(name) and any(_private(part) for part in name.split(".")):
            found.append(f"{module}:{line} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr) and _root(node) in bound:
            found.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
    return found


def _library(dotted: str) -> bool:
    return dotted.split(".")[0] in LIBRARIES


def _private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def files() -> Iterable[Path]:
    return sorted((REPO / PACKAGE).rglob("*.py"))


def test_every_folder_has_its_place_in_the_order() -> None:
    unknown = {component(module_name(path)) for path in files()} - set(ALLOWED)
    assert not unknown, f"give {sorted(unknown)} a place in ALLOWED"


def test_the_order_has_no_cycle() -> None:
    open_edges = {name: set(targets) for name, targets in ALLOWED.items()}
    while open_edges:
        leaves = {name for name, targets in open_edges.items() if not targets & set(open_edges)}
        assert leaves, f"a cycle among {sorted(open_edges)}"
        open_edges = {name: targets for name, targets in open_edges.items() if name not in leaves}


@pytest.mark.parametrize("path", files(), ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    found = wrong_ways(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", [p for p in files() if component(module_name(p)) != "compat"], ids=module_name
)
def test_private_names_are_imported_by_compat_alone(path: Path) -> None:
    found = private_uses(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


# ------------------------------------------------------------------ the walk itself, on sources with known answers


@pytest.mark.parametrize(
    ("module", "source", "targets"),
    [
        ("vlm_reason.traces.run", "from ..weights import FAMILIES", ["weights"]),
        ("vlm_reason.traces.run", "def f():\n    from vlm_reason.prompts.network import N", ["prompts"]),
        ("vlm_reason.traces.run", "from .recipe import Recipe\nfrom ..engines.base import Law", []),
        ("vlm_reason.traces.run", "from ..exact import world", ["exact"]),
        ("vlm_reason.objectives.bounds", "import vlm_reason.models.load", ["models"]),
        ("vlm_reason.objectives.bounds", "from .. import tasks, types", ["tasks"]),
        ("vlm_reason.engines.hf", "from ..exact.world import World", ["exact"]),
        ("vlm_reason.engines.exact", "from ..exact.world import World", []),
        ("vlm_reason.engines.exact", "from ..traces import recipe", ["traces"]),
        ("vlm_reason.engines.hf", "from ..scoring.logprobs import score_sequences", []),
        ("vlm_reason.scoring.tree", "from ..engines.base import Engine", ["engines"]),
        ("vlm_reason.tasks.sources", "from ..store import SampleStore", ["store"]),
        ("vlm_reason.ranking.vote", "from ..evaluation import metrics", ["evaluation"]),
        ("vlm_reason.cli.train", "from ..traces import run\nfrom ..weights import FAMILIES", []),
        ("vlm_reason.types", "from .errors import UserError", ["errors"]),
    ],
)
def test_wrong_ways_are_found(module: str, source: str, targets: list[str]) -> None:
    assert [line.rsplit(" ", 1)[1] for line in wrong_ways(source, module)] == targets


def test_relative_imports_of_a_package_are_resolved_from_the_package() -> None:
    source = "from .hf import Engine\nfrom ..scoring import tree"
    names = [name for _, name in imported_names(ast.parse(source), "vlm_reason.engines", is_package=True)]
    assert names == ["vlm_reason.engines.hf.Engine", "vlm_reason.scoring.tree"]
    assert wrong_ways(source, "vlm_reason.engines", is_package=True) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from transformers import Trainer", 0),
        ("from trl.trainer.utils import _pad", 1),
        ("from peft._internal import thing", 1),
        ("import transformers as tf\ntf.trainer._secret()", 1),
        ("import transformers\ntransformers.__version__", 0),
        ("import torch\ntorch._C._cuda_init()", 0),
        ("import vllm\ndef f(llm):\n    return vllm.LLM._make(llm)", 1),
    ],
)
def test_private_uses_are_found(source: str, count: int) -> None:
    assert len(private_uses(source, "vlm_reason.models.load")) == count
