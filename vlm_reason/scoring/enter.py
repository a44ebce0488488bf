"""The one door through which scoring reaches a model.

    entered(model, body) = body(causal language model inside `model`)

Scoring runs the decoder and the LM head itself, since a model's own forward would make logits at every position.
Whatever shards or replicates a model does its work in hooks on the wrapper's forward, so those two may only be called
while that forward runs: every scoring pass is a `body` handed to `entered`, and nothing else unwraps a model to run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

Result = TypeVar("Result")
_DOOR = "_entered_through"


def entered(model: nn.Module, body: Callable[[PreTrainedModel], Result]) -> Result:
    """`body` applied to the causal language model inside `model`, whose adapter layers stay in effect.

    `body` returns a tensor or a tuple of tensors, so that a wrapper can hang its backward hooks on them; what it runs
    of the model must be part of one forward pass.
    """
    door = vars(model).get(_DOOR)
    return body(unwrap(model)) if door is None else door(body)


def enter_through(model: nn.Module, wrapper: nn.Module) -> None:
    """From now on `entered(model, ...)` calls `wrapper`, whose forward ends in the forward of `model` (`wrapper` may be
    `model` itself, when hooks on it do the work): parameters are gathered and gradients reduced by what hangs there.

    The forward of `model` takes one more keyword, `body`; without it, it is what it was.
    """
    original = model.forward

    def forward(*args: Any, body: Callable[[PreTrainedModel], Any] | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if body is None else body(unwrap(model))

    model.forward = forward
    vars(model)[_DOOR] = lambda body: wrapper(body=body)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside PEFT's wrapper: for its config and its weights on disk, not to run it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
