"""IVON: variational Gaussian posterior over weights, learnt by an optimiser that costs about what AdamW costs.

With l the mean training loss, lambda = `ess`, delta = `weight_decay`:

    min over q = N(m, diag sigma^2) of   lambda E_q[l(theta)] + KL(q || N(0, I / (lambda delta))),
    sigma^2 = 1 / (lambda (h + delta))

One update, from draws theta_k = m + sigma eps_k with gradients g_k, k = 1..K = `mc_samples`, n_k = theta_k - m:

    g   = mean_k g_k
    f   = lambda (h + delta) mean_k(n_k g_k)      ("price": an unbiased estimate of the diagonal Hessian of l)
          or lambda mean_k g_k^2                  ("gradsq")
    mu <- beta1 mu + (1 - beta1) g
    h  <- beta2 h + (1 - beta2) f + (1 - beta2)^2 (h - f)^2 / (2 (h + delta))
    m  <- m - lr kappa clip((mu / (1 - beta1^t) + delta m) / (h + delta), -xi, xi)

kappa = h_0 + delta if `rescale_lr`, else 1; the last line has the new h. The last term of h keeps h + delta positive
for any f: a step halves it at most. (Shen et al. 2024, "Variational learning is effective for large deep networks",
arXiv 2402.17641; Lin et al. 2020 for the correction of h.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..errors import UserError
from .ivon_update import Part, for_each_part, take_in, write_draw
from .noise import REQUESTED, TRAINING, Draw
from .shards import check_index, local

HESSIANS = ("price", "gradsq")
SHARED = ("mc_samples", "hold", "hess_approx", "seed", "updates", "draw")
"""Settings that every group has in common; the last two count, and are saved with the groups."""


class IVON(torch.optim.Optimizer):
    """A torch optimiser; between steps the parameters hold a draw from the posterior, and `step()` reads `p.grad`:

        optimizer = IVON(model.parameters(), lr=0.1, ess=len(train_set))
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()          # at the draw; loss is a mean over examples
            optimizer.step()                       # updates, then puts the next draw in place
        with optimizer.mean():                     # evaluate, or save, at the posterior's mean
            evaluate(model)
        with optimizer.sample(seed=7):             # at a draw of your own: the same for the same seed
            evaluate(model)

    Anything that works on gradients between backward and step (clipping, accumulation, GradScaler, DDP) works as with
    any other optimiser. Build it when the weights are loaded: building draws. Loading a `state_dict` puts the draw in
    place that was there when it was saved, whatever the parameters hold.

    lr            alpha
    ess           lambda: the number N of training examples for a Bayesian posterior; larger is colder (N / lambda)
    hess_init     h_0 > 0. Initial sigma is 1 / sqrt(ess (hess_init + weight_decay))
    beta1, beta2  beta2^T of h_0 is left after T updates: with fewer than 1 / (1 - beta2) updates the posterior has
                  about the width it began with. `suggest_settings` derives beta2 and h_0 from T and N
    weight_decay  delta >= 0; the prior is N(0, 1 / (ess weight_decay)), flat at 0
    clip_radius   xi; with lr kappa it bounds how far any weight moves in an update
    rescale_lr    False for the convention of the LoRA recipes (lr about 0.03)
    mc_samples    K: `step()` draws anew each time, and updates the K-th time; draws without a gradient count as zero
    hess_approx   "price" or "gradsq"; the latter is no Hessian, it is biased unless batches are single examples
    seed          of all noise
    hold          H: eps stays for H steps, while m and sigma move on: for the steps of a window of samples that were
                  drawn at that eps. From the second of them on m depends on eps, which biases f by the order of what m
                  moves in a window
    horizon       T, the number of updates planned; only to warn when beta2^T > 1/2
    data_size     N; only for diagnostics

    A group may set its own lr, ess, hess_init, beta1, beta2, weight_decay, clip_radius and rescale_lr. `start` is the
    global index of its first element, where the parameters are slices of a whole that other processes hold the rest
    of; by default groups follow one another. DTensors sharded along their first dimension know their place.

    State is fp32 whatever the parameters are: mean, momentum and precision h + delta (12 bytes each weight), 8 more for
    mc_samples > 1. A
    bf16 parameter gets its draw by stochastic rounding: rounding to nearest would swallow a small sigma.

    When not to use it: without a loss that is a mean of log-likelihoods (q then has no meaning as a posterior); with
    dropout as the only noise wanted; for a few steps only. Raises UserError for hyper-parameters out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        mc_samples: int = 1,
        hess_approx: str = "price",
        seed: int = 0,
        hold: int = 1,
        horizon: int | None = None,
        data_size: int | None = None,
    ) -> None:
        self.horizon, self.data_size = horizon, data_size
        for name, value in (("horizon", horizon), ("data_size", data_size)):
            if value is not None and not value >= 1:
                raise UserError(f"IVON: {name} must be at least 1, got {value}")
        defaults = dict(
            lr=lr, ess=ess, hess_init=hess_init, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
            clip_radius=clip_radius, rescale_lr=rescale_lr, mc_samples=mc_samples, hess_approx=hess_approx,
            seed=seed, hold=hold, updates=0, draw=0,
        )  # fmt: skip
        _check_settings(defaults)
        self._views: list[
            Draw | None
        ] = []  # what the parameters hold instead of the training draw; None is the mean
        super().__init__(params, defaults)
        if horizon is not None and beta2**horizon > 0.5:
            warnings.warn(
                f"IVON: {beta2**horizon:.0%} of hess_init will be left after {horizon} updates at beta2 {beta2}: the "
                "posterior keeps nearly the width it starts with; see vlm_reason.weights.suggest_settings",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_views", [])
        self.__dict__.setdefault("horizon", None)
        self.__dict__.setdefault("data_size", None)
        for group in self.param_groups:
            group.setdefault("hold", 1)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimiser's; the group's means are its present weights, and its first draw is put in place."""
        before = list(self.param_groups)
        if self._views:
            raise UserError(
                "IVON: add_param_group() inside `with optimizer.mean()` or `.sample()`: leave it first"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, before)
        except UserError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            self.state[p] = _new_state(p, group)
        self._put_in_place([group], self._training_draw())

    def _check_group(self, group: dict[str, Any], before: list[dict[str, Any]]) -> None:
        _check_settings(group)
        if before:
            for name in ("updates", "draw"):
                group[name] = before[0][name]
            for name in SHARED:
                if group[name] != before[0][name]:
                    raise UserError(
                        f"IVON: {name} is one for all groups: got {group[name]!r} beside {before[0][name]!r}"
                    )
        for n, p in enumerate(group["params"]):
            if not p.requires_grad:
                raise UserError(
                    f"IVON: parameter {n} of a group is frozen; IVON adds noise to every parameter it is given: "
                    "pass only those with requires_grad"
                )
            if not p.is_floating_point():
                raise UserError(
                    f"IVON: parameter {n} of a group is {p.dtype}; only real floating-point weights"
                )
        check_index(group, before)

    # ------------------------------------------------------------------------------------------------- the update

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the gradients at the present draw in; the mc_samples-th time, update. Then put the next draw in place.

        Parameters without a gradient keep their q. UserError inside `with mean()` or `sample()`.
        """
        if self._views:
            raise UserError("IVON: step() inside `with optimizer.mean()` or `.sample()`: leave it first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for g in self.param_groups for p in g["params"]):
            raise UserError(
                "IVON takes dense gradients, got a sparse one: build the embedding with sparse=False"
            )
        now = self._training_draw()
        first = self.param_groups[0]
        last = first["draw"] + 1 == first["mc_samples"]
        for group in self.param_groups:
            group["updates"], group["draw"] = (
                (group["updates"] + 1, 0) if last else (group["updates"], group["draw"] + 1)
            )
        following = self._training_draw()
        for group in self.param_groups:
            for p in group["params"]:
                _count(p, self.state[p], group["mc_samples"], last)

            def update(part: Part, group: dict[str, Any] = group) -> None:
                take_in(part, group, last)
                write_draw(part, group, following)

            for_each_part(group, self.state, now, following, update)
            if last:
                for p in group["params"]:
                    self.state[p].pop("seen", None)
        return loss

    # ------------------------------------------------------------------------------- what the parameters hold

    @contextmanager
    def mean(self) -> Iterator[None]:
        """The parameters hold the posterior's mean inside; afterwards, also after an exception, what they held."""
        with self._view(None):
            yield

    @contextmanager
    def sample(self, seed: int) -> Iterator[None]:
        """The parameters hold a draw inside, the same for the same seed and posterior; afterwards what they held."""
        with self._view(Draw(seed, REQUESTED)):
            yield

    @contextmanager
    def _view(self, view: Draw | None) -> Iterator[None]:
        self._views.append(view)
        try:
            self._put_in_place(self.param_groups, view)
            yield
        finally:
            self._views.pop()
            self.put_draw_in_place()

    def put_draw_in_place(self) -> None:
        """The parameters hold what the state and the counters say they hold: the training draw, or inside `mean` and
        `sample` that. For who has replaced `state` itself; `load_state_dict` does it."""
        self._put_in_place(self.param_groups, self._views[-1] if self._views else self._training_draw())

    @torch.no_grad()
    def start_anew(self, parameters: Sequence[Tensor]) -> None:
        """q of some of the parameters as at first, around the weights they hold now: mean there, width from hess_init,
        no momentum; their draw is then put in place. The counters, which all share, go on. UserError inside
        `with mean()` or `sample()`."""
        if self._views:
            raise UserError(
                "IVON: start_anew() inside `with optimizer.mean()` or `.sample()`: leave it first"
            )
        chosen = {id(p) for p in parameters}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in chosen:
                    self.state[p] = _new_state(p, group)
        self.put_draw_in_place()

    def _training_draw(self) -> Draw:
        """Named by the counters of the step at which its eps came into use."""
        group = self.param_groups[0]
        steps = group["updates"] * group["mc_samples"] + group["draw"]
        began = divmod(steps - steps % group["hold"], group["mc_samples"])
        return Draw(group["seed"], TRAINING, *began)

    @torch.no_grad()
    def _put_in_place(self, groups: list[dict[str, Any]], view: Draw | None) -> None:
        for group in groups:
            if view is None:
                for p in group["params"]:
                    local(p.detach()).copy_(local(self.state[p]["mean"]))
                continue
            for_each_part(group, self.state, None, view, partial(write_draw, group=group, draw=view))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore q, the counters and the settings of the groups, and put the draw of that time in place."""
        groups = state_dict["param_groups"]
        saved = list(chain.from_iterable(group["params"] for group in groups))
        ours = list(chain.from_iterable(group["params"] for group in self.param_groups))
        _check_saved(state_dict, saved, ours)
        super().load_state_dict(dict(state_dict))
        for index, p in zip(
            saved, ours, strict=True
        ):  # torch gives state the parameter's dtype: bf16 would lose it
            device = self.state[p]["mean"].device
            self.state[p] = {
                k: v.to(device=device if k != "step" else v.device, dtype=torch.float32, copy=True)
                if isinstance(v, Tensor)
                else v
                for k, v in state_dict["state"][index].items()
            }
        self.put_draw_in_place()


def _count(p: Tensor, state: dict[str, Any], mc_samples: int, last: bool) -> None:
    """Note which parameters had a gradient at any draw of this update; those count an update."""
    if mc_samples > 1 and p.grad is not None:
        state["seen"] = True
    if last and (p.grad is not None or state.get("seen", False)):
        state["step"] += 1


# ------------------------------------------------------------------------------------------------ settings and state


def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    def zeros() -> Tensor:
        return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)

    state: dict[str, Any] = {
        "step": torch.tensor(0.0),
        "momentum": zeros(),
        "precision": zeros(),
        "mean": zeros(),
    }
    local(state["precision"]).fill_(group["hess_init"] + group["weight_decay"])
    local(state["mean"]).copy_(local(p.detach()))
    if group["mc_samples"] > 1:
        state |= {"grad_sum": zeros(), "curvature_sum": zeros()}
    return state


def _check_settings(settings: Mapping[str, Any]) -> None:
    """UserError naming the first setting out of range."""
    ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda x: 0 <= x < math.inf, ">= 0"),
        "ess": (lambda x: 0 < x < math.inf, "> 0; the number of training examples is the usual choice"),
        "hess_init": (lambda x: 0 < x < math.inf, "> 0"),
        "beta1": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "beta2": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "weight_decay": (lambda x: 0 <= x < math.inf, ">= 0"),
        "clip_radius": (lambda x: x > 0, "> 0; inf turns clipping off"),
        "mc_samples": (lambda x: x >= 1 and int(x) == x, "a whole number >= 1"),
        "hold": (lambda x: x >= 1 and int(x) == x, "a whole number of steps >= 1"),
        "seed": (lambda x: x >= 0 and int(x) == x, "a whole number >= 0"),
    }
    for name, (holds, wanted) in ranges.items():
        value = settings[name]
        try:
            good = not isinstance(value, bool) and holds(value)
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise UserError(f"IVON: {name} must be {wanted}, got {value!r}")
    if settings["hess_approx"] not in HESSIANS:
        raise UserError(
            f"IVON: hess_approx must be one of {', '.join(HESSIANS)}, got {settings['hess_approx']!r}"
        )


def _check_saved(state_dict: Mapping[str, Any], saved: list[int], ours: list[Tensor]) -> None:
    if len(saved) != len(ours):
        raise UserError(f"IVON: the saved state has {len(saved)} parameters, the optimiser {len(ours)}")
    if "updates" not in state_dict["param_groups"][0]:
        raise UserError("IVON: the saved state is another optimiser's: it does not count updates")
    for n, (index, p) in enumerate(zip(saved, ours, strict=True)):
        mean = state_dict["state"].get(index, {}).get("mean")
        if mean is None:
            raise UserError(f"IVON: the saved state has no mean of parameter {n}")
        if "precision" not in state_dict["state"][index]:
            raise UserError(
                f"IVON: the saved state has no precision of parameter {n}: an older version wrote it"
            )
        if mean.shape != p.shape:
            raise UserError(
                f"IVON: parameter {n} has shape {tuple(p.shape)}, the saved state {tuple(mean.shape)}"
            )
