"""The devices of a run: who samples, who trains, how the training is sharded, and what must travel between them.

Ring collectives over n devices move (n - 1) / n of the payload through every device's wire, an all-reduce twice that
(Patarasuk and Yuan 2009). ZeRO-2 and ZeRO-3: Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .step_cost import Setup

Sharding = Literal["none", "ddp", "zero2", "zero3", "fsdp2"]
SHARDINGS: tuple[Sharding, ...] = ("none", "ddp", "zero2", "zero3", "fsdp2")
SPLIT_WEIGHTS = ("zero3", "fsdp2")

DISK = 1e9
"""Bytes a second of the disk through which an adapter reaches another process."""

SYNC_LATENCY = 0.05
"""Seconds of a weight update however small: pausing the engine, requests, loading."""


@dataclass(frozen=True)
class Cluster:
    """devices: all of them, on `nodes` machines. samplers: how many of them only sample, 0 where all devices do both in
    turn. tensor_parallel: devices an engine spans."""

    devices: int = 1
    nodes: int = 1
    samplers: int = 0
    sharding: Sharding = "none"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("nodes", 1), ("samplers", 0), ("tensor_parallel", 1)):
            if getattr(self, name) < least:
                what = "sampling devices" if name == "samplers" else name.replace("_", " ")
                raise UserError(f"{what} must be >= {least}, got {getattr(self, name)}")
        if self.sharding not in SHARDINGS:
            raise UserError(f"sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.devices % self.nodes:
            raise UserError(f"{self.devices} devices cannot be split evenly over {self.nodes} nodes")
        if self.samplers >= self.devices and self.samplers:
            raise UserError(f"{self.samplers} of {self.devices} devices sample: none is left to train")
        if self.sampling % self.tensor_parallel:
            raise UserError(
                f"{self.sampling} sampling devices cannot be split into engines of {self.tensor_parallel} "
                "(tensor parallel): change one of them"
            )
        if self.sharding == "none" and self.ranks > 1:
            raise UserError(
                f"{self.ranks} devices train: choose a sharding, ddp where the model fits one device"
            )

    @property
    def ranks(self) -> int:
        """Devices that train."""
        return self.devices - self.samplers

    @property
    def sampling(self) -> int:
        """Devices that sample."""
        return self.samplers or self.devices

    @property
    def engines(self) -> int:
        return self.sampling // self.tensor_parallel

    def wire(self, setup: Setup) -> float:
        """Bytes a second one way through a device's slowest wire in a collective of all ranks."""
        return setup.device.link if self.nodes == 1 else min(setup.device.link, setup.device.network)

    @property
    def share(self) -> float:
        """(n - 1) / n over the ranks."""
        return (self.ranks - 1) / self.ranks


def gradient_seconds(cluster: Cluster, setup: Setup) -> float:
    """Once a step: all-reduce of the gradients (ddp), or reduce-scatter and all-gather of the weights (zero2), which
    moves as much."""
    if cluster.sharding not in ("ddp", "zero2"):
        return 0.0
    width = 4 if setup.adapter else setup.width
    return 2 * cluster.share * width * setup.trained / cluster.wire(setup)


def gather_seconds(cluster: Cluster, setup: Setup, training: bool) -> float:
    """Once a micro-batch where weights are split: all-gather for the forward pass and, in training, again for the
    backward pass, and reduce-scatter of the gradients."""
    if cluster.sharding not in SPLIT_WEIGHTS:
        return 0.0
    weights = setup.width * setup.size.total
    gradients = (4 if setup.adapter else setup.width) * setup.trained
    moved = 2 * weights + gradients if training else weights
    return cluster.share * moved / cluster.wire(setup)


def sync_seconds(cluster: Cluster, setup: Setup, same_process: bool, adapter_only: bool) -> float:
    """Once a window: the new weights reach the engines. Nothing travels where the engine samples with the trained model
    itself, whole on every device; adapters go through files, both of them; full weights are gathered and broadcast."""
    if same_process:  # under split weights it samples from a whole copy, gathered for the window
        gathered = cluster.share * setup.width * setup.size.total / cluster.wire(setup)
        return gathered if cluster.sharding in SPLIT_WEIGHTS else 0.0
    if adapter_only and setup.adapter:
        return SYNC_LATENCY + 2 * 2 * 4 * setup.adapter / DISK
    weights = setup.width * setup.size.total
    merge = 3 * weights / setup.device.bytes_per_second if setup.adapter else 0.0
    return SYNC_LATENCY + merge + weights / cluster.wire(setup)
