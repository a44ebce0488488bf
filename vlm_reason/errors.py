"""One exception for everything a user can mend. The command line prints its message as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was wrong, the value, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, else a list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
