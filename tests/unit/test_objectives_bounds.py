"""Bounds against numpy, their order, their edge cases, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.objectives import cubo, elbo, eubo, iwae, log_weights, renyi

INF = math.inf
ROW = [0.3, -1.2, 2.0, 0.0]
W = np.exp(ROW)

BOUNDS = {
    "elbo": elbo,
    "iwae": iwae,
    "cubo": cubo,
    "eubo": eubo,
    "renyi_half": lambda logw, mask=None: renyi(logw, 0.5, mask),
    "renyi_near_1": lambda logw, mask=None: renyi(logw, 1.0001, mask),
    "renyi_2": lambda logw, mask=None: renyi(logw, 2.0, mask),
    "renyi_upper": lambda logw, mask=None: renyi(logw, -1.5, mask),
}

log_weight = st.one_of(st.floats(-80, 80, width=32), st.just(-INF))
rows = st.lists(log_weight, min_size=1, max_size=6)


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("elbo", np.mean(ROW)),
        ("iwae", np.log(W.mean())),
        ("cubo", 0.5 * np.log((W**2).mean())),
        ("eubo", np.mean(ROW)),
        ("renyi_half", 2 * np.log((W**0.5).mean())),
        ("renyi_near_1", np.log((W**-0.0001).mean()) / -0.0001),
        ("renyi_2", -np.log((W**-1).mean())),
        ("renyi_upper", np.log((W**2.5).mean()) / 2.5),
    ],
)
def test_value(name: str, value: float) -> None:
    assert BOUNDS[name](double([ROW])).item() == pytest.approx(value, abs=1e-9)


def test_renyi_special_orders() -> None:
    x = double([ROW])
    assert torch.equal(renyi(x, 1.0), elbo(x))
    assert torch.allclose(renyi(x, 0.0), iwae(x), atol=1e-14)
    assert torch.allclose(renyi(x, -2.0), cubo(x, order=3), atol=1e-14)
    assert renyi(x, INF).item() == min(ROW)
    assert renyi(x, -INF).item() == max(ROW)


def test_renyi_keeps_its_digits_next_to_the_elbo_in_fp32() -> None:
    # To first order in 1 - alpha: mean + (1 - alpha) var / 2.
    x = torch.tensor([[100.3, 98.8, 102.0, 100.0]])
    for gap in (1e-3, 1e-5, -1e-5):
        expected = x.double().mean() + gap / 2 * x.double().var(correction=0)
        assert renyi(x, 1 - gap).item() == pytest.approx(expected.item(), abs=2e-5)


@given(rows)
def test_order_on_any_draws(row: list[float]) -> None:
    x = double([row])
    values = [renyi(x, a).item() for a in (INF, 2.0, 1.0, 0.5, 0.0, -1.0, -INF)]
    assert all(low <= high + 1e-9 for low, high in zip(values, values[1:], strict=False))


@given(rows)
def test_no_nan_in_value_or_gradient(row: list[float]) -> None:
    for bound in BOUNDS.values():
        x = torch.tensor([row, [-INF] * len(row)], requires_grad=True)
        value = bound(x)
        assert not value.isnan().any()
        value[value.isfinite()].sum().backward()
        assert x.grad is None or not x.grad.isnan().any()


@given(rows, st.floats(-50, 50, width=32), st.randoms(use_true_random=False))
def test_shift_permutation_and_padding(row: list[float], shift: float, random) -> None:
    x = double([row])
    shuffled = double([random.sample(row, len(row))])
    padded = torch.cat([x, double([[INF, math.nan, 3.0]])], 1)
    mask = torch.tensor([[True] * len(row) + [False] * 3])
    for bound in BOUNDS.values():
        value = bound(x)
        assert torch.allclose(bound(x + shift), value + shift, atol=1e-9)
        assert torch.allclose(bound(shuffled), value, atol=1e-9)
        assert torch.allclose(bound(padded, mask=mask), value, atol=1e-12)


def test_gradient_of_iwae_is_the_normalised_weight() -> None:
    x = double([[*ROW, -INF]]).requires_grad_()
    iwae(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad[0], [*(W / W.sum()), 0.0], atol=1e-15)


def test_a_draw_of_weight_zero_counts_in_k() -> None:
    x = double([[0.0, -INF, -INF, -INF]])
    assert iwae(x).item() == pytest.approx(math.log(1 / 4))
    assert cubo(x).item() == pytest.approx(0.5 * math.log(1 / 4))
    assert elbo(x).item() == -INF
    assert renyi(x, 1.5).item() == -INF
    assert eubo(x).item() == INF  # no posterior draw has weight 0


def test_null_and_empty_groups() -> None:
    null, nothing = torch.full((1, 3), -INF), torch.zeros(1, 3, dtype=torch.bool)
    for name, bound in BOUNDS.items():
        upper = name in ("cubo", "eubo", "renyi_upper")
        assert bound(torch.zeros(1, 3), mask=nothing).item() == (INF if upper else -INF)
        assert bound(null).item() == (INF if name == "eubo" else -INF)


def test_one_draw_makes_all_bounds_equal() -> None:
    for bound in BOUNDS.values():
        assert bound(double([[-3.25]])).item() == pytest.approx(-3.25, abs=1e-12)


def test_half_precision_is_reduced_in_fp32() -> None:
    x = torch.tensor([ROW], dtype=torch.bfloat16)
    assert iwae(x).dtype == torch.float32
    assert torch.equal(iwae(x), iwae(x.float()))


def test_log_weights() -> None:
    prior = torch.tensor([[-1.0, -2.0, -INF, -1.0]])
    evidence = torch.tensor([[-0.5, -INF, -INF, -1.0]])
    density = torch.tensor([[-3.0, -4.0, -2.0, -INF]])
    mask = torch.tensor([[True, True, True, False]])
    assert log_weights(prior, evidence, density, mask).tolist() == [[1.5, -INF, -INF, -INF]]
    with pytest.raises(UserError, match=r"logq\[0, 3\] is -inf"):
        log_weights(prior, evidence, density)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iwae(torch.zeros(3)), r"\[groups, K\].*\[3\]"),
        (lambda: iwae(torch.zeros(2, 0)), "K >= 1"),
        (lambda: iwae(torch.tensor([[0.0, math.nan]])), r"logw\[0, 1\] is nan"),
        (lambda: iwae(torch.tensor([[INF, 0.0]])), r"logw\[0, 0\] is inf"),
        (lambda: iwae(torch.zeros(2, 3), torch.ones(2, 3)), "mask must be bool"),
        (lambda: iwae(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool)), r"shape \[2, 3\]"),
        (lambda: cubo(torch.zeros(1, 2), order=0.5), "order of cubo.*0.5"),
        (lambda: renyi(torch.zeros(1, 2), math.nan), "alpha of renyi is nan"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
