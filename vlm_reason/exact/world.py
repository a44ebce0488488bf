"""A world small enough to know everything about it: every trace, log p(y|x), the posterior and every gradient.

    pi(z, y | x) = pi(z | x) pi(y | x, z),      P(y) = sum_z pi(z, y | x),      P(z | y) = pi(z, y | x) / P(y)

A method is right when its expected update, summed over all groups it could draw, is the gradient of what it says it
optimises. Five lines check a new one (docs/exact.md):

    world = EnumerableWorld.random(vocab=2, max_tokens=2, answers=2, seed=0)
    update = world.expected_update(weigh, world.logp_prior(), 0, traces=3, evidence="accuracy", targets="sampled")
    P = world.log_marginal(0).exp()
    closed = world.gradient((1 - (1 - P.detach()) ** 3) * P.log())
    assert update.distance(closed) < 1e-9
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..types import Problem
from .expectation import make_atoms, possible_groups
from .laws import Laws, ModelLaws, TableLaws
from .strings import Strings
from .update import Answer, expected_update


class EnumerableWorld:
    """One question x, all traces z up to T tokens, A answers y, a reasoner pi and a posterior q(z|y).

    Log-probabilities come with autograd back to `parameters()`. Token ids: symbols 0..V-1, end V, answer a V+1+a,
    question V+1+A; the prior prompt is (question,), the hinted one (answer, question).
    """

    def __init__(self, laws: Laws) -> None:
        self.laws = laws
        self.strings = laws.strings
        self.n_answers = laws.n_answers

    @classmethod
    def random(
        cls, vocab: int = 2, max_tokens: int = 2, answers: int = 2, seed: int = 0, scale: float = 1.0
    ) -> EnumerableWorld:
        """Tables of normal logits with standard deviation `scale`, fp64, requiring gradients."""
        strings = Strings(vocab, max_tokens)
        generator = torch.Generator().manual_seed(seed)

        def logits(*shape: int) -> Tensor:
            draw = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
            return draw.requires_grad_()

        return cls.from_tables(
            strings,
            prior_logits=logits(strings.open_prefixes, vocab + 1),
            posterior_logits=logits(answers, strings.open_prefixes, vocab + 1),
            answer_logits=logits(strings.count, answers),
        )

    @classmethod
    def from_tables(
        cls, strings: Strings, prior_logits: Tensor, posterior_logits: Tensor, answer_logits: Tensor
    ) -> EnumerableWorld:
        """Your own logits: prior [P, V+1], posterior [A, P, V+1], answer [N, A], P = strings.open_prefixes."""
        return cls(TableLaws(strings, prior_logits, posterior_logits, answer_logits))

    @classmethod
    def from_model(cls, model: nn.Module, vocab: int, max_tokens: int, answers: int) -> EnumerableWorld:
        """A causal LM as pi and, behind the hinted prompt, as q. Its vocabulary needs V+2+A tokens; see ModelLaws."""
        return cls(ModelLaws(Strings(vocab, max_tokens), answers, model))

    # Tokens and prompts

    @property
    def question_id(self) -> int:
        return self.strings.vocab + 1 + self.n_answers

    def answer_id(self, answer: int) -> int:
        """Token id of an answer."""
        if not 0 <= answer < self.n_answers:
            raise UserError(f"answer must be 0..{self.n_answers - 1}, got {answer}")
        return self.strings.vocab + 1 + answer

    @property
    def prior_prompt(self) -> tuple[int, ...]:
        return (self.question_id,)

    def hinted_prompt(self, answer: int) -> tuple[int, ...]:
        return (self.answer_id(answer), self.question_id)

    @cached_property
    def _alphabet(self) -> str:
        small, big = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        if self.strings.vocab > 26 or self.n_answers > 26:
            raise UserError("text is defined for at most 26 symbols and 26 answers")
        return small[: self.strings.vocab] + "." + big[: self.n_answers] + "?"

    def decode(self, ids: Collection[int]) -> str:
        """One character a token: a, b, .. for symbols, `.` the end, A, B, .. the answers, `?` the question."""
        return "".join(self._alphabet[i] for i in ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Inverse of `decode`."""
        unknown = sorted(set(text) - set(self._alphabet))
        if unknown:
            raise UserError(
                f"{text!r} holds {unknown}, which this world has no token for; it has {self._alphabet!r}"
            )
        return tuple(self._alphabet.index(c) for c in text)

    def problem(self, answer: int, id: str = "exact") -> Problem:
        """The question as a `Problem` with this reference answer."""
        return Problem(id=id, question="?", answer=self.decode((self.answer_id(answer),)))

    # Log-probabilities, with autograd

    def parameters(self) -> Mapping[str, Tensor]:
        return self.laws.parameters()

    def logp_prior(self) -> Tensor:
        """log pi(z|x), [N]."""
        return self.token_logps_prior().sum(1)

    def token_logps_prior(self) -> Tensor:
        """The same token by token, [N, T+1]; 0 behind the end and for a forced end."""
        return self.strings.token_logps(self.laws.prior())

    def logq(self, answer: int) -> Tensor:
        """log q(z|x,y), [N]."""
        return self.token_logps_posterior(answer).sum(1)

    def token_logps_posterior(self, answer: int) -> Tensor:
        self.answer_id(answer)
        return self.strings.token_logps(self.laws.posterior(answer))

    def logp_answers(self) -> Tensor:
        """log pi(y|x,z), [N, A]."""
        return self.laws.answers()

    def log_evidence(self, answer: Answer) -> Tensor:
        """log pi(Y|x,z), [N], for the right answer or the set of right answers."""
        return torch.logsumexp(self.logp_answers()[:, list(self.right(answer))], 1)

    def log_joint(self, answer: Answer) -> Tensor:
        """log pi(z, Y | x), [N]."""
        return self.logp_prior() + self.log_evidence(answer)

    def log_marginal(self, answer: Answer) -> Tensor:
        """log P(Y|x) = log sum_z pi(z, Y | x), a scalar."""
        return torch.logsumexp(self.log_joint(answer), 0)

    def posterior(self, answer: Answer) -> Tensor:
        """P(z | x, Y), [N], summing to 1."""
        return self.log_joint(answer).softmax(0)

    def right(self, answer: Answer) -> tuple[int, ...]:
        """The set of right answers as a sorted tuple, checked."""
        answers = (answer,) if isinstance(answer, int) else tuple(sorted(set(answer)))
        if not answers:
            raise UserError("no answer given: name at least one right answer")
        for a in answers:
            self.answer_id(a)
        return answers

    # Bounds, as exact sums with autograd through the sampling law as well

    def expected_bound(
        self,
        bound: Callable[[Tensor], Tensor],
        answer: Answer,
        traces: int,
        proposal: Tensor | None = None,
    ) -> Tensor:
        """E over all K-tuples z_k ~ r of bound(logw [groups, K]) -> [groups]; a scalar.

        `proposal` is log r, [N], q(.|y) by default. The gradient of the result is the true gradient of the expected
        bound: it runs through log w and through the probability of each tuple. Detach the proposal for the part
        through log w alone.
        """
        logr = self.logq(self.right(answer)[0]) if proposal is None else proposal
        self._check_proposal(logr)
        atoms = make_atoms(logr.expand(traces, -1), self.logp_answers(), samples=0)
        groups, log_probability = possible_groups(atoms, traces)
        logw = (self.log_joint(answer) - logr)[atoms.trace[groups]]
        return (log_probability.exp() * bound(logw)).sum()

    def iwae_bound(self, answer: Answer, traces: int, proposal: Tensor | None = None) -> Tensor:
        """L_K = E log (1/K) sum_k w_k, a scalar. K = 1 is the ELBO."""
        return self.expected_bound(
            lambda logw: torch.logsumexp(logw, 1) - math.log(traces),
            answer,
            traces,
            proposal,
        )

    def cubo(self, answer: Answer, order: float = 2, proposal: Tensor | None = None) -> Tensor:
        """(1/n) log E_r[w^n] as an exact sum: an upper bound on log P."""
        logr = self.logq(self.right(answer)[0]) if proposal is None else proposal
        self._check_proposal(logr)
        return torch.logsumexp(order * self.log_joint(answer) + (1 - order) * logr, 0) / order

    def eubo(self, answer: Answer, proposal: Tensor | None = None) -> Tensor:
        """E_posterior log w = log P + KL(posterior || r), an upper bound on log P."""
        logr = self.logq(self.right(answer)[0]) if proposal is None else proposal
        self._check_proposal(logr)
        return (self.posterior(answer) * (self.log_joint(answer) - logr)).sum()

    # Gradients

    def gradient(self, functional: Tensor) -> dict[str, Tensor]:
        """Gradient of a scalar in every parameter, zeros where it does not depend on one."""
        parameters = self.parameters()
        grads = torch.autograd.grad(
            functional, list(parameters.values()), allow_unused=True, retain_graph=True
        )
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), grads, strict=True)
        }

    expected_update = expected_update

    def _check_proposal(self, logr: Tensor) -> None:
        if logr.shape != (self.strings.count,):
            raise UserError(
                f"a proposal is log r(z) of every string, shape [{self.strings.count}], got {list(logr.shape)}"
            )
