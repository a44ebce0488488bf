"""lm-eval's own command, which then knows our models:

python -m vlm_reason.evaluation.lm_eval run --model vlm-reason --model_args pretrained=... --tasks ...
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from ...errors import UserError
from . import VLMReasonLM  # noqa: F401 (importing it registers the name)

if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"vlm-reason: {error}")
