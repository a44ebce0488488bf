"""Do the members of a posterior disagree? Epistemic uncertainty, split off from what every member is unsure of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from ...errors import UserError
from ...stats import OnInvalid, mean_interval
from ...types import Estimate
from .inputs import Array, whole

TOLERANCE = 1e-9
SUM_TOLERANCE = 1e-4
_CANDIDATES = 10_000


@dataclass(frozen=True)
class Disagreement:
    """Per item [n], in nats: total = H(mean_m p_m), aleatoric = mean_m H(p_m), mutual_information = total -
    aleatoric."""

    total: Array
    aleatoric: Array
    mutual_information: Array


def disagreement(probabilities: ArrayLike) -> Disagreement:
    """The split of every item (BALD: Houlsby et al. 2011, arXiv 1112.5745), probabilities [M members, n, K]; classes
    that an item lacks hold 0. A difference below 0 by rounding is 0; below -1e-9 it is an error, as are probabilities
    that are not finite, negative, or do not sum to 1."""
    p = _members(probabilities)
    bad = _bad_items(p)
    if bad.any():
        raise UserError(_complaint(p, int(np.argmax(bad))))
    return _split(p)


def mutual_information(probabilities: ArrayLike, *, on_invalid: OnInvalid = "raise") -> Estimate:
    """Mean over items of the BALD score H(mean_m p_m) - mean_m H(p_m), in nats, probabilities [M, n, K]; t interval
    over items. Per item: `disagreement`. 0 where the members agree however unsure they are: for all of the
    uncertainty take `disagreement(...).total`. Not from histograms of few sampled answers, where it is biased up: use
    `answer_mutual_information`. One member always reads 0 (flag `single member`)."""
    p = _members(probabilities)
    bad = _bad_items(p)
    if bad.any() and on_invalid == "raise":
        raise UserError(_complaint(p, int(np.argmax(bad))))
    estimate = mean_interval(_split(p[:, ~bad]).mutual_information)
    flags = (*estimate.flags, "single member") if len(p) == 1 else estimate.flags
    return replace(estimate, n_dropped=int(bad.sum()), method="mutual information, nats; t", flags=flags)


def bald_batch(probabilities: ArrayLike, size: int, *, max_states: int = 4096) -> tuple[int, ...]:
    """Indices of the `size` items to label next, by greedy joint mutual information (BatchBALD: Kirsch et al. 2019,
    arXiv 1906.08158), probabilities [M, n, K]:

        I(y_1..y_b; m) = H(y_1..y_b) - sum_i mean_m H(y_i | m),

    exact over all K^b joint answers while those are at most `max_states`; then the largest single scores of the rest,
    which may pick near-copies. Only the 10,000 items of largest single score are candidates. Ties go to the lower
    index."""
    p = _members(probabilities)
    bad = _bad_items(p)
    if bad.any():
        raise UserError(_complaint(p, int(np.argmax(bad))))
    members, n, k = p.shape
    size = min(whole("size", size), n)
    split = _split(p)
    ranked = np.argsort(-split.mutual_information, kind="stable")[:_CANDIDATES]
    chosen: list[int] = []
    joint = np.ones((1, members))  # P(y_1..y_b | m), [states, M]
    while len(chosen) < size and len(joint) * k <= max_states:
        left = np.sort(ranked[~np.isin(ranked, chosen)])
        if not len(left):
            break
        gain = _joint_entropy(joint, p[:, left]) - split.aleatoric[left]
        best = int(left[np.argmax(gain >= gain.max() - TOLERANCE)])
        chosen.append(best)
        joint = (joint[:, None, :] * p[:, best].T[None]).reshape(-1, members)
    single = np.argsort(-split.mutual_information, kind="stable")
    chosen += single[~np.isin(single, chosen)][: size - len(chosen)].tolist()
    return tuple(chosen)


def _joint_entropy(joint: Array, p: Array) -> Array:
    """[n]: H(y_1..y_b, y) for every candidate y; joint [states, M], p [M, n, K]."""
    members, n, k = p.shape
    block = max(1, 2_000_000 // (len(joint) * k))
    parts = []
    for i in range(0, n, block):
        states = np.tensordot(joint, p[:, i : i + block], axes=(1, 0)) / members
        parts.append(-xlogy(states, states).sum(axis=(0, 2)))
    return np.concatenate(parts)


def _members(probabilities: ArrayLike) -> Array:
    p = np.asarray(probabilities, dtype=float)
    if p.ndim != 3 or p.shape[0] < 1:
        raise UserError(f"probabilities must be [members, items, classes], got the shape {p.shape}")
    return p


def _bad_items(p: Array) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        good = (
            np.isfinite(p).all(axis=2) & (p >= 0).all(axis=2) & (np.abs(p.sum(axis=2) - 1) <= SUM_TOLERANCE)
        )
    return ~good.all(axis=0)


def _complaint(p: Array, item: int) -> str:
    member = int(np.argmax([_bad_items(row[None, None])[0] for row in p[:, item]]))
    shown = np.array2string(p[member, item], precision=6, threshold=8)
    return (
        f"item {item}: the probabilities {shown} of member {member} are not all finite, >= 0 and of sum 1; mend them, "
        "or pass on_invalid='drop' where a mean is asked for"
    )


def _split(p: Array) -> Disagreement:
    mean = p.mean(axis=0)
    total = -xlogy(mean, mean).sum(axis=1)
    aleatoric = -xlogy(p, p).sum(axis=2).mean(axis=0)
    return Disagreement(total, aleatoric, clamp(total - aleatoric))


def clamp(information: Array) -> Array:
    """Mutual information is never negative: rounding is set to 0, anything below -1e-9 is an error of the input."""
    if len(information) and information.min() < -TOLERANCE:
        i = int(np.argmin(information))
        raise UserError(
            f"item {i} has the mutual information {information[i]}, below 0 by more than rounding"
        )
    return np.maximum(information, 0.0)
