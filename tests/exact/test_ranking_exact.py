"""Rankers in an enumerable world: what they converge to, and whether their standard errors cover it.

The world knows p(z | x), q(z | x) != p and p(y | x, z) of all 15 rationales, and so the limit of every method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from vlm_reason.engines.base import Law
from vlm_reason.engines.exact import ExactEngine, ExactPrompts
from vlm_reason.engines.rollout import Draw, roll_out
from vlm_reason.exact import EnumerableWorld, Strings
from vlm_reason.ranking import Candidates, Ranking, rank, rank_members, score_candidates
from vlm_reason.store import Provenance, records_of

NAMES = ("A", "B", "C")


@dataclass(frozen=True)
class Known:
    """p and q of every rationale [Z], p(y | x, z) [Z, 3], tokens of every rationale [Z]."""

    p: np.ndarray
    q: np.ndarray
    answers: np.ndarray
    length: np.ndarray

    def draw(
        self, n: int, generator: np.random.Generator, first: int | None = None, law: str = "q"
    ) -> Candidates:
        """n rationales, the first given, an answer behind each; all three answers are candidates."""
        density = getattr(self, law)
        z = generator.choice(len(density), size=n, p=density)
        if first is not None:
            z[0] = first
        u = generator.random(n)
        y = (self.answers[z].cumsum(1) < u[:, None]).sum(1)
        return Candidates(
            "exact",
            NAMES,
            NAMES,
            tuple(y.tolist()),
            logp_answer=np.log(self.answers[z]),
            logp_trace=np.log(self.p[z]),
            logq=np.log(density[z]),
            logp_own=np.log(self.answers[z, y]),
            length=self.length[z] + 1.0,
            trace_length=self.length[z],
            answer_length=np.ones(3),
        )

    def limit(self, method: str, law: str = "q") -> np.ndarray:
        """The posterior over answers [3] that `method` tends to under draws from `law`, by summing over rationales."""
        density, l = getattr(self, law), self.length[:, None] + 1
        joint = np.log(self.p)[:, None] + np.log(self.answers)
        logw = (np.log(self.p) - np.log(density))[:, None]
        if method in ("mixture", "majority"):
            return density @ self.answers
        if method == "importance":
            return self.p @ self.answers
        if method == "weighted_vote":
            votes = density @ (self.answers * np.exp(joint / l))
            return votes / votes.sum()
        if method == "elbo":
            return softmax(density @ (logw + np.log(self.answers)))
        if method == "bin_released":
            return softmax(density @ (joint / l))
        scores = density @ (np.exp(joint) / l if method == "bin_eq9" else np.exp(joint / l))
        return scores / scores.sum()


def made(seed: int, proposal_seed: int) -> Known:
    world = EnumerableWorld.random(vocab=2, max_tokens=3, answers=3, seed=seed)
    other = EnumerableWorld.random(vocab=2, max_tokens=3, answers=3, seed=proposal_seed)
    with torch.no_grad():
        return Known(
            world.logp_prior().exp().numpy(),
            other.logp_prior().exp().numpy(),
            world.logp_answers().exp().numpy(),
            world.strings.length.double().numpy(),
        )


@pytest.fixture(scope="module")
def known() -> Known:
    """E_q[w^2] = 6.3, and the two laws answer differently."""
    return made(3, 4)


@pytest.fixture(scope="module")
def mild() -> Known:
    """The same chi-square without a rationale that q all but never draws: 256 draws are enough for a normal law."""
    return made(5, 6)


SMOOTH = (
    "majority",
    "weighted_vote",
    "mixture",
    "importance",
    "elbo",
    "bin_released",
    "bin_eq9",
    "bin_log_mean_exp",
)


def by_name(ranking: Ranking, values: tuple[float, ...]) -> np.ndarray:
    found = dict(zip(ranking.classes, values, strict=True))
    return np.array([found.get(name, 0.0) for name in NAMES])


@pytest.mark.parametrize("method", SMOOTH)
def test_every_method_tends_to_its_limit(known: Known, method: str) -> None:
    ranking = rank(known.draw(100_000, np.random.default_rng(0)), method)
    error = np.abs(by_name(ranking, ranking.posterior) - known.limit(method))
    assert error.max() < 0.01 and (error < 4.5 * by_name(ranking, ranking.se)).all()


def test_importance_corrects_the_proposal_and_mixture_does_not(known: Known) -> None:
    p_y, q_y = known.p @ known.answers, known.q @ known.answers
    assert np.abs(p_y - q_y).max() > 0.09  # the two laws answer differently
    drawn = known.draw(100_000, np.random.default_rng(1))
    corrected, plain = rank(drawn, "importance"), rank(drawn, "mixture")
    assert by_name(corrected, corrected.posterior) == pytest.approx(p_y, abs=0.01)
    assert by_name(plain, plain.posterior) == pytest.approx(q_y, abs=0.01)
    assert corrected.mass == pytest.approx(1) and plain.mass == pytest.approx(1)
    chi_square = (known.p**2 / known.q).sum()
    assert corrected.ess / 100_000 == pytest.approx(1 / chi_square, rel=0.05)


def test_the_posterior_over_rationales_tends_to_that_of_the_world(known: Known) -> None:
    """r summed over equal rationales is p(z | x, c^), c^ the best answer."""
    generator = np.random.default_rng(2)
    n = 50_000
    z = generator.choice(15, size=n, p=known.q)
    drawn = Candidates(
        "exact", NAMES, NAMES, (0,) * n, np.log(known.answers[z]), np.log(known.p[z]), logq=np.log(known.q[z])
    )
    ranking = rank(drawn, "importance")
    r = np.bincount(z[list(ranking.rationales)], ranking.rationale_posterior, minlength=15)
    joint = known.p * known.answers[:, NAMES.index(ranking.answer)]
    assert r == pytest.approx(joint / joint.sum(), abs=0.01)


@pytest.mark.parametrize("method", SMOOTH)
def test_standard_errors_of_answers_cover(mild: Known, method: str) -> None:
    """Over 500 problems of 256 draws, +-1.96 SE holds the limit about 95 times in 100, and the mean squared SE is the
    variance of the estimate."""
    generator = np.random.default_rng(5)
    rankings = [rank(mild.draw(256, generator), method) for _ in range(500)]
    found = np.array([by_name(r, r.posterior) for r in rankings])
    errors = np.array([by_name(r, r.se) for r in rankings])
    coverage = (np.abs(found - mild.limit(method)) <= 1.96 * errors).mean(0)
    assert ((coverage > 0.92) & (coverage < 0.98)).all(), coverage
    ratio = np.sqrt((errors**2).mean(0)) / found.std(0)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio


def test_where_errors_of_importance_are_too_small_the_weights_are_flagged(mild: Known) -> None:
    """E_q[w^2] = 29 and 64 draws: a rationale that carries the answer is often not among them, and nothing in the
    sample knows. Pareto k and ESS see it more often than not; in the mild world of 256 draws they are quiet."""
    generator, heavy = np.random.default_rng(5), made(0, 7)
    rankings = [rank(heavy.draw(64, generator), "importance") for _ in range(200)]
    truth = heavy.limit("importance")
    inside = [np.abs(by_name(r, r.posterior) - truth) <= 1.96 * by_name(r, r.se) for r in rankings]
    assert np.mean(inside) < 0.7
    assert np.mean([bool(r.flags) for r in rankings]) > 0.5
    quiet = [rank(mild.draw(256, generator), "importance").flags for _ in range(100)]
    assert np.mean([bool(flags) for flags in quiet]) < 0.2


@pytest.mark.parametrize("method", ["majority", "weighted_vote", "mixture", "importance", "bin_log_mean_exp"])
def test_standard_errors_of_rationales_are_the_spread_over_company(mild: Known, method: str) -> None:
    """Rationale 0 and its answer are given, the other 127 are drawn anew 600 times; answer A is always the best."""
    generator = np.random.default_rng(6)
    clear = replace(mild, answers=generator.dirichlet((6, 2, 2), size=15))
    values, errors = [], []
    for _ in range(600):
        drawn = clear.draw(128, generator, first=2)
        own = np.concatenate([np.log(clear.answers[2, :1]), drawn.logp_own[1:]])
        ranking = rank(replace(drawn, chosen=(0, *drawn.chosen[1:]), logp_own=own), method)
        place = ranking.rationales.index(0)
        values.append(ranking.rationale_posterior[place])
        errors.append(ranking.rationale_se[place])
        assert ranking.answer == "A"
    assert math.sqrt(np.square(errors).mean()) / np.std(values) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("method", ["best_of_n", "best_of_n_mean"])
def test_the_bootstrap_of_a_maximum_has_the_right_size(mild: Known, method: str) -> None:
    """No delta method holds for a maximum; of 8 draws the bootstrap is right to within a factor of 1.6."""
    generator = np.random.default_rng(7)
    rankings = [rank(mild.draw(8, generator), method) for _ in range(100)]
    spread = np.std([by_name(r, r.posterior) for r in rankings], axis=0)
    claimed = np.sqrt(np.mean([by_name(r, r.se) ** 2 for r in rankings], axis=0))
    assert (claimed > spread / 1.6).all() and (claimed < 1.6 * spread).all()


def test_members_average_and_their_disagreement_is_bald(known: Known) -> None:
    """Three members with other p(y | x, z). MI of the limits by the formula; the plug-in of few draws is too high by
    about its bias, which is taken off."""
    generator = np.random.default_rng(8)
    worlds = [
        Known(known.p, known.q, generator.dirichlet(np.ones(3), size=15), known.length) for _ in range(3)
    ]
    each = np.array([w.limit("mixture", "p") for w in worlds])
    entropy = lambda v: float(-(v * np.log(v)).sum(-1).mean())  # noqa: E731
    truth = entropy(each.mean(0)[None]) - entropy(each)
    many = rank_members([w.draw(50_000, generator, law="p") for w in worlds], "mixture")
    found = np.array([many.posterior[many.classes.index(name)] for name in NAMES])
    assert found == pytest.approx(each.mean(0), abs=0.01)
    spread = np.array([many.se[many.classes.index(name)] for name in NAMES])
    assert spread == pytest.approx(each.std(0, ddof=1) / math.sqrt(3), abs=0.01)
    assert many.mutual_information == pytest.approx(truth, abs=0.003)

    few = [rank_members([w.draw(12, generator, law="p") for w in worlds], "majority") for _ in range(300)]
    plug_in = np.mean([r.plug_in for r in few])
    corrected = np.mean([r.mutual_information for r in few])
    assert plug_in - truth > 0.03  # (K-1)(1 - 1/M) / 2S = 0.056 for votes on three equally likely answers
    assert abs(corrected - truth) < (plug_in - truth) / 2


def test_from_sampling_to_importance_through_the_engine() -> None:
    """Rationales drawn at temperature 2 in the exact engine, scored at temperature 1 by their ids."""
    world = EnumerableWorld.random(vocab=2, max_tokens=2, answers=2, seed=34, scale=1.5)
    engine, prompts, problem = ExactEngine(world), ExactPrompts(world), world.problem(0)
    plan = [Draw("base/prior", None, temperature=2.0)] * 4000
    (group,) = roll_out(
        engine, prompts, [problem], plan, run_seed=0, stream="eval", max_trace_tokens=4, max_answer_tokens=1,
        answer_law=Law(None, 2.0),
    )  # fmt: skip
    records = records_of(
        group, Provenance("w", "exact", 2.0), judge=lambda problem, answer: (_Verdict(), answer.text)
    )
    scored = score_candidates(engine, prompts.cue_ids, {problem.id: records}, Law(None))[problem.id]
    ranking = rank(scored, "importance")
    with torch.no_grad():
        truth = torch.stack([world.log_marginal(a) for a in range(2)]).exp().tolist()
        tempered = rank(scored, "mixture")
    found = dict(zip(ranking.classes, ranking.posterior, strict=True))
    error = dict(zip(ranking.classes, ranking.se, strict=True))
    for name, value in zip("AB", truth, strict=True):
        assert abs(found[name] - value) < 3.5 * error[name] < 0.1
    assert ranking.mass == pytest.approx(1)
    assert abs(tempered.posterior[0] - max(truth)) > 0.08  # that of temperature 2


class _Verdict:
    correct, score, parsed, failed = True, 1.0, "A", False


def test_three_rationales_where_the_marginal_is_right_and_both_bins_are_wrong() -> None:
    """Two long rationales say 8, a short one, the likeliest of all, says 15 (specification: seen with a real model)."""
    strings = Strings(vocab=2, max_tokens=7)
    prior = torch.zeros(strings.open_prefixes, 3, dtype=torch.float64)
    prior[0, strings.end] = 2.0  # to stop at once is the likeliest
    short, long_a, long_b = (), (0,) * 7, (1,) * 7
    answers = torch.zeros(strings.count, 2, dtype=torch.float64)
    for trace, eight in ((short, 0.05), (long_a, 0.85), (long_b, 0.8)):
        answers[strings.index[trace]] = torch.tensor([eight, 1 - eight], dtype=torch.float64).log()
    world = EnumerableWorld.from_tables(
        strings, prior, torch.zeros(2, strings.open_prefixes, 3, dtype=torch.float64), answers
    )
    z = [strings.index[trace] for trace in (long_a, long_b, short)]
    assert int(world.logp_prior().argmax()) == z[2]
    toy = Candidates(
        "toy",
        ("8", "15"),
        ("8", "15"),
        (0, 0, 1),
        logp_answer=world.logp_answers()[z].numpy(),
        logp_trace=world.logp_prior()[z].numpy(),
        trace_length=strings.length[z].double().numpy(),
        answer_length=np.ones(2),
    )
    assert rank(toy, "mixture").answer == "8" and rank(toy, "majority").answer == "8"
    assert rank(toy, "mixture").posterior[0] == pytest.approx((0.85 + 0.8 + 0.05) / 3)
    assert rank(toy, "bin_released").answer == "15" and rank(toy, "bin_eq9").answer == "15"
