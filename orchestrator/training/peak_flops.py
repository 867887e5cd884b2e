"""Peak FLOP/s of a GPU (the vendor's figures) or a CPU (measured by multiplying matrices)."""

from __future__ import annotations

import time

import torch

ASSUMED_GPU = "H100"
"""GPU that estimates assume on a machine without one."""
ASSUMED_GPU_BYTES = 79 * 2**30
"""Its free memory before anything runs."""

_PEAK_TFLOPS = {
    # Dense, without sparsity: bfloat16 on tensor cores, float32 on ordinary ones.
    "B200": {"bf16": 2250.0, "fp32": 75.0},
    "H200": {"bf16": 989.0, "fp32": 67.0},
    "H100": {"bf16": 989.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp32": 19.5},
    "L40S": {"bf16": 362.0, "fp32": 91.6},
}
_SIZE = 512


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU such as `NVIDIA H100 80GB HBM3`; None if it is unknown."""
    known = next((peaks for model, peaks in _PEAK_TFLOPS.items() if model in name), None)
    return known[precision] * 1e12 if known else None


def installed_gpu() -> str | None:
    """Return the name of this machine's first GPU; None without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def measure_cpu_flops(count: int = 9, seconds: float = 0.03) -> list[float]:
    """Return the FLOP/s of float32 matrix products on this CPU, the best first.

    The `count` measurements are short, so that other programs disturb few of them.
    """
    a = torch.ones(_SIZE, _SIZE)
    a @ a  # Warm-up.
    speeds = []
    for _ in range(count):
        started, num_products = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            a @ a
            num_products += 1
        speeds.append(2.0 * _SIZE**3 * num_products / elapsed)
    return sorted(speeds, reverse=True)
