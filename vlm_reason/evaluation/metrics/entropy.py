"""Uncertainty of one model's own samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp, xlogy

from ...errors import UserError
from ...stats import OnInvalid, group_sums, mean_interval
from ...types import Estimate
from .answers import UNREAD, Answers, sampled
from .inputs import Array, Ragged, as_items, ragged, same_sizes


def predictive_entropies(logps: Sequence[ArrayLike], lengths: Sequence[ArrayLike] | None = None) -> Array:
    """Per item [n], in nats: -(1/S) sum_s log p(s | x), the Monte-Carlo entropy of its samples (Malinin & Gales 2021,
    arXiv 2002.07650). logps[i]: the log-probabilities, <= 0, of the S samples of item i under the law that drew
    them. With `lengths` (tokens) each is divided by its length first, which no longer is an entropy but does not grow
    with the text. NaN for an item without samples."""
    flat, divisor = _logps(logps), None
    if lengths is not None:
        divisor = ragged("lengths", lengths)
        same_sizes("logps", flat.size, "lengths", divisor.size)
        if not (np.isfinite(divisor.flat) & (divisor.flat > 0)).all():
            raise UserError(f"lengths must be > 0 tokens, got {divisor.flat.min()}")
    values = flat.flat if divisor is None else flat.flat / divisor.flat
    with np.errstate(invalid="ignore"):
        return -group_sums(flat.item, values, len(flat.size)) / flat.size


def predictive_entropy(
    logps: Sequence[Any], lengths: Sequence[Any] | None = None, *, on_invalid: OnInvalid = "raise"
) -> Estimate:
    """Mean over items of `predictive_entropies`; t interval over items. A flat sequence is one item. Two texts that
    mean the same count as two: for answers take `semantic_entropy`."""
    values = predictive_entropies(as_items(logps), None if lengths is None else as_items(lengths))
    name = (
        "predictive entropy, nats"
        if lengths is None
        else "length-normalised predictive entropy, nats a token"
    )
    return replace(mean_interval(values, on_invalid), method=f"{name}; t")


def semantic_entropies(
    labels: Answers,
    logps: Sequence[ArrayLike] | None = None,
    strings: Sequence[Sequence[Hashable]] | None = None,
) -> Array:
    """Per item [n], in nats: entropy over clusters of samples that mean the same (Kuhn et al. 2023, arXiv 2302.09664).
    labels[i]: the cluster of every sample of item i: its canonical answer, or `entailment_clusters`.

        discrete (no logps):  - sum_C (n_C / S) log (n_C / S)
        Rao:                  - sum_C p(C) log p(C),   p(C) = sum_{s in C} p(s) / sum_s p(s)

    The Rao form sums over *distinct* `strings`, each once: adding repeated samples would give "probabilities" above
    1. An unread sample (None) agrees with nothing and is a cluster of its own, so that an item without a readable
    answer is as uncertain as can be, not certain; with `strings`, equal unread strings are one. NaN for an item
    without samples."""
    found = sampled(labels, "labels")
    if logps is not None:
        return _rao(found.code, found.size, logps, strings)
    item, kinds, code = found.item, len(found.names), found.code.copy()
    unread = np.flatnonzero(code == UNREAD)
    code[unread] = kinds + np.arange(len(unread))
    key, votes = np.unique(item * (kinds + len(unread) + 1) + code, return_counts=True)
    owner = key // (kinds + len(unread) + 1)
    share = votes / np.maximum(found.size, 1)[owner]
    return np.where(
        found.size > 0, _clean_zero(group_sums(owner, -xlogy(share, share), len(found.size))), np.nan
    )


def semantic_entropy(
    labels: Sequence[Any] | NDArray[Any],
    logps: Sequence[Any] | None = None,
    strings: Sequence[Any] | None = None,
    *,
    on_invalid: OnInvalid = "raise",
) -> Estimate:
    """Mean over items of `semantic_entropies`; t interval over items. A flat sequence is one item. Small-sample
    values are biased down (S samples cannot show more than log S): compare only at the same S."""
    values = semantic_entropies(
        as_items(labels),
        None if logps is None else as_items(logps),
        None if strings is None else as_items(strings),
    )
    if on_invalid == "raise" and np.isnan(values).any():
        raise UserError(
            f"item {int(np.isnan(values).argmax())} has no samples; pass on_invalid='drop' to leave such out"
        )
    form = "discrete" if logps is None else "Rao"
    return replace(mean_interval(values, on_invalid), method=f"semantic entropy ({form}), nats; t")


def entailment_clusters(entails: ArrayLike) -> NDArray[np.int64]:
    """[S]: the cluster of each of S strings, numbered in order of first appearance, from entails [S, S] (i entails j).
    Two strings are joined where each entails the other, and clusters are the connected parts of that relation, so the
    order of the strings changes nothing."""
    matrix = np.asarray(entails)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"entails must be a square matrix, got the shape {matrix.shape}")
    matrix = matrix.astype(bool)
    _, part = connected_components(coo_array(matrix & matrix.T), directed=False)
    _, first, inverse = np.unique(part, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse.ravel()]


def p_true(logp_true: ArrayLike, logp_false: ArrayLike) -> Array:
    """Per item [n]: P(True) = p(True) / (p(True) + p(False)) (Kadavath et al. 2022, arXiv 2207.05221). Inputs [n,
    orders, forms]: log-probabilities of the surface forms of saying true and of saying false ("True", " true", "(A)"),
    which are summed; then the mean over the orders in which the two options were shown, because models favour one
    place. UserError where an order gives neither any probability."""
    true, false = np.asarray(logp_true, dtype=float), np.asarray(logp_false, dtype=float)
    if true.ndim != 3 or false.ndim != 3 or true.shape[:2] != false.shape[:2]:
        raise UserError(
            f"inputs must be [items, orders, forms], got the shapes {true.shape} and {false.shape}"
        )
    for name, value in (("logp_true", true), ("logp_false", false)):
        if np.isnan(value).any() or (value > 1e-6).any():
            raise UserError(
                f"{name} holds {value[np.isnan(value) | (value > 1e-6)][0]}, not a log-probability"
            )
    yes, no = logsumexp(true, axis=2), logsumexp(false, axis=2)
    both = np.logaddexp(yes, no)
    if np.isneginf(both).any():
        raise UserError(
            f"item {int(np.argwhere(np.isneginf(both))[0][0])} has no probability on either option"
        )
    return np.exp(yes - both).mean(axis=1)


def _rao(
    code: NDArray[np.int64], size: NDArray[np.int64], logps: Sequence[ArrayLike], strings: Answers | None
) -> Array:
    if strings is None:
        raise UserError(
            "semantic entropy from logps needs the strings of the samples, to count each distinct one once"
        )
    flat, text = _logps(logps), sampled(strings, "strings")
    same_sizes("labels", size, "logps", flat.size)
    same_sizes("labels", size, "strings", text.size)
    item, width = flat.item, len(text.names) + 1
    _, first = np.unique(item * width + text.code + 1, return_index=True)
    item, logp, label, name = item[first], flat.flat[first], code[first], text.code[first]
    top = np.full(len(size), -np.inf)
    np.maximum.at(top, item, logp)
    weight = np.exp(logp - top[item])
    kinds = int(code.max(initial=0)) + 1
    cluster = np.where(label == UNREAD, kinds + 1 + name, label)
    _, part = np.unique(item * (kinds + width + 2) + cluster, return_inverse=True)
    part = part.ravel()
    mass = group_sums(part, weight, int(part.max(initial=-1)) + 1)
    owner = np.zeros(len(mass), dtype=np.int64)
    owner[part] = item
    share = mass / group_sums(item, weight, len(size))[owner]
    return np.where(size > 0, _clean_zero(group_sums(owner, -xlogy(share, share), len(size))), np.nan)


def _clean_zero(entropy: Array) -> Array:
    """Rounding leaves no entropy below 0, and no -0.0."""
    return np.maximum(entropy, 0.0) + 0.0


def _logps(logps: Sequence[ArrayLike]) -> Ragged:
    flat = ragged("logps", logps)
    good = np.isfinite(flat.flat) & (flat.flat <= 1e-6)
    if not good.all():
        i = int(np.argmin(good))
        raise UserError(
            f"item {int(flat.item[i])} has the log-probability {flat.flat[i]}; it must be finite and <= 0"
        )
    return flat
