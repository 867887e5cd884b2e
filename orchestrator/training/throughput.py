"""Speed and memory of a run, as metrics for the journal; without validation and saving.

The load of the machine has the names of MLflow's system metrics. MFU is the share of the GPU's peak
FLOP/s; it is left out if the peak is not known, and on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import psutil
import torch

from orchestrator.training.distributed import World
from orchestrator.training.gpu_load import MEGABYTE, gpu_loads
from orchestrator.training.loop import Position
from orchestrator.training.peak_flops import gpu_peak_flops
from orchestrator.workspace.journal import SPEED_METRIC

GIGABYTE = 1e9


class ThroughputMeter:
    """Measures the speed between two calls of `measure`."""

    def __init__(
        self,
        position: Position,
        world: World,
        precision: str,
        *,
        gpu_loads: Callable[[World], Mapping[str, float]] = gpu_loads,
    ) -> None:
        self._last, self._world, self._gpu_loads = replace(position), world, gpu_loads
        self._gpu = torch.device(world.device) if world.device.startswith("cuda") else None
        name = torch.cuda.get_device_name(self._gpu) if self._gpu else ""
        if self._gpu:  # Earlier trainings of this process do not count.
            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._peak = gpu_peak_flops(name, precision) if self._gpu else None
        psutil.cpu_percent()  # The first call only starts its clock.

    def measure(self, position: Position) -> dict[str, float]:
        """Return the metrics since the last call; every worker calls it at the same steps.

        `train/memory_gb` is this training's peak so far on a GPU, and the present resident set on
        a CPU.
        """
        last, self._last = self._last, replace(position)
        seconds = max(position.seconds - last.seconds, 1e-9)
        flops_per_second = (position.flops - last.flops) / seconds
        found = {
            SPEED_METRIC: (position.num_tokens - last.num_tokens) / seconds,
            "train/gflops_per_second": flops_per_second / 1e9,
            "train/memory_gb": self._memory_bytes() / GIGABYTE,
            **self._system(),
        }
        if self._peak:
            found["train/mfu"] = flops_per_second / (self._peak * self._world.size)
        return found

    def _memory_bytes(self) -> int:
        if self._gpu:
            return int(torch.cuda.max_memory_allocated(self._gpu))
        return int(psutil.Process().memory_info().rss)

    def _system(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            **self._gpu_loads(self._world),
        }
