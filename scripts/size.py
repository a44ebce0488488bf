"""How big the package is, and what has outgrown one idea.

    python scripts/size.py            a table by folder, then the files and functions past their limits
    python scripts/size.py --check    the same, and exit status 1 when a hard limit is broken

Code lines are lines that hold a token of code: no blanks, comments or docstrings. Limits count all lines of a file
(400 asks for a look, 600 is the end) and all lines of a function (60 asks for a look).
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FILE_LOOK, FILE_HARD, FUNCTION_LOOK = 400, 600, 60
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of every string that stands alone as a statement (docstrings, also those under a field)."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def long_functions(source: str) -> list[tuple[str, int]]:
    """(name, lines) of the functions past the limit, their docstrings not counted."""
    tree = ast.parse(source)
    documented = docstring_lines(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) - documented
            if len(body) > FUNCTION_LOOK:
                found.append((node.name, len(body)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a file is past the hard limit")
    check = parser.parse_args().check

    table: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    look: list[str] = []
    broken: list[str] = []
    for top in ("vlm_reason", "scripts", "tests"):
        for path in sorted((REPO / top).rglob("*.py")):
            name = path.relative_to(REPO)
            source = path.read_text()
            total = len(source.splitlines())
            folder = "/".join(name.parts[:2]) if len(name.parts) > 2 else f"{top}/*.py"
            for column, value in enumerate((1, total, code_lines(source))):
                table[folder][column] += value
            if total > FILE_HARD:
                broken.append(f"{name}: {total} lines, more than {FILE_HARD}: find the second idea in it")
            elif total > FILE_LOOK:
                look.append(f"{name}: {total} lines")
            look += [f"{name}: {function}() has {n} lines" for function, n in long_functions(source)]

    print(f"{'folder':<28}{'files':>7}{'lines':>8}{'code':>8}")
    for folder, (files, total, code) in sorted(table.items()):
        print(f"{folder:<28}{files:>7}{total:>8}{code:>8}")
    columns = [sum(row[i] for row in table.values()) for i in range(3)]
    print(f"{'all':<28}{columns[0]:>7}{columns[1]:>8}{columns[2]:>8}")
    for title, lines in (("worth a look", look), ("too big", broken)):
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")
    return 1 if check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
