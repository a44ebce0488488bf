"""How long prompts, traces and answers are: measured where text exists already, assumed where it is yet to be drawn.

Lengths of traces that are not drawn yet are taken as log-normal, clipped at the cap, with a coefficient of variation
(standard deviation over mean) of SPREAD:

    E[R^2] = mean^2 (1 + s^2)         longest of n = mean-preserving quantile n / (n + 1)

The longest one is what a decode waits for; the second moment is what attention over the cache costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from ..tasks.prompts import PromptBuilder
from ..traces.window import given_traces
from ..types import Problem

SPREAD = 0.6
"""Coefficient of variation of trace lengths: between 0.4 and 0.9 in published length histograms of reasoning traces."""

CAP_SHARE = 1 / 3
"""Mean length over the cap, where nothing is said."""

MEASURED_PROBLEMS = 256


@dataclass(frozen=True)
class TextLength:
    """Length of a text that is drawn: tokens."""

    mean: float
    cap: float
    spread: float = SPREAD

    @property
    def second_moment(self) -> float:
        """E[R^2]; a length in [0, cap] has at most mean * cap."""
        return min(self.mean**2 * (1 + self.spread**2), self.mean * self.cap)

    def longest(self, count: float) -> float:
        """Typical longest of `count` draws."""
        return self._quantile(count / (count + 1)) if count > 1 else self.mean

    def typical(self, count: int) -> list[float]:
        """`count` lengths spread over the law as a sample of it is: quantiles (i - 1/2) / count."""
        return [self._quantile((i + 0.5) / count) for i in range(count)]

    def _quantile(self, p: float) -> float:
        if not self.spread:
            return self.mean
        sigma = math.sqrt(math.log1p(self.spread**2))
        return min(self.cap, self.mean * math.exp(sigma * NormalDist().inv_cdf(p) - sigma**2 / 2))


@dataclass(frozen=True)
class PromptLengths:
    """Mean tokens. prior, hinted: the two prompts; common_*: what all of a kind begin with (worked examples); answer:
    the reference answer with its end; given: traces that come with the data, where there are; source: how it is
    known."""

    prior: float
    hinted: float
    cue: float
    answer: float
    common_prior: float = 0
    common_hinted: float = 0
    given: float | None = None
    source: str = "given"


def measure_prompts(builder: PromptBuilder, problems: Sequence[Problem], dataset: bool) -> PromptLengths:
    """Mean lengths over the first MEASURED_PROBLEMS problems. dataset: their own traces are what is trained on."""
    some = problems[:MEASURED_PROBLEMS]
    prior = [builder.prior_ids(problem) for problem in some]
    hinted = [builder.hinted_ids(problem) for problem in some]
    given = None
    if dataset:
        given = fmean(len(builder.trace_ids(text)) for problem in some for text in given_traces(problem))
    return PromptLengths(
        prior=fmean(map(len, prior)),
        hinted=fmean(map(len, hinted)),
        cue=len(builder.cue_ids),
        answer=fmean(len(builder.answer_ids(problem.answer)) for problem in some),
        common_prior=_common(prior),
        common_hinted=_common(hinted),
        given=given,
        source=f"mean of {len(some)} problems",
    )


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all begin with."""
    first, last = min(prompts), max(prompts)  # the extremes differ first where any two do
    return next((t for t, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
