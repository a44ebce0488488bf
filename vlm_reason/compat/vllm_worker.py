"""What vLLM's workers learn from us: to replace all weights, those that a CPU keeps a second copy of included.

vLLM adds this class to its worker (`worker_extension_cls`), in this process as on a server that we start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CLASS = "vlm_reason.compat.vllm_worker.PolicyWorker"
METHOD = "reload_policy"


class PolicyWorker:
    reload_weights: Any
    model_runner: Any

    def reload_policy(
        self, weights_iterator: Iterable[tuple[str, Tensor]] | None = None, weights_path: str | None = None
    ) -> None:
        """`reload_weights`, from tensors under their checkpoint names or from a folder of safetensors, and then the
        LM head: on a CPU it multiplies by a packed copy of its weight, and the reload packs anew only modules that own
        the tensor it read, which a head tied to the embeddings does not. It would go on with the old weights."""
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        self.reload_weights(weights_iterator=weights_iterator, weights_path=weights_path)
        for module in self.model_runner.get_model().modules():
            method = getattr(module, "quant_method", None)
            if hasattr(module, "cpu_linear") and isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)
