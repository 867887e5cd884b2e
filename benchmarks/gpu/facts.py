"""What the report says about the machine: GPU, driver, versions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu.setup import Setup
from benchmarks.machine import machine_facts
from orchestrator.planning.machine import driver_version
from orchestrator.training.peak_flops import gpu_peak_flops


def report_facts(setup: Setup) -> dict[str, Any]:
    """Return names to values; `name` is that of the GPU or processor."""
    facts = machine_facts()
    shared = {
        "processor": f"{facts['cpu']}, {facts['cpus']} CPUs",
        "torch": facts["torch"],
        "python": facts["python"],
        "size": "toy: the figures mean nothing" if setup.is_toy else "full",
    }
    if setup.device == "cpu":
        return {"name": f"no GPU ({facts['cpu']})", **shared}
    properties = torch.cuda.get_device_properties(0)
    peak = gpu_peak_flops(properties.name, "bf16")
    return {
        "name": properties.name,
        "GPUs": setup.num_gpus,
        "memory (GiB)": round(properties.total_memory / 2**30, 1),
        "L2 cache (MB)": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "compute capability": f"{properties.major}.{properties.minor}",
        "bf16 peak (TFLOP/s)": peak / 1e12 if peak else "unknown, so there is no MFU",
        "driver": driver_version() or "unknown",
        "CUDA of PyTorch": torch.version.cuda,
        "NCCL": _nccl(),
        **shared,
    }


def _nccl() -> str:
    with suppress(Exception):  # A build without NCCL.
        nccl: Any = torch.cuda.nccl
        return ".".join(map(str, nccl.version()))
    return "none"
