"""lm-eval's tasks on our models: plain, mixtures over adapters, mixtures over rationales. Needs the extra `eval`.

Importing this package imports lm-eval and registers the model name `vlm-reason` with it.
"""

from ...errors import UserError

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise UserError("lm-eval is not installed; run: bash scripts/setup.sh eval") from error

from .model import VLMReasonLM, adapter_folders
from .rationales import RationaleConfig
from .responses import Responses

__all__ = ["RationaleConfig", "Responses", "VLMReasonLM", "adapter_folders"]
