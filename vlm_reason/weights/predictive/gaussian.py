"""Outputs that are Gaussian: linearised in the weights, or exactly so (Bayesian last layers).

f ~ N(f(x; m), J Sigma J^T),   J = df/dtheta at m          (Khan et al. 2019; Immer, Korzepa and Bauer 2021)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor

from ..artefact import Tree
from ..jacobians import jacobians
from ..likelihoods import Likelihood
from .rows import Rows

if TYPE_CHECKING:
    from ..posterior import Posterior


def has_closed_form(posterior: Posterior) -> bool:
    return _overrides(posterior, "closed_form")


def has_covariance(posterior: Posterior) -> bool:
    return _overrides(posterior, "output_covariance")


def _overrides(posterior: Posterior, method: str) -> bool:
    from ..posterior import Posterior

    return getattr(type(posterior), method) is not getattr(Posterior, method)


def closed_form(
    posterior: Posterior, model: PeftModel, rows: Rows, likelihood: Likelihood, adapter: str, tokens: int
) -> tuple[Tensor, Tensor]:
    """m [N, C] and V [N, C, C] as the family has them."""
    device = next(model.parameters()).device
    found = []
    order: list[int] = []
    for numbers, batch in rows.batches(range(len(rows)), tokens):
        m, v = posterior.closed_form(model, batch.to(device), likelihood, adapter)
        found.append((m.double().cpu(), v.double().cpu()))
        order += numbers
    back = torch.tensor(order).argsort()
    return torch.cat([m for m, _ in found])[back], torch.cat([v for _, v in found])[back]


def linearised(
    posterior: Posterior,
    model: PeftModel,
    rows: Rows,
    likelihood: Likelihood,
    adapter: str,
    tokens: int,
    memory: int,
    draws: list[Tree] | None,
) -> tuple[Tensor, Tensor]:
    """The adapter holds the mean. (f at the mean [N, C], J Sigma J^T [N, C, C]); with `draws`, and for families without
    a covariance, (f at the mean, f + J (theta_s - mean) [S, N, C])."""
    device = next(model.parameters()).device
    mean, keys = posterior.mean(), posterior.uncertain()
    means, spreads = [], []
    order: list[int] = []
    with torch.no_grad():
        outputs = likelihood.outputs(model, rows.batch.rows([0]).to(device)).shape[-1]
    size = 4 * outputs * sum(mean[key].numel() for key in keys)
    most = max(1, memory // (2 * size))  # while they are stacked there are two of them
    for numbers, batch in rows.batches(range(len(rows)), tokens, most):
        f, jacobian = jacobians(model, batch.to(device), likelihood, keys, adapter)
        jacobian = {key: value.cpu() for key, value in jacobian.items()}
        f = f.double().cpu()
        means.append(f)
        if draws is None:
            spreads.append(posterior.output_covariance(jacobian).double())
        else:
            spreads.append(torch.stack([f + _along(jacobian, mean, draw) for draw in draws]))
        order += numbers
    back = torch.tensor(order).argsort()
    axis = 0 if draws is None else 1
    return torch.cat(means)[back], torch.cat(spreads, axis).index_select(axis, back)


def _along(jacobian: Mapping[str, Tensor], mean: Tree, draw: Tree) -> Tensor:
    """J (theta - mean) [B, C], fp64."""
    parts = [
        j.flatten(2).double() @ (draw[key].double() - mean[key]).flatten() for key, j in jacobian.items()
    ]
    return torch.stack(parts).sum(0)
