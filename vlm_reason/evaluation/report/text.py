"""Text that somebody else wrote, made safe to show: nothing invisible, nothing that reorders the line.

A control character, and one that steers the direction of a line, becomes its name in brackets; half a surrogate pair
becomes the replacement character. Newlines and tabs stay. Escaping for HTML or JSON
comes after.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BIDI = {
    0x061C: "ALM", 0x200E: "LRM", 0x200F: "RLM", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO",
    0x202E: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
}  # fmt: skip
_HIDDEN = {0x200B: "ZWSP", 0x2060: "WJ", 0xFEFF: "BOM", 0x2028: "LS", 0x2029: "PS"}
_CONTROLS = {
    0x00: "NUL",
    0x07: "BEL",
    0x08: "BS",
    0x0B: "VT",
    0x0C: "FF",
    0x0D: "CR",
    0x1B: "ESC",
    0x7F: "DEL",
}
_NAMED = {**_BIDI, **_HIDDEN}

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff" + "".join(map(chr, _NAMED)) + "\ufffe\uffff]"
)


def visible(words: str) -> str:
    """`words` with every control character shown. One character may become several: positions change."""
    return _UNSAFE.sub(_shown, words)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code >= 0xD800 and code not in _NAMED:
        return "\ufffd"
    return f"\u27e8{(_NAMED | _CONTROLS).get(code, f'U+{code:04X}')}\u27e9"


def embedded_json(value: Any) -> str:
    """JSON that can stand inside <script type="application/json">: no `<`, `>` or `&` of the text is left, so no tag
    can end the element and no entity can begin, and no invisible character. It reads back to the same value, but for
    half surrogate pairs. The value must be plain already (no NaN)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(_escaped, text).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return "\\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"
