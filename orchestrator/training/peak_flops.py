"""Peak FLOP/s of GPUs, by their vendors' figures."""

from __future__ import annotations

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


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU such as `NVIDIA H100 80GB HBM3`; None if it is unknown."""
    known = next((peaks for model, peaks in _PEAK_TFLOPS.items() if model in name), None)
    return known[precision] * 1e12 if known else None
