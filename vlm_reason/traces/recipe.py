"""Recipe and Phase: everything that makes one method differ from another, as data.

A method is a proposal (who draws the traces), an evidence (how good a trace is), and one pure function
`weigh` that turns the measured `Scores` of whole groups into detached `Coefficients`. The trainer does the
rest. Minimised:

    loss = - (1/G) sum_g [ sum_k c_z log pi(z|x) + sum_k c_q log q(z|x,y') + sum_km c_y log pi(y_m|x,z) ]

See presets/ for one file a method, and docs/traces.md for the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError
from ..types import Coefficients, Scores

State = dict[str, Any]
"""What a preset remembers between steps (moving statistics): JSON-able values and tensors only, checkpointed."""

Weigh = Callable[[Scores, State], tuple[Coefficients, State]]

Adapter = Literal["reasoner", "posterior", "base"]
Prompt = Literal["prior", "hinted"]


@dataclass(frozen=True)
class Component:
    """One law a trace can be drawn from: which weights, behind which prompt, at what share of the K traces.

    prior:     Component("reasoner", "prior")       the model as it will be used
    hinted:    Component("reasoner", "hinted")      the same weights, told the answer
    posterior: Component("posterior", "hinted")     the separate posterior adapter
    frozen:    Component("base", "prior")           the reference
    """

    adapter: Adapter = "reasoner"
    prompt: Prompt = "prior"
    share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.adapter}/{self.prompt}"


@dataclass(frozen=True)
class Proposal:
    """r, the law of the traces. Several components make a mixture: the K traces are dealt to them by `share`
    (deterministically, largest remainder; n_c of K), and every trace is scored under the mixture density

        log r(z) = logsumexp_c [ log(n_c / K) + log r_c(z) ]       (the balance heuristic, Veach & Guibas 1995)

    `dataset`: traces come with the problems (`Problem.metadata["rationale"]` or `["traces"]`), r = 1;
    `empty`: the one trace is the empty one. `chain`: the problem's stored chain joins the K. `greedy`:
    temperature 0 (STaR).
    """

    components: tuple[Component, ...] = (Component(),)
    dataset: bool = False
    empty: bool = False
    chain: bool = False
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (self.dataset or self.empty) and not self.components:
            raise UserError("a proposal needs at least one component (or dataset=True)")
        if any(c.share <= 0 for c in self.components):
            raise UserError(f"component shares must be > 0, got {[c.share for c in self.components]}")


def deal(components: Sequence[Component], traces: int) -> list[Component]:
    """K traces dealt to the components by share (largest remainder), in the components' order. UserError as
    `dealt_counts`."""
    counts = dealt_counts(components, traces)
    return [c for c, count in zip(components, counts, strict=True) for _ in range(count)]


def dealt_counts(components: Sequence[Component], traces: int) -> list[int]:
    """n_c of each component, sum_c n_c = K.

    Raises UserError when a component would get none: its density would enter the mixture without ever being drawn.
    """
    total = sum(c.share for c in components)
    exact = [c.share / total * traces for c in components]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(components)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: traces - sum(counts)]:
        counts[i] += 1
    for component, count in zip(components, counts, strict=True):
        if count == 0:
            raise UserError(
                f"K = {traces} traces leave none for the proposal component {component.name!r} (share "
                f"{component.share / total:.3g}): raise traces_per_prompt or its share"
            )
    return counts


PRIOR = Proposal((Component("reasoner", "prior"),))
HINTED = Proposal((Component("reasoner", "hinted"),))
POSTERIOR = Proposal((Component("posterior", "hinted"),))
FROZEN = Proposal((Component("base", "prior"),))
DATASET = Proposal((), dataset=True)
EMPTY = Proposal((), empty=True)


EvidenceKind = Literal[
    "accuracy", "logp", "mean_logp", "mean_p", "minus_no_trace", "perplexity_rank", "verifier", "one"
]


@dataclass(frozen=True)
class Evidence:
    """e(z), an estimate of pi(y*|x,z) or a reward. `samples` = M answers drawn behind each trace.

    accuracy        (1/M) sum_m 1[y_m correct]              (needs answers sampled by pi)
    logp            pi(y*|x,z) = prod_t pi(y*_t|.)
    mean_logp       exp(mean_t log pi(y*_t|.))
    mean_p          mean_t pi(y*_t|.)                       (RLPR)
    minus_no_trace  max(0, mean_p with z minus mean_p without z)
    perplexity_rank rank of -mean_logp in the group, best 1, worst 1/K  (NOVER)
    verifier        a callable score in [0, 1] of the one sampled answer, averaged over M
    one             1 for every complete trace              (teacher traces)

    An incomplete trace has e = 0 whatever the kind.
    """

    kind: EvidenceKind = "accuracy"
    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"evidence.samples must be >= 1, got {self.samples}")

    @property
    def samples_answers(self) -> bool:
        return self.kind in ("accuracy", "verifier")


NullGroup = Literal["skip", "renormalise", "dataset", "hint_retry"]
"""What to do with a group without signal. skip: it counts in the 1/G and adds nothing. renormalise: it leaves
the 1/G. dataset: its problem's own rationale is trained on instead. hint_retry: its traces are drawn again
behind the hint."""


@dataclass(frozen=True)
class Phase:
    """One kind of step: what it trains, on whose traces, weighed how.

    trains   which adapters receive gradient.
    posterior  the adapter that c_q trains: `posterior`, or `reasoner` when one set of weights serves both prompts.
    targets  what c_y multiplies: `gold` the reference answer (M = 1), `sampled` the M sampled answers, `none`.
    needs    which scoring passes `weigh` reads: "logp_prior", "logq", "logp_answer", "logp_ref", "worst_token".
    windows  windows of problems this phase samples and trains on per round.
    kl       weight of KL(pi || pi_ref) on the trained tokens (estimator k3 of Schulman 2020), 0 = off.
    off_policy  whether the coefficients are right for traces of any density logq: normalised importance weights are,
             score-function gradients of the sampler's own law are not.
    clip     half-width of the PPO ratio clip when a window is reused over several steps, None = off.
    """

    name: str
    weigh: Weigh
    trains: tuple[Literal["reasoner", "posterior"], ...] = ("reasoner",)
    posterior: Literal["reasoner", "posterior"] = "posterior"
    proposal: Proposal = PRIOR
    evidence: Evidence = field(default_factory=Evidence)
    targets: Literal["gold", "sampled", "none"] = "sampled"
    needs: frozenset[str] = frozenset()
    null_group: NullGroup = "skip"
    windows: int = 1
    kl: float = 0.0
    clip: float | None = None
    off_policy: bool = False

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UserError(f"phase {self.name!r}: windows must be >= 1, got {self.windows}")
        if not 0 <= self.kl < math.inf:
            raise UserError(f"phase {self.name!r}: kl must be >= 0, got {self.kl}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise UserError(f"phase {self.name!r}: clip must be > 0 (or null for none), got {self.clip}")
        if self.null_group == "hint_retry":
            if any(c.prompt == "hinted" for c in self.proposal.components):
                raise UserError(
                    f"phase {self.name!r}: null_group hint_retry draws again behind the hint, and the first draws "
                    "saw it already: choose skip"
                )
            if "logq" in self.needs:
                raise UserError(
                    f"phase {self.name!r}: null_group hint_retry draws some groups from another law than the proposal, "
                    "so logq would be wrong: choose skip"
                )


@dataclass(frozen=True)
class Recipe:
    """A schedule of phases. One round runs every phase once, in order; `TraceConfig.rounds` says how many rounds.

    traces  K, the default number of traces a problem (the config may override it).
    least_traces  the smallest K with which the method learns: 2 where a trace is compared with the others of its group.
    reset   "base": every round starts again from the initial adapter (STaR).
    source  the paper, for the table in the docs.
    optimises  in one line, what the fixed point is.
    """

    name: str
    phases: tuple[Phase, ...]
    traces: int = 4
    least_traces: int = 1
    reset: Literal["none", "base"] = "none"
    source: str = ""
    optimises: str = ""

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError(f"recipe {self.name!r} has no phases")
        if self.traces < 1:
            raise UserError(f"recipe {self.name!r}: traces (K) must be >= 1, got {self.traces}")
