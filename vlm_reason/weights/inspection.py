"""What a posterior on disk is: numbers for a person, without a model."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .artefact import Tree
from .families.last_layer import HEAD, LastLayer
from .posterior import Posterior
from .settings import QUANTILES

DRAWS = 32
_MOST = 1_000_000


def inspect(folder: str | Path) -> dict[str, Any]:
    """family, base (hash), its model (name) and dtype, data_size N, ess lambda, temperature N / lambda, temper,
    output_temperature, updates; sizes; prior (precisions and how many tensors have each); kl_to_prior in nats, None
    where there is none in closed form; quantiles over the uncertain weights of sigma and sigma / |mean| (`sigma_from`:
    the diagonal of the covariance, or the standard deviation of 32 draws where the family does not give it); tensors
    (shape and median sigma of each, a last layer's among them as `head`).

    UserError as `Posterior.load`.
    """
    posterior = Posterior.load(folder)
    origin, mean, uncertain = posterior.origin, posterior.mean(), posterior.uncertain()
    if isinstance(posterior, LastLayer):
        mean[HEAD] = posterior.head.mean.detach()
    sigma, source = _sigma(posterior, uncertain)
    size, ess = origin.data_size, origin.ess
    return {
        "folder": str(folder),
        "family": posterior.family,
        "base": origin.base,
        "model": origin.model,
        "dtype": origin.dtype,
        "data_size": size,
        "ess": ess,
        "temperature": size / ess if size and ess else None,
        "temper": origin.temper,
        "output_temperature": origin.output_temperature,
        "updates": origin.updates,
        "weights": sum(v.numel() for v in mean.values()),
        "uncertain_weights": sum(mean[k].numel() for k in uncertain),
        "kl_to_prior": _kl(posterior),
        "sigma_from": source,
        "prior": [{"value": v, "tensors": n} for v, n in sorted(Counter(origin.prior.values()).items())],
        "quantiles": _quantiles(mean, sigma),
        "tensors": {
            k: {"shape": list(v.shape), "sigma": float(sigma[k].median()) if k in sigma else 0.0}
            for k, v in mean.items()
        },
    }


def _kl(posterior: Posterior) -> float | None:
    try:
        found = posterior.kl()
    except UserError:
        return None
    return found if math.isfinite(found) else None


def _sigma(posterior: Posterior, uncertain: list[str]) -> tuple[Tree, str | None]:
    if not uncertain:
        return {}, None
    if isinstance(posterior, LastLayer):
        head = posterior.head
        return {HEAD: head.covariance.diagonal().detach().sqrt().expand_as(head.mean)}, "covariance"
    try:
        precision = posterior.precision_diag()
    except UserError:
        return _spread(posterior, uncertain), "draws"
    return {k: precision[k].rsqrt() for k in uncertain}, "covariance"


def _spread(posterior: Posterior, uncertain: list[str]) -> Tree:
    """Standard deviation of draws, in one pass (Welford 1962)."""
    mean = {k: torch.zeros(()) for k in uncertain}
    squares = {k: torch.zeros(()) for k in uncertain}
    for n, tree in enumerate(posterior.sample(DRAWS, seed=0), start=1):
        for k in uncertain:
            apart = tree[k].double() - mean[k]
            mean[k] = mean[k] + apart / n
            squares[k] = squares[k] + apart * (tree[k].double() - mean[k])
    return {k: (v / (DRAWS - 1)).sqrt().float() for k, v in squares.items()}


def _quantiles(mean: Tree, sigma: Tree) -> dict[str, list[float]] | None:
    if not sigma:
        return None
    noise = torch.cat([v.reshape(-1) for v in sigma.values()])
    weight = torch.cat([mean[k].reshape(-1) for k in sigma]).abs()
    stride = max(1, noise.numel() // _MOST)
    noise, weight = noise[::stride].double(), weight[::stride].double()
    at = torch.tensor(QUANTILES, dtype=torch.float64)

    def of(values: Tensor) -> list[float]:
        return torch.quantile(values, at).tolist()

    return {"at": list(QUANTILES), "sigma": of(noise), "noise_to_weight": of(noise / weight.clamp_min(1e-30))}
