"""Where an enumerable world gets its next-token distributions: free tables of logits, or a causal language model.

Each law returns log-probabilities with their gradient:

    prior()       [P, V+1]   log pi(next | x, prefix)        P >= number of open prefixes, column V is the end symbol
    posterior(y)  [P, V+1]   log q(next | x, y, prefix)
    answers()     [N, A]     log pi(y | x, z)                one row a complete trace
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from .strings import Strings


class Laws(Protocol):
    @property
    def strings(self) -> Strings: ...

    @property
    def n_answers(self) -> int: ...

    def prior(self) -> Tensor: ...

    def posterior(self, answer: int) -> Tensor: ...

    def answers(self) -> Tensor: ...

    def parameters(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class TableLaws:
    """Free logits, in fp64. prior [P, V+1], posterior [A, P, V+1] and answer [N, A], with P the open prefixes."""

    strings: Strings
    prior_logits: Tensor
    posterior_logits: Tensor
    answer_logits: Tensor

    def __post_init__(self) -> None:
        open_, width = self.strings.open_prefixes, self.strings.vocab + 1
        answers = self.n_answers
        for name, tensor, shape in (
            ("prior_logits", self.prior_logits, (open_, width)),
            ("posterior_logits", self.posterior_logits, (answers, open_, width)),
            ("answer_logits", self.answer_logits, (self.strings.count, answers)),
        ):
            if tuple(tensor.shape) != shape:
                raise UserError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")

    @property
    def n_answers(self) -> int:
        return self.answer_logits.shape[-1]

    def prior(self) -> Tensor:
        return self.prior_logits.log_softmax(-1)

    def posterior(self, answer: int) -> Tensor:
        return self.posterior_logits[answer].log_softmax(-1)

    def answers(self) -> Tensor:
        return self.answer_logits.log_softmax(-1)

    def parameters(self) -> Mapping[str, Tensor]:
        return {"prior": self.prior_logits, "posterior": self.posterior_logits, "answer": self.answer_logits}


@dataclass(frozen=True)
class ModelLaws:
    """A causal language model (Hugging Face interface) over the world's tokens, one network for pi and q.

    Token ids: symbols 0..V-1, end V, answer a V+1+a, question V+1+A; the model's vocabulary needs V+2+A entries. The
    logits are restricted to the tokens that may come next and normalised over them. The contexts are

        prior       question, prefix                   posterior   answer y, question, prefix
        answers     question, trace, end
    """

    strings: Strings
    n_answers: int
    model: nn.Module

    def __post_init__(self) -> None:
        needed = self.question + 1
        have = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        if have < needed:
            raise UserError(f"the model has {have} tokens, this world needs {needed} (see ModelLaws)")
        if self.model.training:
            raise UserError(
                "the model is in training mode: dropout has no exact law; call model.eval() first"
            )

    @property
    def question(self) -> int:
        return self.strings.vocab + 1 + self.n_answers

    def prior(self) -> Tensor:
        return self._next((self.question,))

    def posterior(self, answer: int) -> Tensor:
        return self._next((self.strings.vocab + 1 + answer, self.question))

    def answers(self) -> Tensor:
        logits = self._logits((self.question,), self.strings.length)
        first = self.strings.vocab + 1
        return logits[:, first : first + self.n_answers].log_softmax(-1)

    def parameters(self) -> Mapping[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _next(self, prompt: tuple[int, ...]) -> Tensor:
        return self._logits(prompt, self.strings.length - 1)[:, : self.strings.vocab + 1].log_softmax(-1)

    def _logits(self, prompt: tuple[int, ...], offset: Tensor) -> Tensor:
        """Logits [N, vocabulary] behind prompt + the first `offset` tokens of each string. Padding sits on the right,
        where causal attention does not see it."""
        tokens = self.strings.tokens.clamp(min=0)
        start = torch.tensor(prompt).expand(len(tokens), -1)
        logits = self.model(input_ids=torch.cat([start, tokens], 1), use_cache=False).logits
        rows = torch.arange(len(tokens))
        picked = logits[rows, len(prompt) - 1 + offset]
        return picked if picked.dtype == torch.float64 else picked.float()
