"""Every metric that a store holds the numbers for, without a model.

    columns = SampleStore.open("runs/x/samples").columns()
    for name, estimate in summary(columns).estimates.items(): ...

The denominator is fixed: what was cut and what cannot be read is wrong, and counted. Draws of one problem are not
independent, so the problem is the cluster of every interval. What cannot be computed is named in `skipped` with the
reason. Notation as in docs/metrics.md; the decision (answer, confidence) of a problem is `items.Decision`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..stats import clustered, mean_interval
from ..store import Columns
from ..types import Estimate
from . import metrics
from .items import (
    Confidence,
    Decision,
    Items,
    choice_counts,
    choice_gold,
    choice_probabilities,
    decide,
    draw_probabilities,
    has_choices,
    items_of,
)

LARGEST_K = 1 << 12
ALPHA = 0.1
COVERAGE = 0.8
RISK = 0.05


@dataclass(frozen=True)
class Summary:
    """estimates: metric -> estimate. skipped: metric -> why it does not apply. items, decision: what they were computed
    from, one entry a problem, for plots and for comparisons. scored_by: what best_of@k ranks by.

    accuracy           share of right samples, interval over problems
    unparsed           share of given answers that cannot be read
    truncated          share of traces that never closed
    verifier_failures  share of answers whose check crashed or ran out of time (wrong)
    trace_tokens       mean length
    pass@k, pass^k     any, all of k draws right; maj@k the vote of k, best_of@k the best scored of k
    answer_accuracy    of the decision; ece, ece_mass, ece_debiased, mce, brier, nll of its confidence
    nll_choices, brier_multiclass    of the probabilities of all options
    auroc, aupr, fpr_at_95           does 1 - confidence find the wrong decisions (aupr, fpr: positive = wrong)
    aurc, e_aurc, augrc, prr, risk_at_coverage (0.8), coverage_at_risk (0.05)    selective answering, loss = wrong
    predictive_entropy, predictive_entropy_per_token    -mean log p of a draw
    semantic_entropy   over canonical answers; semantic_entropy_auroc, semantic_entropy_prr of it as the uncertainty
    total_entropy, expected_entropy, mutual_information    of the members of a posterior, the plug-in value where it is
                       from sampled answers; mutual_information_corrected without its bias, and p that they differ
    conformal_coverage, conformal_size    answer sets at 1 - alpha = 0.9, calibrated on half of the problems
    """

    problems: int
    samples: int
    members: int
    estimates: Mapping[str, Estimate]
    skipped: Mapping[str, str]
    items: Items
    decision: Decision | None
    scored_by: str | None = None

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.estimates:
            raise UserError(f"{name} was not computed: {self.skipped.get(name, 'there is no such metric')}")
        return self.estimates[name]

    def curve(self, name: str) -> dict[int, Estimate]:
        """k -> estimate, of `pass@`, `pass^`, `maj@` or `best_of@`."""
        found = {k[len(name) :]: v for k, v in self.estimates.items() if k.startswith(name)}
        return {int(k): v for k, v in found.items()}

    def per_problem(self) -> dict[str, float]:
        """Problem id -> mean correctness, for paired comparison."""
        return dict(zip(self.items.ids, self.items.accuracy.tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "problems": self.problems,
            "samples": self.samples,
            "members": self.members,
            "confidence": None if self.decision is None else self.decision.kind,
            "best_of": self.scored_by,
            "metrics": {name: estimate.to_json() for name, estimate in self.estimates.items()},
            "skipped": dict(self.skipped),
        }


def summary(
    columns: Columns,
    *,
    confidence: Confidence | None = None,
    ks: Iterable[int] | None = None,
    bins: int = 15,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Summary:
    """The metrics of one system: of one model, or of the members of one posterior. confidence: how its answer and its
    sureness are read (`items.decide`); ks: of the curves, default powers of two up to the draws of a problem; seed: of
    resampling. progress is called with the name of each group of metrics.

    UserError for records of several models, without a verdict, or drawn behind the answer (`Columns.where` chooses).
    No records at all: every estimate is NaN with the flag `empty`, or skipped."""
    items = items_of(columns)
    chosen = decide(items, confidence)
    scores = _scores(items)
    sizes = tuple(ks) if ks is not None else _powers(items)
    parts: list[tuple[str, Callable[[], _Part]]] = [
        ("samples", lambda: _of_samples(items)),
        ("repeats", lambda: _of_repeats(items, sizes, scores, seed)),
        ("calibration", lambda: _of_confidence(chosen, bins, seed)),
        ("selection", lambda: _of_selection(chosen, seed)),
        ("choices", lambda: _of_choices(items)),
        ("entropy", lambda: _of_entropy(items, chosen, seed)),
        ("members", lambda: _of_members(items, seed)),
        ("conformal", lambda: _of_conformal(items, seed)),
    ]
    estimates: dict[str, Estimate] = {}
    skipped: dict[str, str] = {}
    for name, part in parts:
        if progress is not None:
            progress(name)
        done = part()
        estimates |= {k: v for k, v in done.items() if isinstance(v, Estimate)}
        skipped |= {k: v for k, v in done.items() if isinstance(v, str)}
    return Summary(
        len(items),
        len(columns),
        max(1, len(items.members)),
        estimates,
        skipped,
        items,
        chosen,
        None if scores is None else scores[0],
    )


_Part = dict[str, Estimate | str]


def _skip(why: str, *names: str) -> _Part:
    return dict.fromkeys(names, why)


def _powers(items: Items) -> tuple[int, ...]:
    most = int(items.n.max(initial=0))
    if most < 2:
        return ()
    return tuple(k for k in (1 << i for i in range(most.bit_length())) if k <= min(most, LARGEST_K))


# ---- of the samples ----


def _of_samples(items: Items) -> _Part:
    rows, draws = items.rows, items.draws
    asked = rows.answered
    made: _Part = {
        "accuracy": metrics.accuracy(items.right, items.item),
        "unparsed": metrics.accuracy(rows.unparsed[asked], rows.problem[asked]),
        "verifier_failures": metrics.accuracy(rows.failed[asked], rows.problem[asked]),
    }
    if len(draws) and draws.text_only.all() and draws.complete.all():
        made |= _skip("the samples were imported without finish reasons", "truncated")
    else:
        made["truncated"] = metrics.accuracy(~draws.complete, items.item)
    known = draws.trace_tokens >= 0
    if len(draws) and not known.any():
        made |= _skip("the samples were imported without token ids", "trace_tokens")
    else:
        made["trace_tokens"] = clustered(draws.trace_tokens[known].astype(float), items.item[known])
    return made


def _of_repeats(items: Items, ks: tuple[int, ...], scores: tuple[str, Any] | None, seed: int) -> _Part:
    made: _Part = {}
    if not ks:
        return _skip("one draw a problem", "pass@k", "pass^k", "maj@k", "best_of@k")
    split_scores = None if scores is None else items.split(scores[1])
    correct = items.split(items.draws.correct)
    for k in ks:
        made[f"pass@{k}"] = metrics.pass_at_k(items.hits, items.n, k)
        made[f"pass^{k}"] = metrics.pass_hat_k(items.hits, items.n, k)
        made[f"maj@{k}"] = metrics.maj_at_k_judged(items.answers, correct, k, seed=seed)
        if split_scores is not None:
            made[f"best_of@{k}"] = metrics.best_of_k(split_scores, correct, k)
    if split_scores is None:
        made |= _skip("no reward and no log-probability for every sample", "best_of@k")
    return made


def _scores(items: Items) -> tuple[str, Any] | None:
    """What the draws are ranked by, [T]: rewards, or else the mean log-probability of a token."""
    draws = items.draws
    if len(draws) == 0:
        return None
    if np.isfinite(draws.reward).all():
        return "reward", draws.reward
    if draws.text_only.any():
        return None
    total = draws.trace_logp + np.where(draws.answered, draws.answer_logp, 0.0)
    return "mean log-probability", total / np.maximum(draws.trace_tokens + draws.answer_tokens, 1)


# ---- of the decision ----

_CALIBRATION = ("answer_accuracy", "ece", "ece_mass", "ece_debiased", "mce", "brier", "nll")
_NO_CONFIDENCE = "one draw a problem, without the probabilities of options or of its answer: no confidence"


def _of_confidence(decision: Decision | None, bins: int, seed: int) -> _Part:
    if decision is None:
        return _skip(_NO_CONFIDENCE, *_CALIBRATION)
    sure, right = decision.confidence, decision.correct
    return {
        "answer_accuracy": metrics.accuracy(right),
        "ece": metrics.ece(sure, right, bins, seed=seed),
        "ece_mass": metrics.ece(sure, right, bins, "mass", seed=seed),
        "ece_debiased": metrics.ece(sure, right, bins, debiased=True, seed=seed),
        "mce": metrics.mce(sure, right, bins, seed=seed),
        "brier": metrics.brier_top(sure, right),
        "nll": metrics.nll(sure, right.astype(int)),
    }


_SELECTION = (
    "auroc",
    "aupr",
    "fpr_at_95",
    "aurc",
    "e_aurc",
    "augrc",
    "prr",
    "risk_at_coverage",
    "coverage_at_risk",
)


def _of_selection(decision: Decision | None, seed: int) -> _Part:
    if decision is None:
        return _skip(_NO_CONFIDENCE, *_SELECTION)
    unsure, wrong = 1.0 - decision.confidence, 1.0 - decision.correct
    return {
        "auroc": metrics.auroc(unsure, wrong),
        "aupr": metrics.aupr(unsure, wrong, seed=seed),
        "fpr_at_95": metrics.fpr_at_95(unsure, wrong, seed=seed),
        "aurc": metrics.aurc(unsure, wrong, seed=seed),
        "e_aurc": metrics.e_aurc(unsure, wrong, seed=seed),
        "augrc": metrics.augrc(unsure, wrong, seed=seed),
        "prr": metrics.prr(unsure, wrong, seed=seed),
        "risk_at_coverage": metrics.risk_at_coverage(unsure, wrong, COVERAGE, seed=seed),
        "coverage_at_risk": metrics.coverage_at_risk(unsure, wrong, RISK, seed=seed),
    }


def _of_choices(items: Items) -> _Part:
    names = ("nll_choices", "brier_multiclass")
    why = "classes must mean the same on every item; options A, B, C do not"
    if not has_choices(items):
        return _skip("no probabilities of all options", *names) | _skip(why, "classwise_ece")
    probabilities, gold = choice_probabilities(items), choice_gold(items)
    made: _Part = {
        "nll_choices": metrics.nll(probabilities, gold),
        "brier_multiclass": metrics.brier_multiclass(probabilities, gold),
    }
    return made | _skip(why, "classwise_ece")


# ---- of the uncertainty ----


def _of_entropy(items: Items, decision: Decision | None, seed: int) -> _Part:
    draws = items.draws
    names = ("predictive_entropy", "predictive_entropy_per_token")
    made: _Part
    if len(draws) == 0 or draws.text_only.any():
        made = _skip("the samples were imported without log-probabilities", *names)
    else:
        logps = draws.trace_logp + np.where(draws.answered, draws.answer_logp, 0.0)
        tokens = np.maximum(draws.trace_tokens + draws.answer_tokens, 1)
        split = items.split(logps)
        made = {
            names[0]: metrics.predictive_entropy(split),
            names[1]: metrics.predictive_entropy(split, items.split(tokens)),
        }
    semantic = ("semantic_entropy", "semantic_entropy_auroc", "semantic_entropy_prr")
    if int(items.n.max(initial=0)) < 2 or decision is None:
        return made | _skip("one draw a problem", *semantic)
    entropies = metrics.semantic_entropies(items.answers)
    wrong = 1.0 - decision.correct
    return made | {
        semantic[0]: mean_interval(entropies),
        semantic[1]: metrics.auroc(entropies, wrong),
        semantic[2]: metrics.prr(entropies, wrong, seed=seed),
    }


_MEMBERS = ("total_entropy", "expected_entropy", "mutual_information", "mutual_information_corrected")


def _of_members(items: Items, seed: int) -> _Part:
    """Members of a posterior: by the probabilities of options where there are any, else by the sampled answers."""
    if len(items.members) < 2:
        return _skip("samples of one model: there are no members to disagree", *_MEMBERS)
    there = np.unique(items.item * (items.members[-1] + 1) + items.draws.member)
    missing = len(items) * len(items.members) - len(there)
    if missing:
        return _skip(f"{missing} pairs of problem and member have no sample", *_MEMBERS)
    if has_choices(items):
        members = len(items.members)
        if (items.n != members).any():
            return _skip("several samples of a member with the probabilities of options", *_MEMBERS)
        stacked = draw_probabilities(items).reshape(len(items), members, -1).transpose(1, 0, 2)
        parts = metrics.disagreement(stacked)
        exact = _skip("the probabilities are exact: nothing to correct", _MEMBERS[-1])
        values = (parts.total, parts.aleatoric, parts.mutual_information)
        return {name: mean_interval(v) for name, v in zip(_MEMBERS, values, strict=False)} | exact
    answers = _by_member(items)
    split = metrics.answer_disagreement(answers, resamples=1, seed=seed)
    values = (split.total, split.aleatoric, split.mutual_information)
    made: _Part = {name: mean_interval(v, "drop") for name, v in zip(_MEMBERS, values, strict=False)}
    return made | {_MEMBERS[-1]: metrics.answer_mutual_information(answers, seed=seed)}


def _by_member(items: Items) -> list[list[Any]]:
    """answers[problem][member]: codes of its draws."""
    order = np.lexsort((items.draws.member, items.item))
    member, item = items.draws.member[order], items.item[order]
    cuts = np.flatnonzero((np.diff(member) != 0) | (np.diff(item) != 0)) + 1
    blocks = np.split(items.draws.canonical[order].astype(np.int64), cuts)
    width = len(items.members)
    return [blocks[i : i + width] for i in range(0, len(blocks), width)]


def _of_conformal(items: Items, seed: int) -> _Part:
    """Half of the problems, drawn with `seed`, calibrate; the other half is tested."""
    names = ("conformal_coverage", "conformal_size")
    if int(items.n.max(initial=0)) < 2 and not has_choices(items):
        return _skip("one draw a problem: no answer sets", *names)
    if len(items) < 2:
        return _skip("needs problems to calibrate on and others to test", *names)
    order = np.random.default_rng(seed).permutation(len(items))
    one, other = np.sort(order[: len(items) // 2]), np.sort(order[len(items) // 2 :])
    if has_choices(items):
        sizes, gold = choice_counts(items).tolist(), choice_gold(items)
        p = [own[:k] for own, k in zip(choice_probabilities(items), sizes, strict=True)]
        result = metrics.conformal([p[i] for i in one], gold[one], [p[i] for i in other], gold[other], ALPHA)
    else:
        gold = np.where(items.gold < 0, len(items.draws.answers), items.gold)
        answers = [items.draws.canonical[a:b] for a, b in zip(items.start[:-1], items.start[1:], strict=True)]
        result = metrics.conformal_answers(
            [answers[i] for i in one],
            gold[one].tolist(),
            [answers[i] for i in other],
            gold[other].tolist(),
            ALPHA,
        )
    return {names[0]: result.coverage, names[1]: result.size}
