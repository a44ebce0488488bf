"""The frozen records that pass between modules. Nothing here imports anything of ours.

Notation: x question, z reasoning trace, y answer, y* reference answer, G groups (one problem each), K traces a group,
M answers a trace. pi is the reasoning model, q the posterior (it sees a hint), r whatever law really drew a trace.
Token ids are the truth: text is kept for people, never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

Finish = Literal["stop", "eos", "length"]
"""Why sampling ended. stop: the segment closed itself (its end marker was written). eos: the model ended the whole
text inside the segment. length: the token cap cut it. Only `stop` is a complete segment."""


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is the reference answer as text; `metadata` holds what only some tasks have
    (`rationale`, `choices`, `label`, the reasoning-gym entry)."""

    id: str
    question: str
    answer: str
    images: tuple[Any, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class StopRule:
    """When a segment ends: at the first token after which the decoded text holds one of `strings` (finish `stop`; the
    token that completed it belongs to the segment), or at an id of `eos` (finish `eos`), or at the cap (`length`)."""

    strings: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    eos_is_stop: bool = False
    """True for the last segment (the answer): there, the end of text closes the segment and finish is `stop`."""


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request. `logps[t]` is the log-probability of `ids[t]` under the law that
    sampled it (temperature and top-p applied), in nats; the end marker's tokens are part of `ids`."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    finish: Finish
    seed: int

    @property
    def complete(self) -> bool:
        return self.finish == "stop"


@dataclass(frozen=True)
class Trace:
    """The k-th trace of a group, drawn by `proposal` behind `prompt_ids`, with the answers sampled behind it.

    saw_answer: the proposal's prompt revealed the answer (such a trace may not be ranked as if it were a prediction).
    policy_version: number of optimiser steps the sampling weights had taken.
    """

    problem_id: str
    k: int
    proposal: str
    prompt_ids: tuple[int, ...]
    completion: Completion
    policy_version: int = 0
    saw_answer: bool = False
    answers: tuple[Completion, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return self.completion.ids

    @property
    def complete(self) -> bool:
        return self.completion.complete


@dataclass(frozen=True)
class TraceGroup:
    """All K traces of one problem. Groups are never split: every normaliser needs the whole group."""

    problem: Problem
    traces: tuple[Trace, ...]


@dataclass(frozen=True)
class Scores:
    """What the trainer measured of a batch of groups. fp32, detached, nats.

    logp_prior    [G, K]     log pi(z | x)
    logq          [G, K]     log r(z), the density that really drew z (the mixture density for a mixture)
    log_evidence  [G, K]     log e(z), e >= 0: estimate of pi(y* | x, z), or log of a reward
    logp_answer   [G, K, M]  log pi(y_m | x, z) of the answer targets (reference answer: M = 1; or the sampled ones)
    answer_weight [G, K, M]  1 where answer target m is right (all ones for the reference answer)
    length        [G, K]     tokens in z
    mask          [G, K]     False = never drawn (short group). A drawn trace of weight 0 has log_evidence -inf.
    logp_ref      [G, K]     log pi_ref(z | x), when a preset needs it
    chain         [G, K]     True where the trace is the stored chain of its problem (TRICE), else absent
    problem       [G]        integer key of the problem, for per-problem state; absent when no preset needs it
    logp_empty    [G]        log pi(y* | x, empty trace), for evidence measured against no trace
    worst_token   [G, K]     min over the tokens of z and y* of log pi(token | x, before), when a preset needs it
    """

    logp_prior: Tensor
    logq: Tensor
    log_evidence: Tensor
    logp_answer: Tensor
    answer_weight: Tensor
    length: Tensor
    mask: Tensor
    logp_ref: Tensor | None = None
    chain: Tensor | None = None
    problem: Tensor | None = None
    logp_empty: Tensor | None = None
    worst_token: Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """Detached weights of the log-probabilities in the loss. Absent means zero.

        loss = - (1/G) sum_g [ sum_k c_z log pi(z|x) + sum_k c_q log q(z|x,y') + sum_km c_y log pi(y_m|x,z) ]

    c_z [G, K] or [G, K, T] per token; c_q the same; c_y [G, K, M]. `keep` [G]: index of the trace that becomes the
    problem's stored chain, -1 for none. `null` [G]: True where the group carries no learning signal.
    """

    c_z: Tensor | None = None
    c_q: Tensor | None = None
    c_y: Tensor | None = None
    keep: Tensor | None = None
    null: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A number that carries its uncertainty. ci is the 95% interval; n items went in, n_dropped did not;
    `flags` name what a reader must know (`empty`, `clipped`, `degenerate`)."""

    value: float
    se: float
    ci: tuple[float, float]
    n: int
    n_dropped: int = 0
    method: str = ""
    flags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "se": self.se,
            "ci": list(self.ci),
            "n": self.n,
            "n_dropped": self.n_dropped,
            "method": self.method,
            "flags": list(self.flags),
        }
