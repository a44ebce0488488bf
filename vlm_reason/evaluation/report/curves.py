"""The data of every plot, from the arrays of one system on one task. A figure that cannot be drawn says why.

Each function returns a `Figure` whose `data` is plain enough for JSON and complete enough to draw the plot from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...types import Estimate
from .. import metrics
from ..items import Array, draw_probabilities
from .figures import Figure
from .system import Problems

NEVER = -2
"""Stands for a right answer that was not sampled: no set can hold it."""
POINTS = 400
"""At most so many points a curve in the page; the ends stay."""
ALPHAS = tuple(round(0.05 * i, 2) for i in range(1, 11))
BINS = 12
NO_CONFIDENCE = (
    "One sample a problem, and no log-probabilities: nothing says how sure the answer is. Draw two or more."
)


def reliability(p: Problems, system: int) -> Figure:
    """Accuracy against confidence in 15 equal bins, with Wilson intervals and the band that true confidences
    would give."""
    title = "Reliability"
    if not p.sure:
        return _missing("reliability", title, NO_CONFIDENCE, system)
    d = metrics.reliability_diagram(p.confidence, p.right)
    error = p.summary["ece"]
    assert isinstance(error, metrics.CalibrationEstimate) and p.summary.decision is not None
    data = {
        "of": p.summary.decision.kind,
        "edges": d.edges, "n": d.n, "confidence": d.conf, "accuracy": d.acc, "low": d.acc_low, "high": d.acc_high,
        "null_low": d.null_low, "null_high": d.null_high, "ece": error,
    }  # fmt: skip
    return Figure("reliability", title, calibration_sentence(error), data, None, system)


def calibration_sentence(error: metrics.CalibrationEstimate) -> str:
    low, high = error.null_ci
    text = (
        f"ECE {error.value:.3f}; calibrated answers would read {error.null_mean:.3f} [{low:.3f}, {high:.3f}]"
    )
    return f"{text}: {'not calibrated' if error.p < 0.05 else 'not distinguishable from calibrated'}."


def risk_coverage(systems: Sequence[tuple[int, Problems]], target: float) -> Figure:
    """Risk of answering only the surest share, for every system."""
    title = "Risk and coverage"
    kept = [(i, p) for i, p in systems if p.sure]
    if not kept:
        return _missing("risk_coverage", title, NO_CONFIDENCE)
    curves = [_risk_curve(i, p, target) for i, p in kept]
    return Figure(
        "risk_coverage", title, _risk_sentence(curves[0], target), {"target": target, "systems": curves}
    )


def _risk_curve(system: int, p: Problems, target: float) -> dict[str, Any]:
    uncertainty, loss = 1 - p.confidence, (~p.right).astype(np.float64)
    curve = metrics.risk_coverage(uncertainty, loss)
    low, high = tie_band(uncertainty, loss)
    keep = _thin(len(loss))
    reached = metrics.coverage_at_risk(uncertainty, loss, target)
    return {
        "system": system, "coverage": curve.coverage[keep], "risk": curve.risk[keep], "oracle": curve.oracle[keep],
        "tie_low": low[keep], "tie_high": high[keep], "base_risk": curve.base_risk,
        "coverage_at_target": reached, "aurc": p.summary["aurc"],
    }  # fmt: skip


def tie_band(uncertainty: Array, loss: Array) -> tuple[Array, Array]:
    """Risk [n] of the luckiest and of the unluckiest order that respects the uncertainties: inside a group of
    equals the right answers first, or last."""
    count = np.arange(1, len(loss) + 1)
    lucky, unlucky = np.lexsort((loss, uncertainty)), np.lexsort((-loss, uncertainty))
    return np.cumsum(loss[lucky]) / count, np.cumsum(loss[unlucky]) / count


def _risk_sentence(curve: dict[str, Any], target: float) -> str:
    reached: Estimate = curve["coverage_at_target"]
    all_of_them = f"answering all risks {curve['base_risk']:.1%}."
    if not math.isfinite(reached.value) or reached.value == 0:
        return f"No share of the problems can be answered at a risk of {target:.0%}; {all_of_them}"
    if reached.value == 1:
        return f"All problems can be answered: the risk, {curve['base_risk']:.1%}, is within {target:.0%}."
    return f"At a risk of {target:.0%}, {reached.value:.0%} of the problems can be answered; {all_of_them}"


def repeats(p: Problems, system: int) -> Figure:
    """pass@k (is any right), maj@k (is the vote right), best-of-k (is the sample that scores highest right)."""
    title = "More samples"
    if p.fewest < 2:
        return _missing("repeats", title, "A problem with one sample says nothing of two: draw more.", system)
    names = {"pass@": "pass@k", "maj@": "maj@k", "best_of@": "best-of-k"}
    curves = {label: p.summary.curve(name) for name, label in names.items()}
    ks = list(curves["pass@k"])
    data = {"k": ks, "curves": {label: list(c.values()) for label, c in curves.items() if list(c) == ks}}
    n, any_right, vote = ks[-1], curves["pass@k"][ks[-1]].value, curves["maj@k"][ks[-1]].value
    finding = (
        f"Of {n} samples one is right on {any_right:.1%} of the problems; the vote finds it on {vote:.1%}."
    )
    scored = p.summary.scored_by
    finding += f" Best-of-k: by {scored}." if scored else " Nothing to score samples by: no best-of-k."
    return Figure("repeats", title, finding, data | {"best_of": scored}, None, system)


def entropy(p: Problems, system: int, ood: Problems | None) -> Figure:
    """Semantic entropy of the samples' answers, split by right and wrong, and by in and out of distribution."""
    title = "Semantic entropy"
    if p.most < 2:
        return _missing(
            "entropy", title, "One sample a problem has no spread of answers: draw two or more.", system
        )
    values = semantic_entropies(p)
    data = _split(values, p.right, None if ood is None else semantic_entropies(ood))
    return Figure("entropy", title, _split_sentence(values, p.right), data, None, system)


def semantic_entropies(p: Problems) -> Array:
    return metrics.semantic_entropies(p.answers)


def mutual_information(p: Problems, system: int, ood: Problems | None) -> Figure:
    """What the members of the posterior disagree about (BALD), split as `entropy`: of the probabilities of
    options where they are stored, else of the sampled answers, Miller-Madow corrected."""
    title = "Disagreement of members"
    if len(p.members) < 2:
        why = "Mutual information needs samples of two or more members of a weight posterior; this is one model."
        return _missing("mutual_information", title, why, system)
    other = ood if ood is not None and ood.members == p.members else None
    if "mutual_information_corrected" not in p.summary.estimates:
        if "mutual_information" not in p.summary.estimates:
            why = p.summary.skipped.get("mutual_information", "it could not be computed")
            return _missing("mutual_information", title, f"No mutual information: {why}.", system)
        values = _of_options(p)
        data = _split(values, p.right, None if other is None else _of_options(other))
        return Figure("mutual_information", title, _split_sentence(values, p.right), data, None, system)
    own = metrics.answer_disagreement(p.by_member())
    outside = None if other is None else metrics.answer_disagreement(other.by_member()).miller_madow
    data = _split(own.miller_madow, p.right, outside)
    data |= {"null_mean": float(np.nanmean(own.null_mean)), "members": len(p.members)}
    finding = (
        f"{_split_sentence(own.miller_madow, p.right)} On {np.mean(own.p < 0.05):.0%} of the problems the members "
        "differ more than samples of one model would (p < 0.05)."
    )
    return Figure("mutual_information", title, finding, data, None, system)


def _of_options(p: Problems) -> Array:
    """[n] mutual information of the members' probabilities of the options, one draw a member."""
    members = draw_probabilities(p.items).reshape(len(p), len(p.members), -1)
    return metrics.disagreement(members.transpose(1, 0, 2)).mutual_information


def _split(values: Array, right: NDArray[np.bool_], ood: Array | None) -> dict[str, Any]:
    """Histograms on common bins of the right, the wrong and the out-of-distribution problems."""
    parts = {"right": values[right], "wrong": values[~right], **({} if ood is None else {"ood": ood})}
    parts = {name: part[np.isfinite(part)] for name, part in parts.items()}
    every = np.concatenate(list(parts.values()))
    low, high = min(0.0, float(every.min(initial=0))), float(every.max(initial=0))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    means = {name: float(part.mean()) if len(part) else math.nan for name, part in parts.items()}
    return {
        "edges": edges,
        "counts": {name: np.histogram(part, edges)[0] for name, part in parts.items()},
        "means": means,
    }


def _split_sentence(values: Array, right: NDArray[np.bool_]) -> str:
    known = np.isfinite(values)
    wrong, good = values[known & ~right], values[known & right]
    if not len(wrong) or not len(good):
        kind = "right" if len(good) else "wrong"
        return f"All {int(known.sum())} chosen answers are {kind}; mean {values[known].mean():.2f} nats."
    found = metrics.auroc(values[known], ~right[known])
    means = f"Mean {good.mean():.2f} nats where right, {wrong.mean():.2f} where wrong"
    return f"{means}; tells them apart with AUROC {found.value:.2f}."


def member_variance(p: Problems, system: int) -> Figure:
    """Variance over members of the mean log-probability each gives to the answer the vote chose."""
    title = "Variance over members"
    if len(p.members) < 2:
        why = "The variance of log p(answer) needs two or more members of a weight posterior; this is one model."
        return _missing("member_variance", title, why, system)
    values = np.array([_variance(p, i) for i in range(len(p))])
    known = int(np.isfinite(values).sum())
    if not known:
        why = "No chosen answer was sampled, with its log-probability, by two members of the posterior."
        return _missing("member_variance", title, why, system)
    finding = (
        f"Of log p(chosen answer), on the {known} of {len(p)} problems where two members or more sampled it."
    )
    return Figure("member_variance", title, finding, _split(values, p.right, None), None, system)


def _variance(p: Problems, i: int) -> float:
    rows = slice(p.items.start[i], p.items.start[i + 1])
    votes = [p.columns.answers[a] if a >= 0 else None for a in p.answers[i].tolist()]
    same = np.array([v is not None and v == p.chosen[i] for v in votes], dtype=bool)
    member, logp = p.columns.member[rows], p.columns.answer_logp[rows]
    means = [logp[same & (member == m) & np.isfinite(logp)] for m in p.members]
    found = [float(own.mean()) for own in means if len(own)]
    return float(np.var(found, ddof=1)) if len(found) > 1 else math.nan


def roc(systems: Sequence[tuple[int, Problems, Problems]]) -> Figure:
    """Does the semantic entropy tell problems out of distribution (the positives) from those in it?"""
    title = "Out of distribution"
    if not systems:
        return _missing("roc", title, "No samples out of distribution were given: add them with --ood STORE.")
    kept = [entry for entry in systems if min(entry[1].most, entry[2].most) >= 2]
    if not kept:
        return _missing("roc", title, "One sample a problem has no spread of answers: draw two or more.")
    curves = [_roc_curve(*entry) for entry in kept]
    area: Estimate = curves[0]["auroc"]
    low, high = area.ci
    finding = (
        f"Semantic entropy tells {curves[0]['n_ood']} problems out of distribution from {curves[0]['n_id']} in it with "
        f"AUROC {area.value:.2f} [{low:.2f}, {high:.2f}], FPR95 {curves[0]['fpr_at_95'].value:.2f}."
    )
    return Figure("roc", title, finding, {"positive": "out of distribution", "systems": curves})


def _roc_curve(system: int, inside: Problems, outside: Problems) -> dict[str, Any]:
    score = np.concatenate([semantic_entropies(inside), semantic_entropies(outside)])
    positive = np.repeat([False, True], [len(inside), len(outside)])
    known = np.isfinite(score)
    score, positive = score[known], positive[known]
    curve = metrics.roc_curve(score, positive)
    keep = _thin(len(curve.fpr))
    return {
        "system": system, "fpr": curve.fpr[keep], "tpr": curve.tpr[keep],
        "auroc": metrics.auroc(score, positive), "fpr_at_95": metrics.fpr_at_95(score, positive),
        "n_id": int((~positive).sum()), "n_ood": int(positive.sum()),
    }  # fmt: skip


def conformal(p: Problems, system: int) -> Figure:
    """Mean size of conformal sets of sampled answers against alpha; calibrated on one half of the problems and
    measured on the other, both ways round."""
    title = "Conformal answer sets"
    if p.most < 2:
        return _missing("conformal", title, "Sets of answers need two or more samples a problem.", system)
    if len(p) < 20:
        return _missing(
            "conformal", title, f"{len(p)} problems are too few to calibrate on half of them (20 do).", system
        )
    never = float(1 - p.sampled.mean())
    folds = _halves(len(p))
    results = [[_sets(p, calibration, test, alpha) for calibration, test in folds] for alpha in ALPHAS]
    data: dict[str, Any] = {
        "alpha": ALPHAS,
        "size": [_mean_of([r.size for r in pair]) for pair in results],
        "coverage": [_mean_of([r.coverage for r in pair]) for pair in results],
        "bound": [all(math.isfinite(r.quantile) for r in pair) for pair in results],
        "never_sampled": never,
    }
    if not any(data["bound"]):
        why = (
            f"The right answer was never sampled on {never:.0%} of the problems: no set of sampled answers can keep a "
            f"promise of {1 - ALPHAS[-1]:.0%} or more. Draw more samples."
        )
        return _missing("conformal", title, why, system)
    return Figure("conformal", title, _set_sentence(data, never), data, None, system)


def _halves(n: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    order = np.random.default_rng(0).permutation(n)
    a, b = order[: n // 2], order[n // 2 :]
    return [(a, b), (b, a)]


def _sets(
    p: Problems, calibration: NDArray[np.int64], test: NDArray[np.int64], alpha: float
) -> metrics.ConformalResult:
    gold = np.where(p.items.gold < 0, NEVER, p.items.gold)
    answers = p.answers
    return metrics.conformal_answers(
        [answers[i] for i in calibration], gold[calibration].tolist(),
        [answers[i] for i in test], gold[test].tolist(), alpha,
    )  # fmt: skip


def _mean_of(parts: Sequence[Estimate]) -> float:
    n = sum(e.n for e in parts)
    return sum(e.value * e.n for e in parts) / n if n else math.nan


def _set_sentence(data: dict[str, Any], never: float) -> str:
    limit = f"The right answer was never sampled on {never:.0%} of the problems: "
    limit += f"no set can keep a promise above {1 - never:.0%}."
    kept = [i for i, bound in enumerate(data["bound"]) if bound and ALPHAS[i] >= 0.1]
    if not kept:
        return limit
    alpha, size, coverage = ALPHAS[kept[0]], data["size"][kept[0]], data["coverage"][kept[0]]
    promise = (
        f"Sets that promise {1 - alpha:.0%} hold {size:.2f} answers on average and cover {coverage:.0%}."
    )
    return f"{promise} {limit}" if never > 0 else promise


def _thin(n: int) -> NDArray[np.int64]:
    return (
        np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(np.int64))
        if n
        else np.empty(0, np.int64)
    )


def _missing(kind: str, title: str, why: str, system: int | None = None) -> Figure:
    return Figure(kind, title, "", {}, why, system)
