"""Devices: data-sheet figures with the share of them that real kernels reach, or what this machine measures of itself.

    rate of matrix products = gemm_share * peak        bytes a second = bandwidth_share * bandwidth

The shares are assumptions (0.70 of both: large cuBLAS products in bf16 reach 0.65 to 0.8 of the data sheet, streaming
copies 0.85 to 0.9, attention over a paged cache less); so are 15 microseconds an operation of an eager model (30
layers of transformers' generate take 20 to 30 ms a token on a GPU however small the model). What is measured needs no
share. Data sheets: NVIDIA H100 SXM, H200 SXM, A100 80GB SXM, L40S, GeForce RTX 4090 (dense figures, without structured
sparsity, fp32 accumulation).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from ..errors import UserError, nearest

GB, TFLOPS = 10**9, 10**12
HALF = ("bfloat16", "float16")

LAYER_OPERATIONS = 40
"""Operations of a decoder layer run eagerly."""


@dataclass(frozen=True)
class Device:
    """half_flops, full_flops: peak FLOP/s of matrix products in bf16 and fp32. bandwidth: bytes a second of memory.
    link, network: bytes a second one way to a device of the same node and of another. dispatch: seconds that the host
    needs for one operation of an eager model; `asynchronous` devices compute meanwhile. half_weights, full_weights:
    bytes a second at which a product with few rows goes through its weights, where that is not the bandwidth."""

    name: str
    half_flops: float
    full_flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    dispatch: float = 15e-6
    asynchronous: bool = True
    gemm_share: float = 0.70
    bandwidth_share: float = 0.70
    measured: bool = False
    half_weights: float | None = None
    full_weights: float | None = None

    def flops(self, dtype: str) -> float:
        """FLOP/s that matrix products of `dtype` reach."""
        return self.gemm_share * self.peak(dtype)

    def peak(self, dtype: str) -> float:
        return self.half_flops if dtype in HALF else self.full_flops

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth_share * self.bandwidth

    def weight_bytes_per_second(self, dtype: str) -> float:
        own = self.half_weights if dtype in HALF else self.full_weights
        return self.bytes_per_second if own is None else self.bandwidth_share * own


DEVICES = {
    "h100": Device("h100", 989 * TFLOPS, 67 * TFLOPS, 3350 * GB, 80 * GB, 450 * GB, 50 * GB),
    "h200": Device("h200", 989 * TFLOPS, 67 * TFLOPS, 4800 * GB, 141 * GB, 450 * GB, 50 * GB),
    "a100": Device("a100", 312 * TFLOPS, 19.5 * TFLOPS, 2039 * GB, 80 * GB, 300 * GB, 25 * GB),
    "l40s": Device("l40s", 362 * TFLOPS, 91.6 * TFLOPS, 864 * GB, 48 * GB, 32 * GB, 12.5 * GB),
    "4090": Device("4090", 165.2 * TFLOPS, 82.6 * TFLOPS, 1008 * GB, 24 * GB, 32 * GB, 3 * GB),
}
"""Network: one 400 Gb/s port a GPU (h100, h200), 200 (a100), 100 (l40s), 25 (4090). fp32 without TF32, torch's
default."""


def device_named(name: str) -> Device:
    """One of DEVICES, or `cpu`: this machine's processor, measured. UserError names the nearest."""
    if name == "cpu":
        return measure_cpu()
    if name not in DEVICES:
        raise UserError(f"no device {name!r}{nearest(name, [*DEVICES, 'cpu'])}")
    return DEVICES[name]


def device_at_hand() -> Device:
    """The GPU that torch sees, by its name; without one the processor, measured. UserError for an unknown GPU."""
    if not torch.cuda.is_available():
        return measure_cpu()
    full = torch.cuda.get_device_name(0)
    for name, device in DEVICES.items():
        if name in full.lower().replace(" ", ""):
            return device
    raise UserError(
        f"no figures for the GPU {full!r}: name the one most like it, --device {'|'.join(DEVICES)}"
    )


@cache
def measure_cpu(seconds: float = 2.0) -> Device:
    """This machine's processor with torch's present number of threads, six timings of seconds / 6 each, the median of
    repetitions: products of 1024 and of 4 rows in bf16 and fp32, a stream through memory, a decoder layer of width 16.

    A product of r rows takes a + b r: b is the rate, a what its weights cost. Do not trust it on a machine that is
    busy.
    """
    share = seconds / 6
    half, half_weights = _gemm_rates(torch.bfloat16, share)
    full, full_weights = _gemm_rates(torch.float32, share)
    return Device(
        name="cpu",
        half_flops=half,
        full_flops=full,
        bandwidth=_bandwidth(share),
        memory=_memory(),
        link=10 * GB,
        network=1 * GB,
        dispatch=_dispatch(share),
        asynchronous=False,
        gemm_share=1.0,
        bandwidth_share=1.0,
        measured=True,
        half_weights=half_weights,
        full_weights=full_weights,
    )


def _gemm_rates(dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """(FLOP/s of many rows, weight bytes a second of few) through sixteen matrices of a small model's MLP, too many
    for a cache that a core has to itself."""
    weights = [torch.randn(2048, 768).to(dtype) for _ in range(16)]
    numbers = sum(w.numel() for w in weights)
    many, few = torch.randn(1024, 768).to(dtype), torch.randn(4, 768).to(dtype)

    def products(x: Tensor) -> None:
        for w in weights:
            torch.nn.functional.linear(x, w)

    one = _median_seconds(lambda: torch.nn.functional.linear(many, weights[0]), seconds)
    rate = 2 * len(many) * weights[0].numel() / one
    reading = _median_seconds(lambda: products(few), seconds) - 2 * len(few) * numbers / rate
    return rate, numbers * weights[0].element_size() / max(reading, 1e-9)


def _dispatch(seconds: float) -> float:
    """Seconds of an operation on next to nothing, Python's part included: a Llama of width 16, one token."""
    layers = 4
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    decoder = LlamaModel(config).eval()
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        return _median_seconds(lambda: decoder(ids, use_cache=False), seconds) / (layers * LAYER_OPERATIONS)


def _bandwidth(seconds: float) -> float:
    """Read and write of 64 MiB each, more than any cache that a core has to itself."""
    x = torch.ones(16 * 2**20)
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / _median_seconds(lambda: torch.add(x, 1.0, out=y), seconds)


def _median_seconds(function: Callable[[], object], seconds: float) -> float:
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
