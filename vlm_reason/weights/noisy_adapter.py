"""An adapter with isotropic noise in the column space of B, and what its draws say about examples.

    theta_s(sigma) = (A' + sigma w E_s, B')        see column_basis.py; w: one number a layer

The noise E_s depends on the seed and s alone, so outputs are smooth functions of sigma. Forwards are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from .adapter import adapter_tensors, base_fingerprint, peft_config_dict, whole
from .artefact import Tree, check_finite
from .column_basis import column_basis
from .examples import Batch, Example, in_batches, make_batch
from .families.diagonal import DiagonalGaussian
from .job import Job
from .per_row import A, B, decoder_layers, draws_in_rows, stack
from .posterior import Origin

CHECKED = 4
"""Examples on which the rotated adapter must say what the given one says."""


class NoisyAdapter:
    """Puts the rotated adapter, which says the same, in place of `job.adapter`. draws: S, even; relative: w in
    proportion to the root mean square of A', 1 on average, else 1. tokens: of one forward, all draws together.

    forwards: draws x examples so far. one_by_one: why draws need a forward each, None where they share one.
    UserError for an adapter without a LoRA layer whose B is not 0, and where the rotation changes what it says.
    """

    def __init__(
        self, job: Job, examples: Sequence[Example], draws: int, relative: bool = False, tokens: int = 16_384
    ) -> None:
        self.job, self.draws, self.tokens, self.forwards = job, draws, tokens, 0
        self.examples = [replace(e, id=str(n)) for n, e in enumerate(examples)]
        given = {key: whole(value) for key, value in adapter_tensors(job.model, job.adapter).items()}
        check_finite(given, f"of adapter {job.adapter!r}")
        basis = column_basis(given)
        if not basis.rows:
            raise UserError(
                f"adapter {job.adapter!r} has no LoRA layer whose B is not 0: there is no update to put noise around; "
                "train it first"
            )
        self.tree, self.rows = basis.tree, basis.rows
        sizes = {key: float(self.tree[key].square().mean().sqrt()) for key in self.rows}
        average = sum(sizes.values()) / len(sizes)
        self.layer_scale = {
            key: size / average if relative and average else 1.0 for key, size in sizes.items()
        }
        self.origin = Origin(
            base_fingerprint(job.model), data_size=len(job.train),
            output_temperature=1.0 if job.start is None else job.start.origin.output_temperature,
        )  # fmt: skip
        self.config = peft_config_dict(job.model, job.adapter)
        self._given = given
        self._rotate()
        self.first_layer, self.one_by_one = self._one_forward()

    def posterior(self, sigma: float) -> DiagonalGaussian:
        own = {
            key: sigma * self.layer_scale[key] * rows.expand_as(self.tree[key])
            for key, rows in self.rows.items()
        }
        return DiagonalGaussian(self.config, self.tree, own, self.origin)

    def at_mean(self) -> Tensor:
        """f [N, C] without noise, fp64."""
        return self._outputs([self.tree], self.examples)[0]

    def outputs(self, sigma: float, first: int, stop: int) -> Tensor:
        """f [S, stop - first, C], fp64, of examples first to stop - 1; draws 2k and 2k + 1 are opposite."""
        draws = self.posterior(sigma).sample(self.draws, self.job.seed, antithetic=True)
        return self._outputs(list(draws), self.examples[first:stop])

    def restore(self) -> None:
        """Put the adapter back as it was given."""
        self._write(self._given)

    def layer_share(self) -> float:
        """Share of the decoder's layers that the counted forwards ran: those below the first with noise run once."""
        if self.one_by_one is not None:
            return 1.0
        layers = len(decoder_layers(self.job.model))
        return (self.first_layer / self.draws + layers - self.first_layer) / layers

    @torch.no_grad()
    def _outputs(self, trees: Sequence[Tree], examples: Sequence[Example]) -> Tensor:
        if not examples:
            return torch.zeros(len(trees), 0, 1, dtype=torch.float64)
        self.forwards += len(trees) * len(examples)
        device = next(self.job.model.parameters()).device
        batches = [b.to(device) for b in in_batches(examples, max(1, self.tokens // len(trees)))]
        run = self._one_by_one if self.one_by_one is not None else self._together
        f = torch.cat(run(trees, batches), 1).double().cpu() / self.origin.output_temperature
        order = torch.tensor([int(name) for batch in batches for name in batch.ids])
        return f[:, order.argsort()]

    def _together(self, trees: Sequence[Tree], batches: Sequence[Batch]) -> list[Tensor]:
        job, parts = self.job, []
        with draws_in_rows(job.model, self._stack(trees), job.adapter):
            for batch in batches:
                f = job.likelihood.outputs(job.model, batch)
                parts.append(f.view(len(trees), len(batch), -1))
        return parts

    def _one_by_one(self, trees: Sequence[Tree], batches: Sequence[Batch]) -> list[Tensor]:
        job, draws = self.job, []
        for tree in trees:
            self._write(tree)
            draws.append([job.likelihood.outputs(job.model, batch) for batch in batches])
        self._write(self.tree)
        return [torch.stack(parts) for parts in zip(*draws, strict=True)]

    def _stack(self, trees: Sequence[Tree]) -> dict[str, Tensor]:
        """Of the layers with noise; the model itself holds the others."""
        keys = [k for key in self.rows for k in (key, key.removesuffix(A) + B)]
        return stack({key: tree[key] for key in keys} for tree in trees)

    def _one_forward(self) -> tuple[int, str | None]:
        """(first decoder layer with noise, why draws cannot share a forward)."""
        biased = [key for key in self.tree if key.endswith(".lora_B.bias")]
        if biased:
            return 0, f"{biased[0]!r} is a bias of B"
        two = self._stack(list(self.posterior(1.0).sample(2, 0)))
        try:
            with draws_in_rows(self.job.model, two, self.job.adapter) as first:
                return first, None
        except UserError as error:
            return 0, str(error)

    @torch.no_grad()
    def _rotate(self) -> None:
        few = make_batch(self.examples[:CHECKED]).to(next(self.job.model.parameters()).device)
        before = self.job.likelihood.outputs(self.job.model, few).double()
        self._write(self.tree)
        apart = (self.job.likelihood.outputs(self.job.model, few).double() - before).abs().max()
        self.forwards += 2 * len(few)
        exact = {p.dtype for p in self.job.model.parameters() if p.is_floating_point()} == {torch.float32}
        if not float(apart) <= (1e-3 if exact else 0.05) * float(before.abs().max()):
            self._write(self._given)
            raise UserError(
                f"rotating the factors of adapter {self.job.adapter!r} changes its outputs by {float(apart):g}: its "
                "layers are not W + s B A"
            )

    def _write(self, tree: Mapping[str, Tensor]) -> None:
        DiagonalGaussian(self.config, self.tree, {}, self.origin).write(
            self.job.model, tree, self.job.adapter
        )
