"""Load of every worker's GPU: memory, and from NVML utilization and power, by the worker's rank.

The names are those of MLflow's system metrics. A GPU that does not answer has no such metric; none
has utilization and power where the extra `gpu` is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from orchestrator.training.distributed import World, gathered

MEGABYTE = 1e6

Sensors = Mapping[str, Callable[[torch.device], float]]

SENSORS: Sensors = MappingProxyType(
    {
        "memory_usage_megabytes": lambda device: _used_bytes(device) / MEGABYTE,
        "memory_usage_percentage": lambda device: (
            100.0 * _used_bytes(device) / torch.cuda.mem_get_info(device)[1]
        ),
        # PyTorch asks NVML for these, and finds the GPU that CUDA_VISIBLE_DEVICES means.
        "utilization_percentage": lambda device: float(torch.cuda.utilization(device)),
        "power_usage_watts": lambda device: torch.cuda.power_draw(device) / 1000.0,
    }
)


def gpu_loads(
    world: World,
    *,
    sensors: Sensors = SENSORS,
    gather: Callable[[dict[str, float], World], list[dict[str, float]]] = gathered,
) -> dict[str, float]:
    """Return `system/gpu_RANK_SENSOR` of all workers; empty on CPUs. Call it on every worker.

    Args:
        world: This worker's place and device.
        sensors: Name of a metric -> what reads it.
        gather: Returns the values of all workers, by rank.
    """
    if not world.device.startswith("cuda"):
        return {}
    loads = gather(_load(torch.device(world.device), sensors), world)
    return {
        f"system/gpu_{rank}_{name}": value
        for rank, load in enumerate(loads)
        for name, value in load.items()
    }


def _load(device: torch.device, sensors: Sensors) -> dict[str, float]:
    load = {}
    for name, read in sensors.items():
        try:
            load[name] = read(device)
        except Exception:  # No NVML, no such sensor, a part of a GPU: each has its own error.
            continue
    return load


def _used_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
