"""Metrics of a training's throughput and of the machine's load; profiles of a few steps.

Throughput counts steps, without validation and saving. MFU is the share of the GPU's peak FLOP/s;
it is missing if the peak is unknown, and on CPUs. The load has the names of MLflow's system
metrics. A profile changes no result: `profile/trace.json.gz` opens in
https://ui.perfetto.dev. On a GPU, `profile/memory.pickle` has every allocation with its stack, for
https://pytorch.org/memory_viz. On the CPU, the operators are listed in `profile/memory.txt` by the
memory that they allocate.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import profile, schedule

from orchestrator.training.checkpoint import Position
from orchestrator.training.devices import gathered
from orchestrator.training.world import World, gpu_peak_flops
from orchestrator.workspace.files import new_folder
from orchestrator.workspace.journal import GFLOPS_METRIC, SPEED_METRIC
from orchestrator.workspace.layout import PROFILE_NAME

GIGABYTE = 1e9
MEGABYTE = 1e6
STEPS_BEFORE = 3
"""Steps before a profile: they also allocate memory and choose kernels, and the last one warms
the profiler up."""
MAX_MEMORY_EVENTS = 1_000_000
"""Most allocations and releases in a snapshot of the memory; it holds the latest ones."""
MAX_TABLE_ROWS = 50

SENSORS: dict[str, Callable[[torch.device], float]] = {
    "memory_usage_megabytes": lambda device: _used_memory(device)[0] / MEGABYTE,
    "memory_usage_percentage": lambda device: 100.0 * _used_memory(device)[1],
    # PyTorch asks NVML for these, and finds the GPU that CUDA_VISIBLE_DEVICES means.
    "utilization_percentage": lambda device: float(torch.cuda.utilization(device)),
    "power_usage_watts": lambda device: torch.cuda.power_draw(device) / 1000.0,
}
"""Name of a GPU's metric -> what reads it."""


def gpu_loads(world: World) -> dict[str, float]:
    """Return `system/gpu_RANK_SENSOR` of all workers; empty on CPUs. Call it on every worker.

    A metric is missing if its GPU does not answer; utilization and power are missing without the
    extra `gpu`.
    """
    if not world.is_gpu:
        return {}
    load = {}
    for name, read in SENSORS.items():
        with suppress(Exception):  # No NVML, no such sensor, a part of a GPU: each has its error.
            load[name] = read(torch.device(world.device))
    return {
        f"system/gpu_{rank}_{name}": value
        for rank, load_of_one in enumerate(gathered(load, world))
        for name, value in load_of_one.items()
    }


def _used_memory(device: torch.device) -> tuple[int, float]:
    free, total = torch.cuda.mem_get_info(device)
    return total - free, (total - free) / total


class ThroughputMeter:
    """Measures the throughput between two calls of `measure`."""

    def __init__(self, position: Position, world: World, precision: str) -> None:
        self._last = replace(position)
        self._world = world
        self._peak = None
        if world.is_gpu:
            self._peak = gpu_peak_flops(torch.cuda.get_device_name(world.device), precision)
            torch.cuda.reset_peak_memory_stats(world.device)  # Earlier trainings do not count.
        psutil.cpu_percent()  # The first call only starts its clock.

    def measure(self, position: Position) -> dict[str, float]:
        """Return the metrics since the last call; every worker calls it at the same steps.

        `train/memory_gb` is the peak of this training on a GPU, and the current resident set on a
        CPU.
        """
        last = self._last
        self._last = replace(position)
        seconds = max(position.seconds - last.seconds, 1e-9)
        flops_per_second = (position.flops - last.flops) / seconds
        if self._world.is_gpu:
            used = torch.cuda.max_memory_allocated(self._world.device)
        else:
            used = psutil.Process().memory_info().rss
        memory = psutil.virtual_memory()
        metrics = {
            SPEED_METRIC: (position.num_tokens - last.num_tokens) / seconds,
            GFLOPS_METRIC: flops_per_second / 1e9,
            "train/memory_gb": used / GIGABYTE,
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            **gpu_loads(self._world),
        }
        if self._peak:
            metrics["train/mfu"] = flops_per_second / (self._peak * self._world.size)
        return metrics


class StepProfiler:
    """Profiles `num_steps` steps of this process, after the first `STEPS_BEFORE`."""

    def __init__(
        self, run_folder: Path, num_steps: int, device: str, event: Callable[..., None]
    ) -> None:
        """Start to count steps; `event` is called with a name and details at the end."""
        self._folder = run_folder / PROFILE_NAME
        self._event = event
        self._is_written = False
        self._memory: Any = torch.cuda.memory if device.startswith("cuda") else None
        if self._memory:
            self._memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        self._profiler = profile(
            schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def end_step(self) -> None:
        """Count a step; the last one of the profile writes it."""
        if not self._is_written:
            self._profiler.step()

    def close(self) -> None:
        """End the profile; it has fewer steps if the run ended early."""
        self._profiler.stop()
        if not self._is_written:
            if self._memory:
                self._memory._record_memory_history(enabled=None)
            text = f"no profile: it begins after {STEPS_BEFORE} steps, and the run ended before"
            self._event("not profiled", text=text)

    def _write(self, profiler: Any) -> None:
        with new_folder(self._folder) as folder:
            profiler.export_chrome_trace(str(folder / "trace.json.gz"))
            if self._memory:
                self._memory._dump_snapshot(str(folder / "memory.pickle"))
                self._memory._record_memory_history(enabled=None)
            else:
                averages = profiler.key_averages()
                table = averages.table(sort_by="self_cpu_memory_usage", row_limit=MAX_TABLE_ROWS)
                (folder / "memory.txt").write_text(table, encoding="utf-8")
        self._is_written = True
        self._event("profiled", text=f"profile of {profiler.step_num - STEPS_BEFORE} steps")
