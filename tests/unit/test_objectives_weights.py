"""Weights and leave-one-out baselines against loops in numpy, and their edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_reason.errors import UserError
from vlm_reason.objectives import (
    effective_sample_size,
    forward_chi2_weights,
    iwae_score_weights,
    leave_one_out_log_mean_exp,
    leave_one_out_mean,
    max_weight,
    self_normalised,
    vimco_baseline,
    vimco_signal,
    weight_length_correlation,
)

INF = math.inf
rows = st.lists(st.one_of(st.floats(-60, 60), st.just(-INF)), min_size=1, max_size=6)


def tensor(row: list[float]) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.float64)


def others(row: list[float], k: int) -> np.ndarray:
    return np.delete(np.array(row, dtype=float), k)


@given(rows)
def test_normalised_weights(row: list[float]) -> None:
    w = np.exp(np.array(row) - max(max(row), -1e300)) if max(row) > -INF else np.zeros(len(row))
    expected = w / w.sum() if w.sum() else w
    squared = w**2 / (w**2).sum() if w.sum() else w
    np.testing.assert_allclose(self_normalised(tensor(row))[0], expected, atol=1e-12)
    np.testing.assert_allclose(forward_chi2_weights(tensor(row))[0], squared, atol=1e-12)
    np.testing.assert_allclose(max_weight(tensor(row))[0], expected.max(), atol=1e-12)
    ess = 1 / (expected**2).sum() if w.sum() else 0.0
    np.testing.assert_allclose(effective_sample_size(tensor(row))[0], ess, rtol=1e-10)


@given(rows)
def test_leave_one_out_log_mean_exp(row: list[float]) -> None:
    with np.errstate(divide="ignore"):
        expected = [
            np.logaddexp.reduce(others(row, k)) - np.log(len(row) - 1) if len(row) > 1 else 0.0
            for k in range(len(row))
        ]
    np.testing.assert_allclose(leave_one_out_log_mean_exp(tensor(row))[0], expected, atol=1e-10)
    usable = [0.0 if b == -INF else b for b in expected]
    np.testing.assert_allclose(vimco_baseline(tensor(row))[0], usable, atol=1e-10)


def test_leave_one_out_survives_a_dominant_weight() -> None:
    # log(e^200 + 2 - e^200) computed by subtraction is lost even in fp64.
    baseline = leave_one_out_log_mean_exp(tensor([200.0, 0.0, 0.0]))
    np.testing.assert_allclose(baseline[0], [0.0, 200 - math.log(2), 200 - math.log(2)], atol=1e-12)


def test_leave_one_out_mean() -> None:
    np.testing.assert_allclose(leave_one_out_mean(tensor([1.0, 2.0, 6.0]))[0], [4.0, 3.5, 1.5])
    mask = torch.tensor([[True, False, True]])
    np.testing.assert_allclose(leave_one_out_mean(tensor([1.0, INF, 6.0]), mask)[0], [6.0, 0.0, 1.0])
    assert leave_one_out_mean(tensor([5.0])).item() == 0.0
    with pytest.raises(UserError, match=r"values\[0, 1\] is -inf"):
        leave_one_out_mean(tensor([1.0, -INF]))


def test_geometric_stand_in_is_that_of_the_paper() -> None:
    row = [0.3, -1.2, 2.0]
    w = np.exp(row)
    expected = [np.log((np.delete(w, k).sum() + np.exp(others(row, k).mean())) / 3) for k in range(3)]
    np.testing.assert_allclose(vimco_baseline(tensor(row), stand_in="geometric")[0], expected, atol=1e-12)
    # With a weight 0 among the others the geometric mean is 0.
    value = vimco_baseline(tensor([0.0, 0.0, -INF]), stand_in="geometric")
    np.testing.assert_allclose(value[0], [math.log(1 / 3), math.log(1 / 3), math.log(1.0)], atol=1e-12)
    with pytest.raises(UserError, match="'median'"):
        vimco_baseline(tensor(row), stand_in="median")  # type: ignore[arg-type]


@given(rows)
def test_baseline_does_not_depend_on_its_own_draw(row: list[float]) -> None:
    for stand_in in ("arithmetic", "geometric"):
        changed = [row[0] + 1.5 if row[0] > -INF else 0.7, *row[1:]]
        before = vimco_baseline(tensor(row), stand_in=stand_in)[0, 0]
        after = vimco_baseline(tensor(changed), stand_in=stand_in)[0, 0]
        assert before.item() == pytest.approx(after.item(), abs=1e-10)


@given(rows)
def test_signals_are_finite_and_masked_entries_do_not_matter(row: list[float]) -> None:
    padded = torch.cat([torch.tensor([[math.nan]]), tensor(row), torch.tensor([[INF]])], 1)
    mask = torch.tensor([[False] + [True] * len(row) + [False]])
    for function in (self_normalised, vimco_baseline, vimco_signal, iwae_score_weights, forward_chi2_weights):
        plain, masked = function(tensor(row)), function(padded, mask)
        assert plain.isfinite().all()
        assert masked[0, 0] == 0 and masked[0, -1] == 0
        np.testing.assert_allclose(masked[:, 1:-1], plain, atol=1e-10)


@given(rows, st.floats(-40, 40))
def test_weights_ignore_a_constant(row: list[float], shift: float) -> None:
    for function in (self_normalised, forward_chi2_weights, effective_sample_size):
        np.testing.assert_allclose(function(tensor(row) + shift), function(tensor(row)), atol=1e-9)
    if sum(v > -INF for v in row) >= 2:  # else a baseline is 0, which does not shift along
        np.testing.assert_allclose(vimco_signal(tensor(row) + shift), vimco_signal(tensor(row)), atol=1e-8)


def test_long_traces_keep_their_digits_in_fp32() -> None:
    # Log weights of traces of thousands of tokens, exact in fp32: nothing may be lost to their common size.
    row, size = [0.25, -1.5, 0.75], -4096.0
    for function in (self_normalised, vimco_signal, effective_sample_size):
        far = function(torch.tensor([row]) + size)
        np.testing.assert_allclose(far, function(tensor(row)), rtol=3e-6)
    lone = vimco_signal(torch.tensor([[size, -INF]]))
    np.testing.assert_allclose(lone[0], [size - math.log(2), -math.log(2)], rtol=1e-6)


def test_null_and_empty_groups_get_zeros() -> None:
    null, empty = torch.full((1, 3), -INF), torch.zeros(1, 3, dtype=torch.bool)
    for function in (self_normalised, forward_chi2_weights, vimco_baseline, vimco_signal, iwae_score_weights):
        assert function(null).tolist() == [[0.0] * 3]
        assert function(torch.zeros(1, 3), empty).tolist() == [[0.0] * 3]
    for function in (effective_sample_size, max_weight):
        assert function(null).tolist() == [0.0]
        assert function(torch.zeros(1, 3), empty).tolist() == [0.0]


def test_effective_sample_size_of_known_groups() -> None:
    x = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [0.0, -INF, -INF, -INF], [0.0, 0.0, -INF, -INF], [900.0, 0.0, 0.0, 0.0]]
    )
    assert effective_sample_size(x).tolist() == pytest.approx([4.0, 1.0, 2.0, 1.0], rel=1e-6)


def test_weights_are_detached() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    assert not self_normalised(x).requires_grad
    assert not iwae_score_weights(x).requires_grad


def test_weight_length_correlation() -> None:
    logw = torch.log(torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])).double()
    length = torch.tensor([[30, 20, 10], [10, 20, 30], [7, 7, 7]])
    value = weight_length_correlation(logw, length)
    expected = np.corrcoef([1, 2, 4], [30, 20, 10])[0, 1]
    np.testing.assert_allclose(value, [expected, 0.0, 0.0], atol=1e-12)
    padded = torch.cat([logw, torch.full((3, 1), 50.0)], 1)
    mask = torch.tensor([[True, True, True, False]] * 3)
    lengths = torch.cat([length, torch.full((3, 1), 999)], 1)
    np.testing.assert_allclose(weight_length_correlation(padded, lengths, mask), value, atol=1e-12)
    with pytest.raises(UserError, match="length must have the shape"):
        weight_length_correlation(logw, length[:, :2])
