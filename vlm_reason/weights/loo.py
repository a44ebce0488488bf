"""Leave-one-out without leaving any out: what the model would say of each training example had it not seen it.

With f_i [C] the outputs at the mean, r_i = -d log p(y_i | f) / df (p_i - onehot(y_i) for classes), Sigma the
posterior's covariance and J_i = df_i / dtheta, taking example i away moves the mean by about Sigma J_i^T r_i, hence

    first order   f_i without i  ~  f_i + V_i r_i,                     V_i = J_i Sigma J_i^T [C, C]
    newton        f_i without i  ~  f_i + (I - V_i L_i)^-1 V_i r_i,    L_i = -d^2 log p / df^2

The second takes example i out of Sigma too, and is exact for linear models with Gaussian noise. They agree where no
example matters much; in a model that can fit its data the first is far too hopeful (a three-class regression with 12
features and 60 examples, nearly unpenalised: 0.05 against 2.1 nats; on new data 1.4).

The mean of -log p(y_i | f_i without i) over the *training* examples estimates the loss on new ones: for stopping and
for choosing between checkpoints without a validation split. (Nickl, Xu, Tailor, Moellenhoff and Khan 2023, "The memory
perturbation equation", arXiv 2310.19273, have the first; Rad and Maleki 2020 the second.)

A posterior of temperature N / lambda, tempered by tau, has Sigma too small by lambda tau / N: V is multiplied by that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from ..errors import UserError, nearest
from .adapter import adapter_tensors
from .examples import Batch, Example, in_batches
from .families.last_layer import LastLayer
from .jacobians import jacobians
from .likelihoods import Likelihood, Tokens
from .posterior import Posterior

Mode = Literal["auto", "closed_form", "linearised", "sampled"]
MODES: tuple[str, ...] = get_args(Mode)
MOST_LEVERAGE = 0.95


@dataclass(frozen=True)
class LeaveOneOut:
    """ids: names of the examples, in order, B of them; all in nats and fp64.

    nll [B]         -log p(y_i) at the outputs perturbed as if i had been left out
    train_nll [B]   the same at the mean, i being among the training examples
    sensitivity [B] sum_c |r_ic L_icc V_icc|, for classes sum_c |r_ic p_ic (1 - p_ic) V_icc|: how much leaving i out
                    changes the probabilities given to i; for token likelihoods, whose f is log p itself, |r_i V_i|
    logits [B, C]   f_i; shift [B, C]: what was added to it
    leverage [B]    largest eigenvalue of V L, the share of i's prediction that i itself decides. 1 or above means that
                    Sigma does not hold i's own curvature (too wide, or too few draws); Newton's step takes 0.95 then
    mode            how V was computed
    """

    ids: tuple[str, ...]
    nll: Tensor
    train_nll: Tensor
    sensitivity: Tensor
    logits: Tensor
    shift: Tensor
    leverage: Tensor
    mode: str

    @property
    def mean_nll(self) -> float:
        """The estimate of the loss on new examples."""
        return float(self.nll.mean())

    def ranking(self, by: str = "sensitivity") -> list[str]:
        """Names, the highest first. by: "sensitivity" for the examples that shape the model, most of them near a
        boundary; "nll" for those the others contradict: wrong labels, also of otherwise clear examples."""
        if by not in ("sensitivity", "nll"):
            raise UserError(f"ranking is by sensitivity or nll, not by {by!r}")
        return [self.ids[n] for n in getattr(self, by).argsort(descending=True, stable=True).tolist()]


def loo(
    posterior: Posterior,
    model: PeftModel,
    data: Sequence[Example],
    likelihood: Likelihood,
    n: int = 32,
    mode: str = "auto",
    *,
    newton: bool = True,
    seed: int = 0,
    adapter: str = "default",
    rows: int = 8,
) -> LeaveOneOut:
    """See the top of this file. data: the examples the posterior was fitted on (not new ones, and not tempered ones).

    mode    "linearised": V from the family's covariance and Jacobians, C backward passes, of plain LoRA factors;
            "closed_form": V as a Bayesian last layer has it; "sampled": V is the covariance of f over n draws, with
            noise of relative size sqrt(2 / n); "auto": the first of closed_form, linearised, sampled that there is
    newton  the second line above, else the first
    rows    examples at a time for Jacobians: rows C times the adapter in memory

    The model is run at the mean; its adapter is left as it was found. N is the posterior's, else len(data).

    Warns where examples have leverage >= 1: the estimate is not to be trusted then.

    UserError without data, for an unknown mode, for a posterior without uncertainty, and for what a family lacks.

    When not to use it: for data that are not the training data; where draws are far from linear in the weights; with
    widths that are no posterior's (`tfb` takes the widest the data tolerate, `ensemble` what runs happen to give).
    """
    if not data:
        raise UserError("no examples: leave-one-out needs those the posterior was fitted on")
    if mode not in MODES:
        raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{nearest(mode, MODES)}")
    if not posterior.uncertain():
        raise UserError(
            "the posterior is certain of all weights: leaving an example out would change nothing"
        )
    mode = _chosen(posterior) if mode == "auto" else mode
    if mode == "sampled" and n < 2:
        raise UserError(f"a covariance needs at least 2 draws, got n = {n}")
    if isinstance(posterior, LastLayer):
        likelihood = posterior.with_noise(likelihood)
    scale = warmth(posterior, len(data))
    temperature = posterior.origin.output_temperature
    device = next(iter(adapter_tensors(model, adapter).values())).device
    parts = []
    with at_mean(posterior, model, adapter):
        for batch in in_batches(data, rows=rows):
            batch = batch.to(device)
            if mode == "linearised":
                f, v = _linearised(posterior, model, batch, likelihood, adapter)
            elif mode == "closed_form":
                with torch.no_grad():
                    f, v = posterior.closed_form(model, batch, likelihood, adapter)
            else:
                f, v = _sampled(posterior, model, batch, likelihood, n, seed, adapter)
            parts.append(left_out(f, scale * v, batch, likelihood, temperature, newton, mode))
    found = _in_order(parts, [e.id for e in data])
    wide = int((found.leverage >= 1).sum())
    if wide:
        warnings.warn(
            f"leave-one-out: {wide} of {len(data)} examples have leverage >= 1: Sigma is too wide to hold their own "
            "curvature (no posterior of these data, or too few draws); do not trust the figure",
            stacklevel=3,
        )
    return found


def best_checkpoint(
    posteriors: Mapping[str, Posterior],
    model: PeftModel,
    data: Sequence[Example],
    likelihood: Likelihood,
    n: int = 32,
    mode: str = "auto",
    *,
    newton: bool = True,
    seed: int = 0,
    adapter: str = "default",
) -> tuple[str, dict[str, float]]:
    """(name of the posterior with the least leave-one-out loss, that loss by name, nats an example): which step to stop
    at, or which of several settings to take, without a validation split. UserError for none."""
    if not posteriors:
        raise UserError("no checkpoints to choose from: give at least one posterior")
    found = {
        name: loo(p, model, data, likelihood, n, mode, newton=newton, seed=seed, adapter=adapter).mean_nll
        for name, p in posteriors.items()
    }
    return min(found, key=lambda name: found[name]), found


def warmth(posterior: Posterior, data_size: int) -> float:
    """lambda tau / N, what turns the posterior's covariance into that of temperature 1; N the posterior's own, else
    data_size; lambda is N where it is not known."""
    size = posterior.origin.data_size or data_size
    return (posterior.origin.ess or size) * posterior.origin.temper / size


def left_out(
    f: Tensor,
    v: Tensor,
    batch: Batch,
    likelihood: Likelihood,
    temperature: float = 1.0,
    newton: bool = True,
    mode: str = "linearised",
) -> LeaveOneOut:
    """The formulas, for outputs f [B, C] and covariances v [B, C, C]. temperature divides outputs before they are
    scored, not in r, which is what training saw."""
    f, v = f.double(), v.double()
    r, curvature = likelihood.residual(f, batch).double(), likelihood.hessian(f).double()
    if not bool(torch.isfinite(f).all() & torch.isfinite(v).all()):
        raise UserError("leave-one-out: outputs or their covariance are not finite")
    root = _root(curvature)
    leverage, turn = torch.linalg.eigh(root @ v @ root)
    shift = v @ r[..., None]
    if newton:  # (I - V L)^-1 V = V + V L^1/2 (I - L^1/2 V L^1/2)^-1 L^1/2 V
        kept = (1 - leverage.clamp(max=MOST_LEVERAGE)).reciprocal()
        shift = shift + v @ (root @ (turn @ (kept[..., None] * (turn.mT @ (root @ shift)))))
    shift = shift.squeeze(-1)
    weight = torch.ones_like(r) if isinstance(likelihood, Tokens) else curvature.diagonal(dim1=-2, dim2=-1)
    sensitivity = (r * weight * v.diagonal(dim1=-2, dim2=-1)).abs().sum(-1)
    nll, before = (-likelihood.log_prob(x / temperature, batch) for x in (f + shift, f))
    return LeaveOneOut(
        batch.ids, nll.cpu(), before.cpu(), sensitivity.cpu(), f.cpu(), shift.cpu(), leverage[:, -1].cpu(), mode
    )  # fmt: skip


def _root(curvature: Tensor) -> Tensor:
    """Symmetric square roots of positive semidefinite matrices."""
    values, turn = torch.linalg.eigh(curvature)
    return (turn * values.clamp_min(0).sqrt()[..., None, :]) @ turn.mT


@contextmanager
def at_mean(posterior: Posterior, model: PeftModel, adapter: str) -> Iterator[None]:
    """Inside, the adapter holds the mean and dropout is off; then both are as they were."""
    before = {k: v.detach().clone() for k, v in adapter_tensors(model, adapter).items()}
    training = model.training
    posterior.write(model, posterior.mean(), adapter)
    model.eval()
    try:
        yield
    finally:
        posterior.write(model, before, adapter)
        model.train(training)


def _chosen(posterior: Posterior) -> str:
    """Of the ways the family has, the most exact."""
    kind = type(posterior)
    if kind.closed_form is not Posterior.closed_form:
        return "closed_form"
    return "linearised" if kind.output_covariance is not Posterior.output_covariance else "sampled"


def _linearised(
    posterior: Posterior, model: PeftModel, batch: Batch, likelihood: Likelihood, adapter: str
) -> tuple[Tensor, Tensor]:
    f, jacobian = jacobians(model, batch, likelihood, posterior.uncertain(), adapter)
    on_cpu = {key: value.cpu() for key, value in jacobian.items()}
    return f, posterior.output_covariance(on_cpu).to(f.device)


@torch.no_grad()
def _sampled(
    posterior: Posterior,
    model: PeftModel,
    batch: Batch,
    likelihood: Likelihood,
    n: int,
    seed: int,
    adapter: str,
) -> tuple[Tensor, Tensor]:
    f = likelihood.outputs(model, batch)
    got = posterior.predictive(
        model, batch, likelihood, n, "auto", seed=seed, adapter=adapter, keep_logits=True
    )
    assert got.logits is not None
    apart = got.logits.to(f.device).double() * posterior.origin.output_temperature
    apart = apart - apart.mean(0)
    return f, torch.einsum("sbc,sbd->bcd", apart, apart) / (len(apart) - 1)


def _in_order(parts: Sequence[LeaveOneOut], ids: Sequence[str]) -> LeaveOneOut:
    place = {name: k for k, name in enumerate(i for part in parts for i in part.ids)}
    if len(place) < len(ids):
        raise UserError(f"{len(ids)} examples have {len(place)} different ids: give each its own")
    index = torch.tensor([place[i] for i in ids])
    joined: dict[str, Tensor] = {
        f.name: torch.cat([getattr(p, f.name) for p in parts])[index]
        for f in fields(LeaveOneOut)
        if isinstance(getattr(parts[0], f.name), Tensor)
    }
    return replace(parts[0], ids=tuple(ids), **joined)  # type: ignore[arg-type]
