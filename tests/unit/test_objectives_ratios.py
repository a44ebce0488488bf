"""Stabilisers of the log ratio: their formulas, what they do with -inf, and that the ESS floor holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_reason.errors import UserError
from vlm_reason.objectives import RATIOS, Clip, EssFloor, psis_smooth, ratio_named

INF = math.inf
RATIO = torch.tensor([[2.0, -6.0, -INF, 0.5]])
ZERO = torch.zeros(1, 4)
LENGTH = torch.tensor([[4, 9, 5, 0]])


def test_names() -> None:
    assert list(RATIOS) == ["none", "per_token", "sqrt", "clip", "psis", "ess_floor", "zero"]
    with pytest.raises(UserError, match="'per_tokne'; did you mean 'per_token'"):
        ratio_named("per_tokne")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", [2.0, -6.0, -INF, 0.5]),
        ("zero", [0.0, 0.0, 0.0, 0.0]),
        ("per_token", [0.5, -6 / 9, -INF, 0.5]),
        ("sqrt", [1.0, -2.0, -INF, 0.5]),
        ("clip", [0.0, -6.0, -INF, 0.0]),
    ],
)
def test_formula(name: str, expected: list[float]) -> None:
    assert ratio_named(name)(RATIO, ZERO, LENGTH)[0].tolist() == pytest.approx(expected)


def test_clip_bounds() -> None:
    assert Clip(-1.0, 1.0)(RATIO, ZERO, LENGTH).tolist() == [[1.0, -1.0, -INF, 0.5]]
    with pytest.raises(UserError, match="low=2.0, high=1.0"):
        Clip(2.0, 1.0)


@pytest.mark.parametrize("name", [n for n in RATIOS if n != "psis"])
def test_masked_entries_are_never_read_nor_weighted(name: str) -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    junk = torch.tensor([[math.nan]])
    padded = [torch.cat([t, junk], 1) for t in (RATIO, ZERO)]
    value = RATIOS[name](padded[0], padded[1], torch.cat([LENGTH, torch.tensor([[3]])], 1), mask)
    assert torch.equal(value[:, :4], RATIOS[name](RATIO, ZERO, LENGTH))
    assert value[0, 4] == -INF


def test_psis_smooths_the_ratio_and_refuses_small_groups() -> None:
    ratio = torch.randn(2, 200) * 2
    zero, length = torch.zeros(2, 200), torch.ones(2, 200)
    assert torch.equal(RATIOS["psis"](ratio, zero, length), psis_smooth(ratio))
    with pytest.raises(UserError, match="at least 25 traces a group, got K=4"):
        RATIOS["psis"](RATIO, ZERO, LENGTH)


def fraction(ratio: torch.Tensor, evidence: torch.Tensor, alpha: float) -> float:
    """ESS over the number of draws with weight, in numpy."""
    r, e = ratio.numpy(), evidence.numpy()
    alive = np.isfinite(r) & np.isfinite(e)
    logw = e[alive] + alpha * r[alive]
    w = np.exp(logw - logw.max())
    return w.sum() ** 2 / (w**2).sum() / alive.sum()


@given(
    st.lists(st.one_of(st.floats(-30, 30), st.just(-INF)), min_size=4, max_size=8),
    st.lists(st.sampled_from([0.0, 0.0, -1.0, -INF]), min_size=8, max_size=8),
    st.sampled_from([0.2, 0.5, 0.9]),
)
def test_ess_floor_holds_whenever_it_can(row: list[float], evidence: list[float], floor: float) -> None:
    ratio = torch.tensor([row], dtype=torch.float64)
    e = torch.tensor([evidence[: len(row)]], dtype=torch.float64)
    alpha = EssFloor(floor).alpha(ratio, e).item()
    assert 0 <= alpha <= 1
    if not bool((ratio.isfinite() & e.isfinite()).any()):
        assert alpha == 1
    elif fraction(ratio[0], e[0], 0.0) >= floor:
        assert fraction(ratio[0], e[0], alpha) >= floor - 1e-5
    elif fraction(ratio[0], e[0], 1.0) < floor:
        assert alpha == 0


def test_ess_floor_of_two_draws_in_closed_form() -> None:
    # ESS of weights (1, t) is (1 + t)^2 / (1 + t^2) = 2 f; at f = 0.8, t = 0.5.
    ratio = torch.tensor([[0.0, -4.0], [0.0, -0.1]], dtype=torch.float64)
    stabilise = EssFloor(0.9, steps=40)
    t = (1 - math.sqrt(1 - 0.8**2)) / 0.8  # (1+t)^2 / (1+t^2) = 1.8
    assert stabilise.alpha(ratio, ratio * 0).tolist() == pytest.approx([math.log(1 / t) / 4, 1.0], abs=1e-5)
    value = stabilise(ratio, ratio * 0, ratio * 0 + 1)
    assert value[0].tolist() == pytest.approx([0.0, math.log(t)], abs=1e-5)
    assert value[1].tolist() == [0.0, -0.1]


def test_wrong_traces_do_not_drive_alpha_down() -> None:
    ratio = torch.tensor([[0.3, 0.2, -5.0, -9.0]])
    evidence = torch.tensor([[0.0, 0.0, -INF, -INF]])
    assert EssFloor(0.9).alpha(ratio, evidence).item() == 1.0


def test_batch_scope_shares_one_exponent() -> None:
    ratio = torch.tensor([[0.0, -8.0], [0.0, -0.5], [-INF, -INF]], dtype=torch.float64)
    alpha = EssFloor(0.8, scope="batch").alpha(ratio, ratio.new_zeros(3, 2))
    assert alpha[0] == alpha[1] and 0 < alpha[0] < 1
    shares = [fraction(row, torch.zeros(2), alpha[0].item()) for row in ratio[:2]]
    assert sum(shares) / 2 == pytest.approx(0.8, abs=1e-4)
