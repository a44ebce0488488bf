"""The table of two systems side by side, from the JSON that `eval` gives (the quickstart prints it too)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .output import estimate, number, table

if TYPE_CHECKING:
    from rich.table import Table


def systems_table(title: str, systems: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column a system, in order. A system is `EvalResult.to_json()`, with `bound`
    (`BoundResult.to_json()`) where it was measured; a row that nobody has is left out."""
    rows = [
        ("accuracy", *(estimate(s.get("accuracy")) for s in systems.values())),
        *(
            (f"pass@{k}", *(estimate((s.get("pass_at") or {}).get(k)) for s in systems.values()))
            for k in sorted({k for s in systems.values() for k in s.get("pass_at") or {}}, key=int)
        ),
        ("unparsed", *(estimate(s.get("unparsed")) for s in systems.values())),
        ("truncated traces", *(estimate(s.get("truncated")) for s in systems.values())),
        ("trace length (tokens)", *(estimate(s.get("trace_length"), ".1f") for s in systems.values())),
        *_bound_rows([s.get("bound") or {} for s in systems.values()]),
        ("tokens per second", *(number(s.get("tokens_per_second"), ".0f") for s in systems.values())),
    ]
    return table(title, ("", *systems), [row for row in rows if any(cell != "-" for cell in row[1:])])


def _bound_rows(bounds: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    k = next((str(b["traces"]) for b in bounds if b), "K")
    return [
        (f"bound: IWAE-{k} of log p(y*|x)", *(estimate(b.get("iwae"), ".2f") for b in bounds)),
        ("p(y*|x)", *(estimate(b.get("probability")) for b in bounds)),
        ("log p(y*|x,z), mean over z", *(estimate(b.get("logp_traced"), ".2f") for b in bounds)),
        ("log p(y*|x, empty z)", *(estimate(b.get("logp_empty"), ".2f") for b in bounds)),
    ]


def difference_table(title: str, differences: Mapping[str, Mapping[str, Any]]) -> Table:
    """Paired differences: name -> `PairedEstimate.to_json()`. The interval is the answer; p is for the
    record."""
    rows = []
    for name, data in differences.items():
        low, high = data["ci"]
        known = low is not None and high is not None
        verdict = "-" if not known else "yes" if low > 0 or high < 0 else "no"
        p = data.get("p")
        rows.append((name, estimate(data), number(p, ".2g"), str(data["n"]), verdict))
    return table(title, ("difference", "value", "p", "problems", "interval excludes 0"), rows)
