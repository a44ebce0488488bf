"""Which groups carry no signal, and what the pure policies do with them."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_reason.errors import UserError
from vlm_reason.objectives import apply_null_policy, group_scale, null_groups, null_rate
from vlm_reason.types import Coefficients

INF = math.inf
LOGW = torch.tensor([[0.0, -INF], [-INF, -INF], [0.0, 0.0], [-2.0, -2.0], [-1.0, -2.0]])


def test_which_groups_are_null() -> None:
    assert null_groups(LOGW).tolist() == [False, True, False, False, False]
    assert null_groups(LOGW, kind="all_equal").tolist() == [False, True, True, True, False]
    with pytest.raises(UserError, match="'some'"):
        null_groups(LOGW, kind="some")  # type: ignore[arg-type]


def test_masked_draws_do_not_make_or_break_a_null_group() -> None:
    x = torch.tensor([[-INF, 5.0], [1.0, 1.0], [1.0, 9.0], [3.0, 3.0]])
    mask = torch.tensor([[True, False], [True, True], [True, False], [False, False]])
    assert null_groups(x, mask).tolist() == [True, False, False, True]
    assert null_groups(x, mask, "all_equal").tolist() == [True, True, True, True]


def test_policies() -> None:
    null = torch.tensor([False, True, False, True])
    assert null_rate(null) == 0.5
    assert group_scale(null, "skip").tolist() == [1.0, 0.0, 1.0, 0.0]
    assert group_scale(null, "renormalise").tolist() == [2.0, 0.0, 2.0, 0.0]
    everything = torch.ones(3, dtype=torch.bool)
    assert group_scale(everything, "renormalise").tolist() == [0.0, 0.0, 0.0]
    assert null_rate(torch.zeros(0, dtype=torch.bool)) == 0.0
    with pytest.raises(UserError, match="'hint_retry'"):
        group_scale(null, "hint_retry")  # type: ignore[arg-type]


def test_renormalised_loss_is_the_mean_over_the_groups_that_count() -> None:
    null = torch.tensor([False, True, False])
    c = Coefficients(c_z=torch.ones(3, 2), c_y=torch.ones(3, 2, 1), c_q=torch.ones(3, 2, 5))
    result = apply_null_policy(c, null, "renormalise")
    assert result.c_z is not None and result.c_y is not None and result.c_q is not None
    assert result.c_z.sum() / 3 == pytest.approx(2.0)  # 2 traces a group, mean over 2 groups of 3
    assert torch.equal(result.c_y[..., 0], result.c_z) and torch.equal(result.c_q[..., 0], result.c_z)
    assert torch.equal(result.null, null)
