"""The GPUs that plans may assume, such as on a login node that has none."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.settings.cluster import GpuModel


@dataclass(frozen=True)
class AssumedGpu:
    """A model of GPU: its name as `gpu_peak_flops` takes it, and its memory."""

    name: str
    free_bytes: int
    """Memory that is free before anything runs: its driver takes up to 1 GiB."""


GPUS: dict[GpuModel, AssumedGpu] = {
    "A100-40GB": AssumedGpu("A100 SXM4", 39 * 2**30),
    "A100-80GB": AssumedGpu("A100 SXM4", 79 * 2**30),
    "H100": AssumedGpu("H100", 79 * 2**30),
    "H200": AssumedGpu("H200", 139 * 2**30),
    "L40S": AssumedGpu("L40S", 44 * 2**30),
    "RTX-4090": AssumedGpu("RTX 4090", 23 * 2**30),
}
USUAL_GPU: GpuModel = "H100"
"""The model that plans assume where none is installed and none is named: the SXM module."""
