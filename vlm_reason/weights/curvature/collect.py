"""One pass over the data: forward, and back from every output, into an accumulator.

    Lambda_n = sum_c w_nc w_nc^T        H = sum_n sum_c (J_n^T w_nc) (J_n^T w_nc)^T

w_nc: eigenvectors times roots of eigenvalues, so one backward pass for each eigenvalue that is not 0 (C - 1 of C
classes) is the exact matrix. With `samples` K, labels drawn from the model's own predictions stand in:

    H = E_{y ~ p(y | f)} sum_n grad log p(y) grad log p(y)^T  ~  1/K sum_k ...

unbiased, K passes whatever C; the only way where the outputs are a whole vocabulary at every position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from ...engines.processes import rank, together, world
from ...errors import UserError
from ..examples import Batch, Example, in_batches
from ..likelihoods import Likelihood, Tokens
from .accumulators import Accumulator
from .flow import recorded

_NEGLIGIBLE = 1e-12  # of the largest eigenvalue of Lambda


def collect(
    model: PeftModel,
    examples: Sequence[Example],
    likelihood: Likelihood,
    into: Accumulator,
    adapter: str = "default",
    samples: int = 0,
    seed: int = 0,
    tokens: int = 2048,
) -> float:
    """Add the curvature of all `examples`, at the weights the adapter holds, in eval mode; returns sum log p(y | f).

    tokens: of a batch, padding included. In several processes (torch.distributed) each takes every world-size-th
    example and all end with the whole. UserError for a token likelihood without `samples`.
    """
    if isinstance(likelihood, Tokens) and samples < 1:
        raise UserError("the curvature of a token likelihood needs sampled labels: set samples to 1 or more")
    parts = together(
        lambda: (into, _local(model, examples, likelihood, into, adapter, samples, seed, tokens))
    )
    if len(parts) > 1:
        first = parts[0][0]
        for other, _ in parts[1:]:
            first.merge(other)
        into.__dict__.update(first.__dict__)
    return sum(total for _, total in parts)


def _local(
    model: PeftModel, examples: Sequence[Example], likelihood: Likelihood, into: Accumulator, adapter: str,
    samples: int, seed: int, tokens: int,
) -> float:  # fmt: skip
    """This process's examples."""
    device = next(model.parameters()).device
    was_training = [m for m in model.modules() if m.training]
    model.eval()
    total = 0.0
    try:
        with torch.enable_grad(), recorded(model, adapter) as (recorder, _):
            for batch in in_batches(list(examples)[rank() :: world()], tokens):
                batch = batch.to(device)
                recorder.forget()
                logp, functions = _functions(model, batch, likelihood, samples, seed)
                total += float(logp.detach().double().sum())
                for n, function in enumerate(functions):
                    flows = recorder.flows(function, batch, n + 1 < len(functions))
                    with torch.no_grad():
                        into.add(flows, first=n == 0)
    finally:
        for module in was_training:
            module.training = True
    return total


def _functions(
    model: PeftModel, batch: Batch, likelihood: Likelihood, samples: int, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """(log p(y | f) [B], functions [B] of f the squares of whose gradients add up to the curvature)."""
    generators = [_generator(seed, name) for name in batch.ids]
    if isinstance(likelihood, Tokens):
        f, drawn = likelihood.sampled(model, batch, generators, samples)
        return likelihood.log_prob(f, batch), [d / math.sqrt(samples) for d in drawn]
    f = likelihood.outputs(model, batch)
    if not bool(torch.isfinite(f).all()):
        wrong = batch.ids[int((~torch.isfinite(f)).any(-1).nonzero()[0])]
        raise UserError(f"the outputs for example {wrong!r} are not finite: look at the adapter's weights")
    logp = likelihood.log_prob(f.detach(), batch)
    if not 0 < samples < f.shape[-1]:
        return logp, list(_exact(f, likelihood))
    functions = []
    for _ in range(samples):
        rows = f.detach().cpu().split(1)
        labels = torch.cat([likelihood.sample(row, g) for row, g in zip(rows, generators, strict=True)])
        relabelled = replace(batch, target=labels.to(f.device))
        functions.append(likelihood.log_prob(f, relabelled) / math.sqrt(samples))
    return logp, functions


def _exact(f: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    values, vectors = torch.linalg.eigh(likelihood.hessian(f.detach().double()).cpu())
    keep = values > _NEGLIGIBLE * values.amax(-1, keepdim=True)
    roots = vectors * torch.where(keep, values, 0).sqrt()[:, None, :]
    used = [c for c in reversed(range(f.shape[-1])) if bool(keep[:, c].any())]
    for c in used or [f.shape[-1] - 1]:
        yield (f * roots[:, :, c].to(f)).sum(-1)


def _generator(seed: int, name: str) -> torch.Generator:
    """Of one example: how examples are batched makes no difference to its labels."""
    digest = hashlib.blake2b(f"{seed} curvature {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
