"""The FLOP/s that training is assumed to reach; the hours of a plan follow from it.

Nothing is measured. The shares of a GPU's peak are around 20%: traces of eager steps at 340M
parameters give 17 to 28%. CPUs differ more, and no table knows their peaks.
"""

from __future__ import annotations

from orchestrator.planning.installed_gpus import installed_gpus
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.records.record import Record
from orchestrator.training.peak_flops import ASSUMED_GPU, gpu_peak_flops

GPU_SHARES = (0.15, 0.25)
"""Shares of a GPU's peak that training reaches."""
CPU_PEAK_FLOPS = 1e11
"""Assumed peak of one CPU core: 2 fused products of 8 numbers in each of 3 billion cycles."""
CPU_SHARES = (0.1, 0.5)


class Rate(Record):
    """Assumed speed of one device."""

    peak_flops: float
    """FLOP/s of one GPU or CPU core."""
    shares: tuple[float, float]
    """Lowest and highest share of the peak that training reaches (MFU)."""
    source: str
    """What the peak is of, as text."""

    @property
    def flops_range(self) -> tuple[float, float]:
        """Highest and lowest FLOP/s: for the shortest and the longest time."""
        least, most = self.shares
        return self.peak_flops * most, self.peak_flops * least


def assumed_rate(training: PlannedTraining, share: float | None = None) -> Rate:
    """Return the assumed rate of one of a training's devices.

    The peak is that of the installed GPU in the recipe's precision, or an H100's where there is no
    GPU or its peak is unknown.

    Args:
        share: Share of the peak that training reaches; a usual range if unset.
    """
    given = (share, share) if share else None
    if not training.on_gpus:
        shares = given or CPU_SHARES
        return Rate(peak_flops=CPU_PEAK_FLOPS, shares=shares, source="a CPU core, assumed")
    name = next((gpu.name for gpu in installed_gpus()), ASSUMED_GPU)
    precision = training.recipe.precision
    peak = gpu_peak_flops(name, precision)
    if peak is None:
        name, peak = ASSUMED_GPU, gpu_peak_flops(ASSUMED_GPU, precision)
    assert peak is not None
    return Rate(peak_flops=peak, shares=given or GPU_SHARES, source=f"{name}, {precision}, dense")
