"""Outputs of draws of weights: one after the other, or many in one forward; and how many draws are enough."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel
from torch import Tensor

from ...compat.peft import draws_as_adapters, mixes_saved_modules, plain_lora_keys
from ..adapter import adapter_tensors
from ..artefact import Tree
from ..examples import Batch
from ..likelihoods import BradleyTerry, Likelihood, Tokens
from ..per_row import can_differ_by_row, draws_in_rows, in_head, stack
from .result import entropy
from .rows import Rows

if TYPE_CHECKING:
    from ..posterior import Posterior

Way = Literal["rows", "mixed", "sequential"]
Run = Callable[[Batch], Tensor]
"""Batch of B -> f [S, B, C] of the draws that are in place."""


@dataclass(frozen=True)
class Stop:
    """When an example has had draws enough: not before `at_least`, and at every `at_least` after; `until`: half-width
    of a 95 % interval, nats."""

    until: float
    at_least: int


@dataclass(frozen=True)
class Outputs:
    """f [S, N, C] fp32 on the CPU, NaN behind the draws an example had; used [N]; mean [N, C]: of the mean weights."""

    f: Tensor
    used: Tensor
    mean: Tensor | None


def way_of(posterior: Posterior, model: PeftModel, likelihood: Likelihood | None, adapter: str) -> Way:
    """How draws can share a forward: our own rows, PEFT's mixed batches, or not at all."""
    plain = can_differ_by_row(model, plain_lora_keys(model, adapter))
    uncertain = [key for key in posterior.uncertain()]
    if isinstance(likelihood, Tokens) and any(in_head(model, key) for key in uncertain):
        reason = "an uncertain LM head under a token likelihood"
    elif other := sorted(set(uncertain) - plain):
        dora = any(".lora_magnitude_vector" in key for key in posterior.mean())
        if not dora and mixes_saved_modules(model):
            _once(
                f"predictive: {other[0]} is no plain LoRA factor of a decoder layer: "
                "PEFT's mixed batches take the place of ours"
            )
            return "mixed"
        reason = f"{other[0]} can be in no batch with others"
    else:
        return "rows"
    _once(f"predictive: draws run one after the other: {reason}")
    return "sequential"


def outputs_of_draws(
    posterior: Posterior,
    model: PeftModel,
    rows: Rows,
    likelihood: Likelihood,
    n: int,
    way: Way,
    *,
    seed: int,
    antithetic: bool,
    adapter: str,
    tokens: int,
    memory: int,
    stop: Stop | None = None,
    with_mean: bool = False,
) -> Outputs:
    """The adapter is left at a draw; the caller puts it back."""
    draws = posterior.sample(n, seed, antithetic)
    most = _draws_at_once(posterior, way, rows, tokens, memory)
    if stop is not None:
        most = min(most, stop.at_least)
    active, done = list(range(len(rows))), 0
    mean, f = None, torch.empty(0)
    used = torch.zeros(len(rows), dtype=torch.long)
    if with_mean:
        mean = _run_all(
            posterior, model, rows, likelihood, [posterior.mean()], "sequential", active, adapter, tokens
        )[0]
    while done < n and active:
        until_check = n - done if stop is None else stop.at_least - done % stop.at_least
        chunk = list(islice(draws, min(most, n - done, until_check)))
        found = _run_all(posterior, model, rows, likelihood, chunk, way, active, adapter, tokens)
        if done == 0:
            f = torch.full((n, len(rows), found.shape[-1]), torch.nan)
        f[done : done + len(chunk), active] = found
        done += len(chunk)
        used[active] = done
        if stop is not None and done % stop.at_least == 0:
            at_temperature = f[:done, active] / posterior.origin.output_temperature
            wide = half_width(likelihood, at_temperature, antithetic) > stop.until
            active = [row for row, more in zip(active, wide.tolist(), strict=True) if more]
    return Outputs(f, used, mean)


def half_width(likelihood: Likelihood, f: Tensor, antithetic: bool) -> Tensor:
    """Of the 95 % intervals of total and expected entropy, the wider one's half, [B]; f [S, B, C].

    The expected entropy is a mean over draws; the total entropy's error is the jackknife's. Student's t with S - 1
    degrees of freedom. Antithetic pairs count as one draw. Infinite with fewer than two.
    """
    if isinstance(likelihood, BradleyTerry):
        f = torch.cat([f, torch.zeros_like(f)], -1)
    p = f.double().softmax(-1)
    own = entropy(p)
    if antithetic:
        pairs = len(p) // 2
        p = p[: 2 * pairs].view(pairs, 2, *p.shape[1:]).mean(1)
        own = own[: 2 * pairs].view(pairs, 2, -1).mean(1)
    s = len(p)
    if s < 2:
        return f.new_full((f.shape[1],), math.inf)
    left_out = entropy((p.sum(0) - p) / (s - 1))
    total = ((s - 1) * left_out.var(0, correction=0)).sqrt()
    expected = own.std(0, correction=1) / math.sqrt(s)
    return _t_quantile(s - 1) * torch.maximum(total, expected)


_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t_quantile(df: int) -> float:
    """0.975 quantile of Student's t; beyond the table Cornish and Fisher's expansion, within 0.003."""
    if df <= len(_T_975):
        return _T_975[df - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def _draws_at_once(posterior: Posterior, way: Way, rows: Rows, tokens: int, memory: int) -> int:
    if way == "sequential":
        return 1
    size = 4 * sum(value.numel() for value in posterior.mean().values())
    return max(1, min(tokens // rows.longest, memory // max(1, size)))


def _run_all(
    posterior: Posterior,
    model: PeftModel,
    rows: Rows,
    likelihood: Likelihood,
    draws: Sequence[Tree],
    way: Way,
    wanted: Sequence[int],
    adapter: str,
    tokens: int,
) -> Tensor:
    """f [S, len(wanted), C] of all `draws` together."""
    device = next(model.parameters()).device
    place = {row: k for k, row in enumerate(wanted)}
    result: Tensor | None = None
    with _in_place(posterior, model, likelihood, draws, way, adapter) as run:
        for numbers, batch in rows.batches(wanted, max(1, tokens // len(draws))):
            f = run(batch.to(device)).float().cpu()
            if result is None:
                result = torch.empty(len(draws), len(wanted), f.shape[-1])
            result[:, [place[row] for row in numbers]] = f
    assert result is not None
    return result


@contextmanager
def _in_place(
    posterior: Posterior,
    model: PeftModel,
    likelihood: Likelihood,
    draws: Sequence[Tree],
    way: Way,
    adapter: str,
) -> Iterator[Run]:
    count = len(draws)

    def shaped(f: Tensor, batch: Batch) -> Tensor:
        f = f.view(-1, len(batch), f.shape[-1])
        return f.expand(count, -1, -1)  # one row of numbers where no draw differs

    if count == 1:  # the adapter's own path, for whatever kind of adapter
        posterior.write(model, draws[0], adapter)
        yield lambda batch: shaped(likelihood.outputs(model, batch), batch)
    elif way == "mixed":
        names = [f"draw{k}" for k in range(count)]
        with draws_as_adapters(model, adapter, dict(zip(names, draws, strict=True))) as in_use:

            def mixed(batch: Batch) -> Tensor:
                size = len(batch)
                repeated = batch.rows([*range(size)] * count)
                with in_use([name for name in names for _ in range(size)]):
                    return shaped(likelihood.outputs(model, repeated), batch)

            yield mixed
    else:
        with draws_in_rows(model, stack(draws), adapter):
            yield lambda batch: shaped(likelihood.outputs(model, batch), batch)


@contextmanager
def adapter_kept(model: PeftModel, adapter: str) -> Iterator[None]:
    """The values of the adapter are what they were, whatever happens inside."""
    before = {key: p.detach().clone() for key, p in adapter_tensors(model, adapter).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, p in adapter_tensors(model, adapter).items():
                p.copy_(before[key])


_said: set[str] = set()


def _once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)
