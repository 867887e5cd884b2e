"""The time that recorded kernels would take on an H100, and the share of its peak that is used.

A kernel takes the longest of three times: to move its bytes, to compute its FLOPs, to be launched.
The rates are round figures that good kernels reach, not peaks. The sum is an estimate, and rather a
lower bound: kernels run one after the other, and the host is never late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from benchmarks.gpu_model.trace import Kernel
from orchestrator.training.peak_flops import ASSUMED_GPU, gpu_peak_flops

BYTES_PER_SECOND = 2.7e12
HALF_PRODUCT_FLOPS = 620e12
"""Of matrix products in bfloat16, per second."""
FLOAT_PRODUCT_FLOPS = 45e12
"""Of matrix products in float32."""
ATTENTION_FLOPS = {"forward": 380e12, "backward": 320e12}
SECONDS_PER_LAUNCH = 2.5e-6


def seconds(kernel: Kernel) -> float:
    """Estimate the time of one kernel."""
    rate = HALF_PRODUCT_FLOPS
    if kernel.is_attention:
        rate = ATTENTION_FLOPS["backward" if "backward" in kernel.name else "forward"]
    elif kernel.dtype == torch.float32:
        rate = FLOAT_PRODUCT_FLOPS
    return max(
        kernel.num_bytes / BYTES_PER_SECOND,
        kernel.flops / rate,
        kernel.launches * SECONDS_PER_LAUNCH,
    )


def total_seconds(kernels: Iterable[Kernel]) -> float:
    """Estimate the time of kernels that run one after the other."""
    return sum(map(seconds, kernels))


def utilization(flops: float, kernels: Iterable[Kernel]) -> float:
    """Return the model FLOPs utilization (MFU): needed FLOPs over what the GPU's peak allows."""
    peak = gpu_peak_flops(ASSUMED_GPU, "bf16")
    assert peak is not None
    return flops / total_seconds(kernels) / peak


def by_share(
    kernels: Iterable[Kernel], name: Callable[[Kernel], str]
) -> dict[str, tuple[int, float, float]]:
    """Group kernels by a name: launches, bytes and seconds of each, the longest time first."""
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[name(kernel)].append(kernel)
    sums = {
        name: (
            sum(kernel.launches for kernel in group),
            sum(kernel.num_bytes for kernel in group),
            total_seconds(group),
        )
        for name, group in groups.items()
    }
    return dict(sorted(sums.items(), key=lambda item: -item[1][2]))
