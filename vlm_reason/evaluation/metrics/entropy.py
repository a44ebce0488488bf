"""Uncertainty of one model's own samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...stats import OnInvalid
from ...types import Estimate


def predictive_entropies(
    logps: Sequence[ArrayLike], lengths: Sequence[ArrayLike] | None = None
) -> NDArray[np.float64]:
    """Per item: -(1/S) sum_s log p(s | x); each divided by its length where lengths are given."""
    raise NotImplementedError


def predictive_entropy(
    logps: Sequence[ArrayLike],
    lengths: Sequence[ArrayLike] | None = None,
    *,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Mean over items of `predictive_entropies`."""
    raise NotImplementedError


def semantic_entropies(
    labels: Sequence[Sequence[Hashable]],
    logps: Sequence[ArrayLike] | None = None,
    strings: Sequence[Sequence[Hashable]] | None = None,
) -> NDArray[np.float64]:
    """Per item: entropy over clusters. labels[i]: the cluster (canonical answer) of every sample of item i,
    None where unread (agrees with nothing). With `logps`, the Rao form over distinct `strings`."""
    raise NotImplementedError


def semantic_entropy(
    labels: Sequence[Any],
    logps: Sequence[ArrayLike] | None = None,
    strings: Sequence[Sequence[Hashable]] | None = None,
    *,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Mean over items of `semantic_entropies`. A flat sequence is one item."""
    raise NotImplementedError


def entailment_clusters(entails: ArrayLike) -> NDArray[np.int64]:
    """Clusters of S strings, entails [S, S] bool: joined where both entail each other (union-find)."""
    raise NotImplementedError


def p_true(logp_true: ArrayLike, logp_false: ArrayLike) -> NDArray[np.float64]:
    """P(True) of every item: [n, orders, surface forms] log-probabilities of saying true and of saying
    false."""
    raise NotImplementedError
