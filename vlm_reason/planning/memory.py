"""Peak memory of a device: weights, gradients, optimiser, activations, logits, key-value cache.

Bytes a trained parameter costs with AdamW over n ranks, w = bytes of a weight:

                    weight         gradient       moments and master copy
    none, ddp       w              w              2 w
    zero2           w              w / n          12 / n      (bf16: fp32 master copy and moments; fp32: 8 / n)
    zero3           w / n          w / n          12 / n      and the layers gathered at the moment
    fsdp2           w / n          w / n          2 w / n     likewise

LoRA: the base costs its weights alone (split under zero3 and fsdp2); its two adapters are fp32, w = 4.

Activations: what autograd keeps of an eager Llama-type decoder layer with fused attention, in bytes a token:

                         hidden    MLP    query    key or value      with q and k norms, a number of either
    fp32, full weights     24      16       8        4 each                     8
    fp32, LoRA             16      16       8        4 each                     4
    bf16, full weights     16       8       4        2 each                     6
    bf16, LoRA             28      10       8        2 each                     4

(LoRA keeps no input of a frozen matrix, but in bf16 a cast copy of it for every adapted matrix.) Full checkpointing
keeps each layer's input and one layer whole. The LM head holds one chunk of logits and a gradient row for each label.
Not counted: fragmentation, the CUDA context, buffers of collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..scoring.head import CHUNK
from .cluster import SPLIT_WEIGHTS, Cluster
from .step_cost import Sampler, Setup
from .workload import Draws

ADAPTERS = 2
"""Reasoner and posterior: both are there whatever a phase trains."""

_HIDDEN, _MLP, _QUERY, _KEYS, _NORMED = range(5)
_KEPT = {
    (4, False): (24, 16, 8, 8, 8),
    (4, True): (16, 16, 8, 8, 4),
    (2, False): (16, 8, 4, 4, 6),
    (2, True): (28, 10, 8, 4, 4),
}

USABLE = 0.92
"""Share of a device's memory that allocations can count on: the rest is context, fragmentation, buffers."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. A training step holds `state` + `activations` + `logits`, sampling `state` + `cache`;
    devices that only sample hold `sampler_weights` + `cache`."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    cache: float
    sampler_weights: float
    separate: bool

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimiser

    @property
    def training_peak(self) -> float:
        return self.state + self.activations + self.logits

    @property
    def sampling_peak(self) -> float:
        held = 0.0 if self.separate else self.state
        return held + self.sampler_weights + self.cache

    @property
    def peak(self) -> float:
        return max(self.training_peak, self.sampling_peak)


def peak_memory(
    setup: Setup, cluster: Cluster, sampler: Sampler, draws: tuple[Draws, ...], slots: float
) -> Memory:
    """slots: tokens of the largest micro-batch. vLLM holds weights of its own; the hf engine shares the trained ones,
    and under split weights samples from a whole copy."""
    size, n = setup.size, cluster.ranks
    split = n if cluster.sharding in SPLIT_WEIGHTS else 1
    weights = setup.width * size.total / split
    copied = sampler.graphs or split > 1
    if split > 1:
        weights += setup.width * (2 * size.body / size.layers + size.head)
    if setup.adapter:
        weights += 4 * ADAPTERS * setup.adapter / split
    trained = ADAPTERS * setup.adapter or size.total
    gradients, optimiser = _per_parameter(cluster.sharding, 4 if setup.adapter else setup.width, n)
    return Memory(
        weights=weights,
        gradients=gradients * trained,
        optimiser=optimiser * trained,
        activations=activation_bytes(setup, slots),
        logits=min(slots * size.vocab, CHUNK) * (setup.width + 4) + 4 * slots * size.hidden,
        cache=max((_cache(setup, sampler, d) for d in draws), default=0.0),
        sampler_weights=copied * setup.width * size.total / sampler.tensor_parallel,
        separate=cluster.samplers > 0,
    )


def activation_bytes(setup: Setup, slots: float) -> float:
    """Kept between forward and backward for `slots` tokens."""
    layers = setup.size.layers
    whole = layer_activations(setup)
    if setup.recompute == "full":
        return slots * (layers * setup.width * setup.size.hidden + whole)
    return slots * layers * whole


def layer_activations(setup: Setup) -> float:
    """Bytes a token, one layer: the table above."""
    size = setup.size
    kept = _KEPT[setup.width, setup.adapter > 0]
    total: float = kept[_HIDDEN] * size.hidden + kept[_MLP] * size.intermediate
    total += kept[_QUERY] * size.query_width + kept[_KEYS] * size.kv_width
    total += 4 * size.heads + 8  # log-normaliser of attention, one number a norm
    if size.qk_norm:
        total += kept[_NORMED] * (size.query_width + size.kv_width) + 4 * (size.heads + size.kv_heads)
    if setup.adapter:
        rank = setup.adapter / sum((li.inputs + li.outputs) * li.count for li in setup.adapted)
        total += 4 * rank * sum(li.count for li in setup.adapted) / size.layers
    return total


def _per_parameter(sharding: str, width: int, n: int) -> tuple[float, float]:
    """(gradient, optimiser) bytes of a trained parameter."""
    if sharding in ("none", "ddp"):
        return width, 2 * width
    if sharding == "fsdp2":
        return width / n, 2 * width / n
    return width / n, (12 if width == 2 else 8) / n


def _cache(setup: Setup, sampler: Sampler, draws: Draws) -> float:
    """Key-value cache of a full batch. hf: every row as long as the longest of its batch. vLLM, which pages and
    refills: a text met at a random moment, E[R^2] / (2 E[R]) tokens into its own length (it takes what is free beyond
    that)."""
    batch, length = min(sampler.batch, draws.sequences), draws.length
    drawn = length.second_moment / (2 * length.mean) if sampler.graphs else length.longest(batch)
    return batch * (draws.prompt + drawn) * setup.size.kv_bytes(setup.width) / sampler.tensor_parallel
