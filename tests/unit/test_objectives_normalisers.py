"""Normalisers against numpy; their contract on masks, -inf and null groups; the Metropolis chain."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from vlm_reason.errors import UserError
from vlm_reason.objectives import NORMALISERS, metropolis, normaliser_named
from vlm_reason.objectives.independence_mh import acceptance_rate
from vlm_reason.objectives.normalisers import (
    DivideByMean,
    Identity,
    LooMean,
    MeanStd,
    Normaliser,
    SelfNormalised,
)

INF = math.inf
W = np.array([0.5, 2.0, 0.0, 1.0])
LOGW = torch.tensor([[math.log(0.5), math.log(2.0), -INF, 0.0]], dtype=torch.float64)
UNIFORMS = torch.tensor([[0.9, 0.3, 0.1, 0.6]], dtype=torch.float64)
ALL = list(NORMALISERS.values())


def loo(values: np.ndarray) -> np.ndarray:
    return np.array([values[k] - np.delete(values, k).mean() for k in range(len(values))])


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [
        (NORMALISERS["self"], W / W.sum()),
        (NORMALISERS["loo_mean"], loo(W)),
        (
            NORMALISERS["loo_log_mean_exp"],
            [np.log(W.mean()) - np.log(np.delete(W, k).mean()) for k in range(4)],
        ),
        (NORMALISERS["mean_std"], (W - W.mean()) / (W.std(ddof=1) + 1e-4)),
        (MeanStd(ddof=0, eps=0.0), scipy.stats.zscore(W)),
        (NORMALISERS["divide_by_mean"], W / W.mean()),
        (DivideByMean(centre=True), W / W.mean() - 1),
        (NORMALISERS["rank"], scipy.stats.rankdata(W) / 4 - 5 / 8),
        (NORMALISERS["argmax"], [0, 1, 0, 0]),
        (NORMALISERS["none"], W),
    ],
    ids=lambda v: v.name if isinstance(v, Normaliser) else "",
)
def test_formula(normaliser: Normaliser, expected) -> None:
    np.testing.assert_allclose(normaliser(LOGW)[0], expected, atol=1e-12)


def test_registry() -> None:
    assert list(NORMALISERS) == [
        "self", "loo_mean", "loo_log_mean_exp", "mean_std", "divide_by_mean", "rank", "metropolis", "argmax", "none",
    ]  # fmt: skip
    on_w = {n.name for n in ALL if n.acts_on == "w"}
    assert on_w == {"loo_mean", "mean_std", "divide_by_mean", "none"}
    assert normaliser_named("loo_mean") == LooMean()
    with pytest.raises(UserError, match="'loo-mean'; did you mean 'loo_mean'"):
        normaliser_named("loo-mean")


@pytest.mark.parametrize("normaliser", ALL, ids=lambda n: n.name)
def test_contract(normaliser: Normaliser) -> None:
    uniforms = UNIFORMS if normaliser.needs_uniforms else None
    value = normaliser(LOGW, uniforms=uniforms)
    # Masked entries are not read and get 0.
    order = [4, 0, 1, 5, 2, 3]
    padded = torch.cat([LOGW, torch.tensor([[math.nan, INF]])], 1)[:, order]
    mask = torch.tensor([[True] * 4 + [False] * 2])[:, order]
    wide = None if uniforms is None else torch.cat([uniforms, torch.tensor([[0.5, 0.5]])], 1)[:, order]
    masked = normaliser(padded, mask, wide)
    assert torch.allclose(masked[:, [1, 2, 4, 5]], value, atol=1e-12)
    assert masked[0, 0] == 0 and masked[0, 3] == 0
    # Coefficients are what a sum over the group needs.
    scale = 4 if normaliser.per_draw else 1
    assert torch.allclose(normaliser.coefficients(LOGW, uniforms=uniforms) * scale, value)
    assert torch.allclose(normaliser.coefficients(padded, mask, wide) * scale, masked)
    # Null and empty groups carry nothing; one draw does not break anything.
    u = torch.full((2, 4), 0.5) if normaliser.needs_uniforms else None
    empty = torch.tensor([[True] * 4, [False] * 4])
    assert normaliser(torch.full((2, 4), -INF), empty, u).tolist() == [[0.0] * 4] * 2
    one = normaliser(torch.tensor([[-0.5]]), uniforms=None if u is None else u[:1, :1])
    assert one.isfinite().all()


@pytest.mark.parametrize("normaliser", [n for n in ALL if not n.needs_uniforms], ids=lambda n: n.name)
def test_permutation(normaliser: Normaliser) -> None:
    for order in itertools.permutations(range(4)):
        assert torch.allclose(normaliser(LOGW[:, order]), normaliser(LOGW)[:, order], atol=1e-12)


@pytest.mark.parametrize("name", ["loo_mean", "mean_std", "rank"])
def test_baselines_leave_nothing_when_all_are_equal(name: str) -> None:
    for value in (0.0, -3.0, -1e-7):
        assert NORMALISERS[name](torch.full((1, 8), value)).tolist() == [[0.0] * 8]


def test_log_rewards_leave_impossible_draws_out() -> None:
    x = torch.tensor([[-1.0, -3.0, -INF, -2.0]], dtype=torch.float64)
    value = LooMean(acts_on="log w")(x)
    np.testing.assert_allclose(value[0], [1.5, -1.5, 0.0, 0.0], atol=1e-12)
    known = np.array([-1.0, -3.0, -2.0])
    zscored = (known - known.mean()) / (known.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(MeanStd(acts_on="log w")(x)[0, [0, 1, 3]], zscored, atol=1e-12)
    floored = LooMean(acts_on="log w", floor=-5.0)(x)
    np.testing.assert_allclose(floored[0], loo(np.array([-1.0, -3.0, -5.0, -2.0])), atol=1e-12)
    assert Identity(acts_on="log w")(x).tolist() == [[-1.0, -3.0, 0.0, -2.0]]


def test_one_draw_has_no_baseline() -> None:
    assert LooMean()(torch.tensor([[0.0]])).item() == 1.0
    assert MeanStd()(torch.tensor([[0.0]])).item() == 0.0
    assert SelfNormalised()(torch.tensor([[-7.0]])).item() == 1.0


def test_first_of_equals_is_the_argmax() -> None:
    x = torch.tensor([[-INF, 1.0, 1.0]])
    assert NORMALISERS["argmax"](x).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NORMALISERS["none"](torch.tensor([[200.0]])), "200 overflows as a reward"),
        (lambda: LooMean(acts_on="prob")(LOGW), "'prob'"),  # type: ignore[arg-type]
        (lambda: LooMean(floor=-3.0)(LOGW), "floor=-3.0"),
        (lambda: LooMean(acts_on="log w", floor=-INF)(LOGW), "floor must be finite"),
        (lambda: DivideByMean(acts_on="log w")(LOGW), "acts on w"),
        (lambda: NORMALISERS["metropolis"](LOGW), "needs uniforms"),
        (lambda: metropolis(LOGW, UNIFORMS[:, :2]), "uniforms must have the shape"),
        (lambda: metropolis(LOGW, UNIFORMS + 1), r"in \[0, 1\)"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_metropolis_walks_as_by_hand() -> None:
    # w = .5, 2, 0, 1: 2/.5 > .3 accept; 0 never; 1/2 against u = .6 refuse, u = .4 accept.
    chain = metropolis(LOGW, UNIFORMS)
    assert chain.occupancy.tolist() == [[0.25, 0.75, 0.0, 0.0]]
    assert chain.last.tolist() == [1]
    assert chain.accepted.tolist() == [[False, True, False, False]]
    assert acceptance_rate(chain, torch.ones(1, 4, dtype=torch.bool)).item() == pytest.approx(1 / 3)
    chain = metropolis(LOGW, torch.tensor([[0.9, 0.3, 0.1, 0.4]]))
    assert chain.occupancy.tolist() == [[0.25, 0.5, 0.0, 0.25]]
    assert chain.last.tolist() == [3]


def test_metropolis_leaves_a_start_without_weight() -> None:
    chain = metropolis(torch.tensor([[-INF, -INF, -4.0]]), torch.full((1, 3), 0.999))
    assert chain.last.tolist() == [2]
    assert chain.occupancy.tolist() == [[0.0, 0.0, 1.0]]
    assert metropolis(torch.full((1, 3), -INF), torch.zeros(1, 3)).last.tolist() == [-1]


def test_metropolis_leaves_the_posterior_invariant() -> None:
    # Exactly, on a grid of uniforms fine enough that every acceptance probability is a multiple of 1/grid.
    q = np.array([0.5, 0.25, 0.25])
    target = np.array([0.25, 0.25, 0.5])
    w = target / q  # 1/2, 1, 2: acceptance probabilities are multiples of 1/4
    grid = (torch.arange(4) + 0.5) / 4
    after = np.zeros(3)
    for start, first, second in itertools.product(range(3), repeat=3):
        u1, u2 = torch.meshgrid(grid, grid, indexing="ij")
        uniforms = torch.stack([torch.zeros(16), u1.flatten(), u2.flatten()], 1)
        states = torch.tensor([start, first, second])
        logw = torch.tensor(np.log(w))[states].expand(16, 3)
        last = states[metropolis(logw, uniforms).last]
        probability = target[start] * q[first] * q[second]
        after += probability * np.bincount(last, minlength=3) / 16
    np.testing.assert_allclose(after, target, atol=1e-12)
