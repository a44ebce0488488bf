"""Seconds of generation, scoring and training on one device, from FLOPs, bytes and operations.

A pass costs

    device = max(FLOPs / rate, batches * weight bytes / bandwidth) + traffic / bandwidth
    host   = operations * seconds an operation
    pass   = max(device, host)

on a GPU, which computes while the host goes on; on a processor all four terms add up, weights at the rate at which a
product of few rows gets through them. `traffic` is what moves through memory outside
the matrix products: normalisation, rotation, activation, residuals, the fp32 casts of LoRA, the logits. With F the
FLOPs of a forward pass, F = F_matrix + F_attention + F_adapter + F_head:

    training, full weights   3 F_matrix + 3 F_attention                  forward, d input, d weight
    training, LoRA           2 F_matrix + 3 F_attention + 3 F_adapter    no d weight where weights are frozen
    full recompute           + F - F_head, selective + SELECTIVE times that
    LM head                  its logits never exist whole: 2 F_head where it is frozen (the gradient is made beside the
                             log-probability, scoring/head.py), 4 F_head where it is trained (logits are made again)

    decode      steps * weight bytes + sum over texts of (R P + R^2 / 2) * cache bytes a token
    steps       sum over batches of the longest text (hf); max(longest, total / batch) (vLLM, which refills its batch)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..engines.hf import DROP_SHARE
from ..scoring.logprobs import microbatches
from .hardware import HALF, LAYER_OPERATIONS, Device
from .lengths import TextLength
from .model_size import Linear, ModelSize
from .workload import Draws, Layout, Rows

Recompute = Literal["none", "selective", "full"]

SELECTIVE = 0.2
"""Share of a forward pass that selective checkpointing repeats (attention and what is cheap to make again)."""

ADAPTED_OPERATIONS, LEAN_OPERATIONS = 7, 3
"""Operations more for each matrix that PEFT adapts; the same on the path without gradient."""

FUSED_TRAFFIC = 1 / 3
"""Share of the eager traffic that vLLM's fused kernels leave."""

VLLM_STEP = 1.5e-3
"""Seconds a decode step of vLLM costs beside the device's work: scheduling, sampling, replay of the captured graph."""

ALL_REDUCE_LATENCY = 10e-6
"""Seconds of a small all-reduce inside a node, two a layer under tensor parallelism."""

MOST_ROWS = 1024
"""Rows whose lengths are laid out to find the padding; more repeat the pattern."""


@dataclass(frozen=True)
class Setup:
    """The model as it is run. adapter: parameters of one LoRA adapter, 0 for full weights; adapted: the matrices it is
    on. budget, score_budget: token slots of a micro-batch in training and scoring."""

    size: ModelSize
    device: Device
    dtype: str
    adapter: int
    adapted: tuple[Linear, ...]
    layout: Layout
    budget: int
    score_budget: int
    recompute: Recompute = "none"

    @property
    def width(self) -> int:
        return 2 if self.dtype in HALF else 4

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that a forward pass reads."""
        return self.width * (self.size.body + self.size.head)

    @property
    def trained(self) -> int:
        return self.adapter or self.size.total


@dataclass(frozen=True)
class Cost:
    """Of one device. tokens: forwarded slots, or drawn ones. flops: those done. host: seconds of the host alone.
    floor: of drawing the longest text by itself, which no further device shortens."""

    seconds: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    batches: float = 0.0
    host: float = 0.0
    floor: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, n) + getattr(other, n) for n in Cost.__dataclass_fields__))


# ------------------------------------------------------------------------------------------------ the pieces


def pass_seconds(
    device: Device, dtype: str, flops: float, weight_bytes: float, traffic: float, operations: float
) -> float:
    """The two equations at the top of this file."""
    products, reading = flops / device.flops(dtype), weight_bytes / device.weight_bytes_per_second(dtype)
    moving, host = traffic / device.bytes_per_second, operations * device.dispatch
    if device.asynchronous:
        return max(max(products, reading) + moving, host)
    return products + reading + moving + host


def layer_traffic(size: ModelSize, width: int) -> float:
    """Bytes a token moves in one eager decoder layer's forward pass outside matrix products.

    Two RMSNorms in fp32 (cast, square, mean, scale, cast, weight), the rotation of queries and keys (five passes),
    gate and product of the MLP, two residual additions.
    """
    norm = 28 if width == 4 else 24 + 4 * width
    rotated = size.query_width + size.kv_width
    return 2 * norm * size.hidden + width * (10 * rotated + 5 * size.intermediate + 6 * size.hidden)


def adapter_traffic(adapted: tuple[Linear, ...], width: int, lean: bool) -> float:
    """Bytes a token moves through LoRA in all layers: the sum of two outputs, and where gradients flow and the base is
    not fp32, PEFT's casts of input and output."""
    inputs = sum(linear.inputs * linear.count for linear in adapted)
    outputs = sum(linear.outputs * linear.count for linear in adapted)
    if lean:
        return width * (inputs + 4 * outputs)
    casts = (4 + width) * inputs if width < 4 else 0
    return casts + 4 * inputs + 24 * outputs


def logit_traffic(size: ModelSize) -> float:
    """Bytes one labelled row moves behind the LM head: the cast to fp32, logsumexp and gather."""
    return 4 * 4 * size.vocab


def cut(rows: Rows, groups: float, layout: Layout, budget: int) -> tuple[float, float]:
    """(token slots, micro-batches) of `groups` groups' rows. `padded` lays typical lengths out as the padded path
    does: by length, longest first, every row as wide as the longest of its micro-batch."""
    share = groups / rows.groups
    tokens = rows.tokens(layout) * share
    if layout == "packed":
        return tokens, math.ceil(tokens / budget)
    if layout == "tree":
        batches = math.ceil(tokens / max(budget - rows.common, rows.length))
        return tokens + batches * rows.common, batches
    count = max(1, math.ceil(rows.count * share))
    laid_out = min(count, MOST_ROWS)
    fixed = rows.length - rows.trace.mean - 1
    lengths = [max(1, round(fixed + z)) for z in rows.trace.typical(laid_out)]
    cuts = microbatches(lengths, budget)
    slots = sum(len(batch) * max(lengths[i] for i in batch) for batch in cuts)
    return tokens * slots / sum(lengths), len(cuts) * count / laid_out


# ------------------------------------------------------------------------------------------------ passes over rows


def score(setup: Setup, rows: Rows, groups: float) -> Cost:
    """One device's forward pass over the rows of `groups` groups."""
    size, layout = setup.size, setup.layout
    slots, batches = cut(rows, groups, layout, setup.score_budget)
    labelled = rows.head_rows * groups / rows.groups
    adapter = 0 if rows.adapter == "base" else setup.adapter
    flops = size.forward_flops(slots, rows.context(layout), labelled, adapter)
    each = size.layers * layer_traffic(size, setup.width)
    if adapter:
        each += adapter_traffic(setup.adapted, setup.width, lean=True)
    traffic = slots * each + labelled * logit_traffic(size)
    operations = batches * _operations(setup, lean=True)
    seconds = pass_seconds(
        setup.device, setup.dtype, flops, batches * setup.weight_bytes, traffic, operations
    )
    return Cost(seconds, slots, flops, batches, operations * setup.device.dispatch)


def train(setup: Setup, rows: Rows, groups: float) -> Cost:
    """One device's forward and backward pass over the rows of `groups` groups."""
    size, layout = setup.size, setup.layout
    slots, batches = cut(rows, groups, layout, setup.budget)
    labelled = rows.head_rows * groups / rows.groups
    flops = train_flops(size, slots, rows.context(layout), labelled, setup.adapter, setup.recompute)
    passes = 3 + {"none": 0, "selective": SELECTIVE, "full": 1}[setup.recompute]
    each = size.layers * layer_traffic(size, setup.width)
    if setup.adapter:
        each += adapter_traffic(setup.adapted, setup.width, lean=False)
    traffic = passes * slots * each + (1 if setup.adapter else 2) * labelled * logit_traffic(size)
    operations = passes * batches * _operations(setup, lean=False)
    weight_bytes = passes * batches * setup.weight_bytes
    # PEFT's adapters run in fp32 whatever the base is
    rates = setup.device.flops(setup.dtype) / setup.device.flops("float32")
    slow = flops + (rates - 1) * passes * 2 * slots * setup.adapter
    seconds = pass_seconds(setup.device, setup.dtype, slow, weight_bytes, traffic, operations)
    return Cost(seconds, slots, flops, batches, operations * setup.device.dispatch)


def train_flops(
    size: ModelSize,
    tokens: float,
    context: float,
    head_rows: float,
    adapter: int,
    recompute: Recompute = "none",
) -> float:
    """FLOPs of forward and backward, as derived at the top of this file. adapter: parameters, 0 for full weights."""
    matrix = 2 * tokens * size.body
    attention = tokens * size.attention_flops(context)
    lora = 2 * tokens * adapter
    head = 2 * head_rows * size.head
    frozen = 2 if adapter else 3
    again = {"none": 0.0, "selective": SELECTIVE, "full": 1.0}[recompute]
    body = (frozen + again) * matrix + (3 + again) * (attention + lora)
    return body + (2 if adapter else 4) * head


def optimiser_seconds(setup: Setup, shards: int = 1) -> float:
    """AdamW on one device's share of the trained parameters: read weight, gradient and two moments, write three."""
    width = 4 if setup.adapter else setup.width
    return 7 * width * setup.trained / shards / setup.device.bytes_per_second


def _operations(setup: Setup, lean: bool) -> float:
    each = LEAN_OPERATIONS if lean else ADAPTED_OPERATIONS
    return setup.size.layers * LAYER_OPERATIONS + each * sum(li.count for li in setup.adapted)


# ------------------------------------------------------------------------------------------------ generation


@dataclass(frozen=True)
class Sampler:
    """One engine. batch: texts drawn together; tensor_parallel: devices it spans; graphs: kernels fused and replayed
    from a captured graph (vLLM), its batch refilled as texts end."""

    batch: int
    graphs: bool
    tensor_parallel: int = 1


def generate(setup: Setup, sampler: Sampler, draws: Draws, prompts: float) -> Cost:
    """One engine's draws behind `prompts` of the different prompts: prefill once for each, then decode."""
    decoded = decode(setup, sampler, draws, prompts)
    size = setup.size
    calls = math.ceil(prompts * draws.sequences / draws.prompts / sampler.batch)
    tokens = prompts * max(draws.prompt - draws.reused - draws.common, 1) + calls * draws.common
    context = (draws.prompt + draws.reused) / 2
    flops = size.forward_flops(tokens, context, prompts, setup.adapter) / sampler.tensor_parallel
    each = size.layers * layer_traffic(size, setup.width) + adapter_traffic(setup.adapted, setup.width, True)
    traffic = tokens * each * (FUSED_TRAFFIC if sampler.graphs else 1) / sampler.tensor_parallel
    operations = calls * _operations(setup, lean=True)
    weights = calls * setup.weight_bytes / sampler.tensor_parallel
    seconds = pass_seconds(setup.device, setup.dtype, flops, weights, traffic, operations)
    host = operations * setup.device.dispatch
    return decoded + Cost(seconds, 0.0, flops * sampler.tensor_parallel, host=host)


def decode(setup: Setup, sampler: Sampler, draws: Draws, prompts: float) -> Cost:
    """One engine's decoding; `tokens` are those drawn."""
    size, device, length, tp = setup.size, setup.device, draws.length, sampler.tensor_parallel
    texts = prompts * draws.sequences / draws.prompts
    steps = decode_steps(sampler, texts, length)
    drawn = texts * length.mean
    # rows that are done stay in the hf engine's batch until they are 1 in DROP_SHARE: half of that on average
    rows = drawn * (1 if sampler.graphs else 1 + 0.5 / DROP_SHARE)
    attended = attended_tokens(texts, draws.prompt, length)
    flops = size.forward_flops(rows, attended / max(drawn, 1), rows, setup.adapter) / tp
    each = size.layers * layer_traffic(size, setup.width) + adapter_traffic(setup.adapted, setup.width, True)
    each = each * (FUSED_TRAFFIC if sampler.graphs else 1) + logit_traffic(size)
    traffic = (attended * size.kv_bytes(setup.width) + rows * each) / tp
    operations = 0.0 if sampler.graphs else steps * _operations(setup, lean=True)
    weights = steps * setup.weight_bytes / tp
    seconds = pass_seconds(device, setup.dtype, flops, weights, traffic, operations)
    a_step = VLLM_STEP if sampler.graphs else 0.0
    if tp > 1:
        a_step += 2 * size.layers * ALL_REDUCE_LATENCY
    alone = pass_seconds(device, setup.dtype, 0.0, weights / steps, 0.0, operations / steps)
    return Cost(
        seconds + steps * a_step,
        drawn,
        flops * tp,
        host=operations * device.dispatch,
        floor=length.longest(texts) * (alone + a_step),
    )


def attended_tokens(texts: float, prompt: float, length: TextLength) -> float:
    """Cached tokens that all decode steps read: sum over texts of R P + R^2 / 2."""
    return texts * (length.mean * prompt + length.second_moment / 2)


def decode_steps(sampler: Sampler, texts: float, length: TextLength) -> float:
    """Forward passes of one token a text. Without refilling, a batch lasts as long as its longest text."""
    if sampler.graphs:
        return max(length.longest(texts), texts * length.mean / sampler.batch)
    return math.ceil(texts / sampler.batch) * length.longest(min(texts, sampler.batch))
