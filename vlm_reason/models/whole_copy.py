"""Sampling from a sharded model with an engine of this process: an ordinary copy, made for as long as it is needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import AdapterConfig, add_adapters
from .sharding import whole_parameters


def skeleton(model: nn.Module, adapter: AdapterConfig | None) -> nn.Module:
    """A model of the structure of `model`, adapters included, on the meta device: no weights, no memory. To be made
    before `model` is sharded."""
    causal = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    with torch.device("meta"):
        bare = nn.Module.to(type(causal)(copy.deepcopy(causal.config)), causal.dtype)
        return bare if adapter is None else add_adapters(bare, adapter)


class WholeCopy:
    """An ordinary copy of a sharded model, in every process: what can be sampled from token by token.

    Processes sample for different lengths of time, so they cannot run the sharded model, which needs all of them in
    every pass. Between uses the copy is on the meta device and takes no memory; `filled` gathers the weights into it.
    When not to use it: a model that does not fit into one device. There, an engine of its own samples.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        """`skeleton`: a model of the same structure on the meta device."""
        self.model = skeleton.eval().requires_grad_(False)
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in skeleton.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, leaf))
        self._names = {name: self._places[id(p)] for name, p in skeleton.named_parameters()}

    @property
    def bytes(self) -> int:
        """Memory that the copy takes while it is filled."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @contextmanager
    def filled(self, source: nn.Module) -> Iterator[nn.Module]:
        """Inside the block the copy holds the weights of `source`."""
        try:
            for name, tensor in whole_parameters(source):
                self._set(name, tensor.detach().clone())
            self._take_buffers(source)
            yield self.model
        finally:
            for name, places in self._names.items():
                module, leaf = places[0]
                self._set(name, module._parameters[leaf].to("meta"))  # type: ignore[union-attr]

    def _set(self, name: str, tensor: Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, leaf in self._names[name]:
            module._parameters[leaf] = parameter

    def _take_buffers(self, source: nn.Module) -> None:
        modules = dict(self.model.named_modules())
        for name, buffer in source.named_buffers():
            owner, _, leaf = name.rpartition(".")
            modules[owner]._buffers[leaf] = buffer
