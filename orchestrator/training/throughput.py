"""How fast a run goes and what it takes of its machine, as numbers for the record.

In: the position of a run, again and again. Out: speed since the time before, over steps alone,
without validation and saving; memory of this worker; and the machine's load under the names that
MLflow's pages show as system metrics. MFU is the share of a GPU's best figure and is left out for a
card whose figure is not known; a CPU has no such figure, so there FLOPs per second have to do.
"""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from orchestrator.training.distributed import World
from orchestrator.training.loop import Position
from orchestrator.training.peak_flops import gpu_peak_flops

MEGABYTE, GIGABYTE = 1e6, 1e9


class ThroughputMeter:
    """Measures from one call to the next."""

    def __init__(self, position: Position, world: World, precision: str) -> None:
        """Begin at a position, with the arithmetic that tells the best figure of a GPU."""
        self._last, self._world = replace(position), world
        self._gpu = torch.device(world.device) if world.device.startswith("cuda") else None
        name = torch.cuda.get_device_name(self._gpu) if self._gpu else ""
        self._peak = gpu_peak_flops(name, precision) if self._gpu else None
        psutil.cpu_percent()  # The first call only starts its clock.

    def measure(self, position: Position) -> dict[str, float]:
        """Return the numbers since the last call, by name; `train/memory_gb` is the most so far on
        a GPU, and the present resident set on a CPU."""
        last, self._last = self._last, replace(position)
        seconds = max(position.seconds - last.seconds, 1e-9)
        flops_per_second = (position.flops - last.flops) / seconds
        found = {
            "train/tokens_per_second": (position.num_tokens - last.num_tokens) / seconds,
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
        found = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
        }
        if self._gpu:
            free, total = torch.cuda.mem_get_info(self._gpu)
            name = f"system/gpu_{self._gpu.index or 0}_memory_usage"
            found[f"{name}_megabytes"] = (total - free) / MEGABYTE
            found[f"{name}_percentage"] = 100.0 * (total - free) / total
        return found
