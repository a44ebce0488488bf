"""From outputs f to a `Predictive`, likelihood by likelihood; from draws of f, or from f ~ N(m, V).

Choice         p = mean_s softmax(f_s / T)
BradleyTerry   p = mean_s sigmoid(f_s / T), as the two classes preferred, rejected
Regression     mean_s f_s and noise^2 + var_s f_s; entropies of Gaussians with these variances
Tokens         log mean_s exp(f_s), f_s = log p of the sequence under draw s
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import UserError
from ..examples import Batch
from ..likelihoods import BradleyTerry, Likelihood, Regression, Tokens
from ..noise import Draw, signed_draws
from .result import Predictive, entropy, from_logits

DRAWS_OF_OUTPUTS = 4096
OUTPUTS = 16
"""Stream of the normals that outputs are drawn with."""
_ROWS = 64


def of_draws(
    likelihood: Likelihood,
    f: Tensor,
    batch: Batch,
    mode: str,
    temperature: float = 1.0,
    mean_f: Tensor | None = None,
    keep: bool = False,
) -> Predictive:
    """f [S, B, C]; mean_f [B, C]: outputs of the mean weights, if they are known. Only `batch.target` is read."""
    f = _tempered(likelihood, f.double(), temperature)
    mean_f = None if mean_f is None else _tempered(likelihood, mean_f.double(), temperature)
    logp = (likelihood.log_prob(f, batch)).double().logsumexp(0) - math.log(len(f))
    kept = f.float() if keep else None
    if isinstance(likelihood, Regression):
        found = _gaussian(
            batch.ids, f[..., 0].mean(0), f[..., 0].var(0, correction=0), likelihood.noise, mode
        )
    elif isinstance(likelihood, Tokens):
        found = _sequence(batch.ids, f, mode)
    else:
        before = None if mean_f is None else _logits(likelihood, mean_f).softmax(-1)
        found = from_logits(batch.ids, _logits(likelihood, f), mode, before)
        found = replace(found, logit_variance=f.var(0, correction=0))
    return replace(found, n=len(f), log_prob=logp, logits=kept)


def of_gaussian(
    likelihood: Likelihood,
    m: Tensor,
    v: Tensor,
    batch: Batch,
    mode: str,
    link: str,
    n: int,
    seed: int = 0,
    temperature: float = 1.0,
    keep: bool = False,
) -> Predictive:
    """m [B, C], v [B, C, C]. Regression is exact; classes by draws of f, or with their probabilities by the probit.

    UserError for Tokens."""
    refuse_sequences(likelihood, mode)
    m, v = _tempered(likelihood, m.double(), temperature), v.double() / temperature**2
    spread = v.diagonal(dim1=-2, dim2=-1)
    if isinstance(likelihood, Regression):
        found = _gaussian(batch.ids, m[:, 0], spread[:, 0], likelihood.noise, mode)
        sigma2 = spread[:, 0] + likelihood.noise**2
        z2 = (batch.target.to(m) - m[:, 0]).square() / sigma2
        logp = -0.5 * (z2 + (2 * math.pi * sigma2).log())
        kept = draws_of_outputs(m, v, n, seed).float() if keep else None
        return replace(found, n=n, log_prob=logp, logits=kept)
    parts = []
    for rows in torch.arange(len(m)).split(_ROWS):
        index = rows.tolist()
        f = draws_of_outputs(m[rows], v[rows], DRAWS_OF_OUTPUTS, seed)
        part = of_draws(likelihood, f, only(batch, index), mode, 1.0, m[rows])
        if link == "probit":
            part = _probit(likelihood, part, m[rows], spread[rows], only(batch, index))
        kept = f[:n].float() if keep else None
        parts.append(replace(part, logit_variance=spread[rows], logits=kept))
    return joined(parts)


def refuse_sequences(likelihood: Likelihood, mode: str) -> None:
    """UserError for Tokens: exp of a Gaussian log-probability is no probability."""
    if isinstance(likelihood, Tokens):
        raise UserError(
            f"mode {mode!r} is for logits and means; the log-probability of a sequence is no Gaussian: use batched"
        )


def draws_of_outputs(m: Tensor, v: Tensor, n: int, seed: int) -> Tensor:
    """[n, B, C]: m + L eps_k with L L^T = V and the same eps_k [C] for every example, in pairs +-; fp64. Normals depend
    on (seed, k) alone."""
    values, vectors = torch.linalg.eigh(v)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return m + torch.einsum("bcd,kd->kbc", root, _pairs(seed, n, m.shape[-1]).to(root))


@lru_cache(maxsize=4)
def _pairs(seed: int, n: int, size: int) -> Tensor:
    cpu = torch.device("cpu")
    signed = signed_draws(n, antithetic=True)
    return torch.stack([sign * Draw(seed, OUTPUTS, 0, k).normal(0, size, cpu) for k, sign in signed])


def _logits(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Classes of `f`. UserError for a likelihood this file does not know that has one output."""
    if isinstance(likelihood, BradleyTerry):
        return torch.cat([f, torch.zeros_like(f)], -1)
    if f.shape[-1] < 2:
        raise UserError(
            f"no predictive for a {type(likelihood).__name__} with one output: classes are at least two"
        )
    return f


def _tempered(likelihood: Likelihood, f: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return f
    if isinstance(likelihood, Regression | Tokens):
        raise UserError(
            f"the posterior has output temperature {temperature}, which {type(likelihood).__name__} has no logits for"
        )
    return f / temperature


def _gaussian(ids: tuple[str, ...], mean: Tensor, spread: Tensor, noise: float, mode: str) -> Predictive:
    noise2 = torch.full_like(mean, noise**2)
    total, expected = (0.5 * (2 * math.pi * math.e * x).log() for x in (noise2 + spread, noise2))
    empty = mean.new_zeros(len(mean), 0)
    return Predictive(
        ids=ids, probs=empty, total_entropy=total, expected_entropy=expected, mutual_information=total - expected,
        variation_ratio=torch.full_like(mean, torch.nan), logit_variance=spread[:, None], n=1, mode=mode, mean=mean,
        variance=noise2 + spread,
    )  # fmt: skip


def _sequence(ids: tuple[str, ...], f: Tensor, mode: str) -> Predictive:
    unknown = f.new_full((f.shape[1],), torch.nan)
    return Predictive(
        ids=ids, probs=f.new_zeros(f.shape[1], 0), total_entropy=unknown, expected_entropy=unknown,
        mutual_information=unknown, variation_ratio=unknown, logit_variance=f.var(0, correction=0), n=len(f), mode=mode,
    )  # fmt: skip


def _probit(
    likelihood: Likelihood, by_draws: Predictive, m: Tensor, spread: Tensor, batch: Batch
) -> Predictive:
    """Probabilities and total entropy by the probit; the expected entropy stays that of the draws."""
    flat = m / (1 + math.pi / 8 * spread).sqrt()
    logp = _logits(likelihood, flat).log_softmax(-1)
    total = entropy(logp.exp())
    return replace(
        by_draws, probs=logp.exp(), total_entropy=total, log_prob=likelihood.log_prob(flat, batch).double(),
        mutual_information=(total - by_draws.expected_entropy).clamp_min(0),
    )  # fmt: skip


def only(batch: Batch, index: Sequence[int]) -> Batch:
    """The rows without their tokens: names and targets."""
    at = torch.tensor(index)
    names = tuple(batch.ids[i] for i in index)
    return Batch(names, batch.input_ids[at, :0], batch.last[at], batch.target[at])


def joined(parts: Sequence[Predictive]) -> Predictive:
    """Rows of several, one after the other."""
    changes: dict[str, object] = {"ids": tuple(i for p in parts for i in p.ids)}
    for f in fields(Predictive):
        if isinstance(getattr(parts[0], f.name), Tensor):
            changes[f.name] = torch.cat([getattr(p, f.name) for p in parts], 1 if f.name == "logits" else 0)
    return replace(parts[0], **changes)  # type: ignore[arg-type]


def taken(result: Predictive, order: Sequence[int]) -> Predictive:
    """Rows `order` of `result`."""
    index = torch.tensor(order)
    changes: dict[str, object] = {"ids": tuple(result.ids[i] for i in order)}
    for f in fields(Predictive):
        value = getattr(result, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = value[:, index] if f.name == "logits" else value[index]
    return replace(result, **changes)  # type: ignore[arg-type]
