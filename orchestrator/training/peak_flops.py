"""How fast a processor multiplies matrices at best: what a plan's hours and an MFU relate to.

For GPUs the makers' dense figures; for a CPU, which has none that hold, products of two matrices
measured for a moment, several times: a busy machine gives another figure each time.
"""

from __future__ import annotations

import time

import torch

ASSUMED_GPU = "H100"
"""What a plan takes a GPU to be where there is none to ask."""
ASSUMED_GPU_BYTES = 79 * 2**30
"""Its memory, as it is free before anything runs."""

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
    """Return the largest FLOP/s of a GPU; None for one that is not known.

    Args:
        name: As PyTorch gives it, such as `NVIDIA H100 80GB HBM3`.
        precision: `bf16` or `fp32`.
    """
    known = next((peaks for model, peaks in _PEAK_TFLOPS.items() if model in name), None)
    return known[precision] * 1e12 if known else None


def installed_gpu() -> str | None:
    """Return the name of this machine's first GPU, if it has one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def measure_cpu_flops(count: int = 9, seconds: float = 0.03) -> list[float]:
    """Return the FLOP/s of float32 matrix products on this CPU, with all threads of PyTorch.

    Args:
        count: How often it is measured.
        seconds: How long each time; short, so that the best one is not disturbed by what else runs.

    Returns:
        The speeds, the best first.
    """
    a = torch.ones(_SIZE, _SIZE)
    a @ a
    return sorted((_measured_speed(a, seconds) for _ in range(count)), reverse=True)


def _measured_speed(a: torch.Tensor, seconds: float) -> float:
    started, num_products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        a @ a
        num_products += 1
    return 2.0 * _SIZE**3 * num_products / elapsed
