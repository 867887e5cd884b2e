"""The FLOP/s that training is assumed to reach; the hours of a plan follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from orchestrator.settings import Settings
from orchestrator.training.peak_flops import (
    ASSUMED_GPU,
    gpu_peak_flops,
    installed_gpu,
    measure_cpu_flops,
)

DEFAULT_UTILIZATION = 0.4
"""Share of the peak that well-tuned training reaches."""


@dataclass(frozen=True, kw_only=True)
class TrainingRate:
    """Assumed speed of one worker."""

    peak_flops: float
    utilization: float
    """Share of the peak that training reaches (MFU), assumed."""
    peak_source: str
    """Device or measurement that the peak is from, as text."""
    median_flops: float | None = None
    """FLOP/s while other programs use this machine too; None where only the peak is known."""

    @property
    def flops_range(self) -> tuple[float, float]:
        """FLOP/s for the shortest and the longest time."""
        return self.peak_flops, self.median_flops or self.peak_flops


def assumed_training_rate(settings: Settings, utilization: float | None = None) -> TrainingRate:
    """Return the assumed rate of one worker.

    On GPUs, the peak is that of the installed GPU in the recipe's precision, or an H100's where
    there is no GPU or its peak is unknown. On CPUs, the peak is measured for a moment.
    """
    utilization = utilization or DEFAULT_UTILIZATION
    if not settings.cluster.num_gpus:
        speeds = [speed / settings.cluster.num_workers for speed in measure_cpu_flops()]
        return TrainingRate(
            peak_flops=speeds[0],
            median_flops=median(speeds),
            utilization=utilization,
            peak_source="matrix products measured here just now, the best and the median",
        )
    name, precision = installed_gpu() or ASSUMED_GPU, settings.training.precision
    peak = gpu_peak_flops(name, precision)
    if peak is None:
        name, peak = ASSUMED_GPU, gpu_peak_flops(ASSUMED_GPU, precision)
    assert peak is not None
    return TrainingRate(
        peak_flops=peak, utilization=utilization, peak_source=f"{name}, {precision}, dense"
    )
