"""DeepSpeed's logger writes to standard output, which belongs to a command's result (`--json`): what it says goes to
standard error. transformers and accelerate import DeepSpeed wherever it is installed, so this concerns every command.

Imports nothing but the standard library: it runs before torch is loaded.
"""

from __future__ import annotations

import logging
import sys

NAME = "DeepSpeed"
_KNOWN = "Setting accelerator to CPU"
"""Said on every machine without a GPU, which the user knows."""


class _ToStandardError(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _KNOWN not in message:
            print(f"deepspeed: {message}", file=sys.stderr)
        return False


def keep_stdout_clean() -> None:
    """From now on DeepSpeed's messages go to standard error. A second call changes nothing."""
    logger = logging.getLogger(NAME)
    if not any(isinstance(own, _ToStandardError) for own in logger.filters):
        logger.addFilter(_ToStandardError())
