"""The code in docs/exact.md and in the docstring of the world runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_reason.exact import world

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_and_the_docstring_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "exact.md").read_text(), re.S)
    assert len(blocks) == 1 and "assert update.distance(closed)" in blocks[0]
    names: dict[str, object] = {}
    exec(blocks[0], names)
    five = [line[4:] for line in (world.__doc__ or "").splitlines() if line.startswith("    ")][1:]
    assert len(five) == 5
    names.pop("update")
    exec("\n".join(five), names)
    assert "update" in names
