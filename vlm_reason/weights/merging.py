"""One adapter for several tasks, each weight from the tasks that are sure of it.

    theta* = theta0 + sum_t alpha_t H^-1 P_t (theta_t - theta0),      H = H0 + delta0 + sum_t alpha_t H_t

P_t is the diagonal precision of task t's posterior, H_t = P_t less the precision of its prior: what its data said. With
alpha = 1 this is the mean, and H the precision, of the posterior given all tasks' data at once, exact for Gaussians
with diagonal curvature and one prior. (Daheim et al. 2024, "Model merging by uncertainty-based gradient matching",
arXiv 2310.12808.)

Of a posterior tempered by tau, P and H_t are tau times what they were. Where all were tempered by one tau, H0 and
delta0 are multiplied by it too: tempering before is tempering afterwards. Different tau weigh the tasks' data.

LoRA factors are only known up to a gauge, B A = (B R)(R^-1 A): averages of factors from different initial A are
averages of unlike things. `space="parameters"` is refused unless the tasks share one gauge; `space="delta"` merges
the updates s B A themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .adapter import same_keys
from .artefact import Tree
from .families.diagonal import DiagonalGaussian
from .posterior import Origin, Posterior

Space = Literal["parameters", "delta"]
SPACES: tuple[str, ...] = get_args(Space)
A, B = ".lora_A.weight", ".lora_B.weight"
SAME_INIT = 0.5
FLAT = 1e-12


@dataclass(frozen=True)
class MergeReport:
    """tasks: how many. space: what was averaged. alignment: the lowest cosine between two tasks' A of one layer, None
    without A. prior: lowest and highest delta0 of a tensor; None in delta space. kept: share of |merged update|^2 that
    rank r holds, by layer; empty in parameter space."""

    tasks: int
    space: str
    alignment: float | None
    prior: tuple[float, float] | None = None
    kept: Mapping[str, float] = field(default_factory=dict)


def merge(
    posteriors: Sequence[Posterior],
    base: Posterior | None = None,
    alphas: Sequence[float] | None = None,
    delta0: float | None = None,
    space: str = "parameters",
    same_init: bool = False,
    rank: int | None = None,
) -> tuple[DiagonalGaussian, MergeReport]:
    """The merged posterior (diagonal) and what was done.

    base    the posterior that was the tasks' prior, as it was then: theta0 its mean, H0 its precision. None: each
            task's own N(0, 1 / delta_t) as its origin has it, and theta0 = 0
    alphas  weight of each task, 1 by default
    delta0  prior precision of the result on top of H0; None: the mean of the tasks' own, tensor by tensor (0 with a
            base), at least 1e-12. Own priors that differ, as those of `ivon` do with N, are taken out first
    space   "parameters": the equation above, weight by weight. The tasks must share a gauge: for every layer the
            cosine between two tasks' A is at least 1/2 (different initial A: about 0), and no rotation raises it by
            more than a tenth
            "delta": with v_t the mean variance of an element of s_t B_t A_t under q_t,

                delta W* = sum_t w_t s_t B_t A_t,   w_t = alpha_t v* / v_t,   1 / v* = sum_t alpha_t / v_t

            a layer, cut to rank r by SVD (kept as factors, never dense). Point masses have equal v. The result's sigma
            is one number a layer, such that its mean variance is v*. Lost are: which weights a task is sure of (one
            number a layer remains), and the singular values beyond r (`kept`)
    same_init  you vouch that all began from one A and are in one gauge: no check
    rank    of the result, for "delta"; default that of the first

    Tensors other than LoRA factors (whole modules) are merged weight by weight in both.

    UserError for different base models, keys, shapes or output temperatures; different gauges; weights that are certain
    of different values; families without a diagonal precision. A point mass among uncertain posteriors is the result,
    whatever its alpha: a warning says so.

    When not to use it: where the data of all tasks can be trained on together. Precisions from a few examples, or of
    lambda far from N, weigh the tasks wrongly against one another.
    """
    weights = _checked(posteriors, alphas, delta0, space)
    if space == "delta":
        return _in_delta_space(posteriors, base, weights, delta0, rank)
    if rank is not None:
        raise UserError('merge: rank is for space="delta"; parameters keep theirs')
    members = [*posteriors, base] if base is not None else list(posteriors)
    means = [p.mean() for p in members]
    for number, mean in enumerate(means[1:], 1):
        _alike(means[0], mean, number)
    alignment = _checked_gauge(means, same_init)
    first = posteriors[0].adapter_config
    for p in members:
        if _scalings(p.adapter_config) != _scalings(first):
            raise UserError(
                f"merge: the adapters scale their updates differently, by {_scalings(first)} and "
                f'{_scalings(p.adapter_config)} (alpha, rank, rslora, patterns): give space="delta"'
            )
    mean, sigma = _weight_by_weight(posteriors, base, weights, delta0, list(means[0]))
    origin = _joint_origin(posteriors, base, delta0, sigma)
    priors = [_merged_prior(posteriors, base, delta0, key) for key in mean]
    report = MergeReport(len(posteriors), space, alignment, (min(priors), max(priors)))
    _warn_of_points(members, len(posteriors))
    return DiagonalGaussian(first, mean, sigma, origin), report


# ------------------------------------------------------------------------------------------------- weight by weight


def _weight_by_weight(
    posteriors: Sequence[Posterior],
    base: Posterior | None,
    weights: Sequence[float],
    delta0: float | None,
    keys: Sequence[str],
) -> tuple[Tree, Tree]:
    """(mean, sigma) of `keys`; no sigma for tensors that are certain."""
    means, precisions = [p.mean() for p in posteriors], [p.precision_diag() for p in posteriors]
    at0, known0 = (base.mean(), base.precision_diag()) if base is not None else ({}, {})
    mean: Tree = {}
    sigma: Tree = {}
    for key in keys:
        start = at0[key].double() if base is not None else torch.zeros_like(means[0][key]).double()
        h0 = known0[key].double() if base is not None else torch.zeros_like(start)
        total = _joint_temper(posteriors) * (h0 + _merged_prior(posteriors, base, delta0, key))
        pull = torch.zeros_like(start)
        for p, m, precision, alpha in zip(posteriors, means, precisions, weights, strict=True):
            own = precision[key].double()
            before = h0 if base is not None else p.origin.prior.get(key, 0.0)
            total = total + alpha * (own - p.origin.temper * before).clamp_min(0)
            pull = pull + alpha * own * (m[key].double() - start)
        value, spread = start + pull / total, total.rsqrt()
        ours = [(m[key], q[key]) for m, q in zip(means, precisions, strict=True)]
        if base is not None:
            ours.append((at0[key], known0[key]))
        value, spread = _with_certain(key, value, spread, ours)
        mean[key] = value.float()
        if bool((spread > 0).any()):
            sigma[key] = spread.float()
    return mean, sigma


def _with_certain(
    key: str, value: Tensor, spread: Tensor, members: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Elements that a member is certain of have its value."""
    fixed = torch.full_like(value, math.nan)
    for mean, precision in members:
        certain = precision.isinf()
        clash = certain & ~fixed.isnan() & (fixed != mean.double())
        if bool(clash.any()):
            raise UserError(
                f"merge: {int(clash.sum())} weights of {key!r} are certain in several posteriors, with different "
                "values: nothing says how to weigh them. Fit posteriors that have a variance there, or give "
                'space="delta"'
            )
        fixed = torch.where(certain, mean.double(), fixed)
    free = fixed.isnan()
    return torch.where(free, value, fixed), torch.where(free, spread, 0.0)


def _warn_of_points(members: Sequence[Posterior], tasks: int) -> None:
    """`members` are the tasks' posteriors, and behind them the base where there is one."""
    points = [n for n, p in enumerate(members) if not p.mean().keys() & set(p.uncertain())]
    if points and len(points) < len(members):
        name = f"posterior {points[0]}" if points[0] < tasks else "the base"
        warnings.warn(
            f"merge: {name} is certain of every weight and others are not: it outweighs them all and is the result. "
            "Put a posterior around it first (laplace, tfb), or merge points with points",
            stacklevel=3,
        )


def _merged_prior(
    posteriors: Sequence[Posterior], base: Posterior | None, delta0: float | None, key: str
) -> float:
    """delta0 of one tensor, not tempered."""
    if delta0 is not None:
        return delta0
    if base is not None:
        return 0.0
    found = [p.origin.prior.get(key, 0.0) for p in posteriors]
    return max(FLAT, sum(found) / len(found))


# ------------------------------------------------------------------------------------------------------ delta space


def _in_delta_space(
    posteriors: Sequence[Posterior],
    base: Posterior | None,
    weights: Sequence[float],
    delta0: float | None,
    rank: int | None,
) -> tuple[DiagonalGaussian, MergeReport]:
    if base is not None:
        raise UserError('merge: space="delta" has no base: the updates are summed as they are')
    trees = [p.mean() for p in posteriors]
    variances = [{k: v.double().reciprocal() for k, v in p.precision_diag().items()} for p in posteriors]
    layers = sorted(key.removesuffix(A) for key in trees[0] if key.endswith(A))
    factors = {name + end for name in layers for end in (A, B)}
    odd = sorted(key for tree in trees for key in tree if "lora_" in key and key not in factors)
    if odd:
        raise UserError(f'merge: space="delta" is for plain LoRA linear layers; {odd[0]!r} is none')
    for number, tree in enumerate(trees[1:], 1):
        same_keys(trees[0], tree, f"posteriors 0 and {number} are not over the same layers")
    first = posteriors[0].adapter_config
    config = {**first, "r": first["r"] if rank is None else rank}
    rest = [key for key in trees[0] if key not in factors]
    mean, sigma = _weight_by_weight(posteriors, None, weights, delta0, rest)
    kept: dict[str, float] = {}
    for name in layers:
        scalings = [_scaling_of(p.adapter_config, name) for p in posteriors]
        spread = [
            _variance_of_update(t[name + A], t[name + B], v[name + A], v[name + B], s)
            for t, v, s in zip(trees, variances, scalings, strict=True)
        ]
        shares, joint = _shares(name, weights, spread)
        ups = torch.cat(
            [w * s * t[name + B].double() for w, s, t in zip(shares, scalings, trees, strict=True)], 1
        )
        downs = torch.cat([t[name + A].double() for t in trees])
        scaling = _scaling_of(config, name)
        down, up, kept[name] = truncated(downs, ups / scaling, int(config["r"]))
        mean[name + A], mean[name + B] = down.float(), up.float()
        if joint > 0:
            level = _isotropic_sigma(down, up, joint / scaling**2)
            for end in (A, B):
                sigma[name + end] = torch.full_like(mean[name + end], level)
    ordered = {key: mean[key] for key in trees[0]}
    origin = replace(_joint_origin(posteriors, None, delta0, {}), prior={})
    merged = DiagonalGaussian(config, ordered, sigma, origin)
    return merged, MergeReport(len(posteriors), "delta", _lowest_alignment(trees, layers), kept=kept)


def truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A [rank, n], B [m, rank], share kept) with B A the best approximation of up [m, R] @ down [R, n] of that rank,
    in the balanced gauge A A^T = B^T B = diag(d). Nothing of size m x n is made."""
    left, inner_left = torch.linalg.qr(up)
    right, inner_right = torch.linalg.qr(down.mT)
    u, d, vh = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    root = d[:rank].sqrt()
    short = rank - len(root)  # a rank above that of the sum
    b = torch.nn.functional.pad(left @ u[:, :rank] * root, (0, short))
    a = torch.nn.functional.pad(root[:, None] * (vh[:rank] @ right.mT), (0, 0, 0, short))
    total = float(d.square().sum())
    return a, b, float(d[:rank].square().sum()) / total if total > 0 else 1.0


def _variance_of_update(a: Tensor, b: Tensor, var_a: Tensor, var_b: Tensor, scaling: float) -> float:
    """Mean over the elements of s B A of its variance, A and B independent: Var (B A)_ij = sum_k B_ik^2 var(A_kj) +
    var(B_ik) A_kj^2 + var(B_ik) var(A_kj)."""
    a2, b2 = a.double().square(), b.double().square()

    def mean_of_product(x: Tensor, y: Tensor) -> float:
        return float((x.sum(0) * y.sum(1)).sum()) / (x.shape[0] * y.shape[1])

    parts = mean_of_product(b2, var_a) + mean_of_product(var_b, a2) + mean_of_product(var_b, var_a)
    return scaling**2 * parts


def _isotropic_sigma(a: Tensor, b: Tensor, variance: float) -> float:
    """sigma of all of A and B that gives B A the mean variance asked for,
    r sigma^4 + (|B|^2 / m + |A|^2 / n) sigma^2."""
    linear = float(b.square().sum()) / b.shape[0] + float(a.square().sum()) / a.shape[1]
    rank = a.shape[0]
    return math.sqrt(2 * variance / (linear + math.sqrt(linear**2 + 4 * rank * variance)))


def _shares(name: str, alphas: Sequence[float], spread: Sequence[float]) -> tuple[list[float], float]:
    """(w_t, v*) of a layer."""
    if not any(spread):
        return [alpha / sum(alphas) for alpha in alphas], 0.0
    if not all(spread):
        raise UserError(
            f"merge: the update of {name!r} is certain in some posteriors and not in others: merge point masses with "
            "point masses"
        )
    precisions = [alpha / v for alpha, v in zip(alphas, spread, strict=True)]
    return [p / sum(precisions) for p in precisions], 1 / sum(precisions)


# ------------------------------------------------------------------------------------------------------------ gauge


def alignment(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(cosine of two A as they are, the highest any rotation R of one's ranks gives): <a, b> / (|a| |b|) and max over
    orthogonal R of <a, R b> / (|a| |b|), the sum of the singular values of a b^T over |a| |b|. a, b [r, n]."""
    a, b = a.double(), b.double()
    size = float(a.norm() * b.norm())
    if size == 0:
        return 1.0, 1.0
    return float((a * b).sum()) / size, float(torch.linalg.svdvals(a @ b.mT).sum()) / size


def _checked_gauge(means: Sequence[Tree], same_init: bool) -> float | None:
    """The lowest cosine. UserError where two members are not in one gauge."""
    keys = [key for key in means[0] if key.endswith(A) or key.endswith(".lora_embedding_A")]
    lowest = None
    for number, mean in enumerate(means[1:], 1):
        for key in keys:
            as_is, rotated = alignment(means[0][key], mean[key])
            lowest = as_is if lowest is None else min(lowest, as_is)
            if not same_init and (as_is < SAME_INIT or as_is < 0.9 * rotated):
                raise UserError(
                    f"merge: posteriors 0 and {number} are in different gauges: the cosine between their {key!r} is "
                    f"{as_is:.2f} (up to {rotated:.2f} after a rotation), so they did not begin from one A, or have "
                    'left it far behind: give space="delta", or same_init=True if you know better'
                )
    return lowest


def _lowest_alignment(trees: Sequence[Tree], layers: Sequence[str]) -> float | None:
    found = [
        alignment(trees[0][name + A], tree[name + A])[0]
        for tree in trees[1:]
        for name in layers
        if trees[0][name + A].shape == tree[name + A].shape
    ]
    return min(found, default=None)


def _scalings(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides s of each layer."""
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return tuple(config.get(name) or None for name in names)


def _scaling_of(config: Mapping[str, Any], name: str) -> float:
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UserError(
            f'merge: space="delta" needs one rank and alpha for all layers, {name!r} may have its own'
        )
    return float(config["lora_alpha"]) / (config["r"] ** (0.5 if config.get("use_rslora") else 1))


# ----------------------------------------------------------------------------------------------------------- checks


def _checked(
    posteriors: Sequence[Posterior], alphas: Sequence[float] | None, delta0: float | None, space: str
) -> list[float]:
    """alphas."""
    if not posteriors:
        raise UserError("merge: no posteriors: give at least one")
    if space not in SPACES:
        raise UserError(
            f"merge: space must be one of {', '.join(SPACES)}, got {space!r}{nearest(space, SPACES)}"
        )
    weights = [1.0] * len(posteriors) if alphas is None else [float(a) for a in alphas]
    if len(weights) != len(posteriors):
        raise UserError(f"merge: {len(weights)} alphas for {len(posteriors)} posteriors: give one for each")
    if not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise UserError(f"merge: alphas must be >= 0, finite and not all 0, got {weights}")
    if delta0 is not None and not 0 < delta0 < math.inf:
        raise UserError(f"merge: delta0 must be > 0, got {delta0}")
    what: dict[str, Callable[[Origin], Any]] = {
        "base models (hashes)": lambda o: o.base,
        "output temperatures": lambda o: o.output_temperature,
    }
    for name, of in what.items():
        found = sorted({str(of(p.origin)) for p in posteriors})
        if len(found) > 1:
            raise UserError(f"merge: the posteriors have different {name}: {', '.join(found)}")
    return weights


def _alike(a: Tree, b: Tree, number: int) -> None:
    same_keys(a, b, f"posteriors 0 and {number} are not over the same adapter")
    for key in a:
        if a[key].shape != b[key].shape:
            raise UserError(
                f"merge: {key!r} has shape {tuple(a[key].shape)} in posterior 0 and {tuple(b[key].shape)} in {number}: "
                'for adapters of different rank give space="delta"'
            )


def _joint_temper(posteriors: Sequence[Posterior]) -> float:
    """That of all; 1 where they differ, as it is then a weight of each task's data."""
    tempers = {p.origin.temper for p in posteriors}
    return tempers.pop() if len(tempers) == 1 else 1.0


def _joint_origin(
    posteriors: Sequence[Posterior], base: Posterior | None, delta0: float | None, sigma: Tree
) -> Origin:
    """lambda and N are sums over the tasks, where all are known."""
    members = [p.origin for p in posteriors]
    ess = [o.ess for o in members if o.ess is not None]
    sizes = [o.data_size for o in members if o.data_size is not None]
    prior = {} if base is not None else {k: _merged_prior(posteriors, base, delta0, k) for k in sigma}
    return Origin(
        base=members[0].base,
        model=members[0].model,
        dtype=members[0].dtype,
        ess=sum(ess) if len(ess) == len(members) else None,
        data_size=sum(sizes) if len(sizes) == len(members) else None,
        temper=_joint_temper(posteriors),
        prior={key: value for key, value in prior.items() if value > FLAT},
        output_temperature=members[0].output_temperature,
    )
