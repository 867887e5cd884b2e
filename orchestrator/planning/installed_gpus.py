"""Names and free memory of this machine's GPUs, from NVML.

PyTorch's own functions open a CUDA context, which takes several hundred MiB of each GPU until the
process ends. A command that starts jobs must leave that memory to them. NVML is NVIDIA's: without
its driver or the extra `gpu`, and for AMD's GPUs, nothing is known here.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU that this process may use."""

    name: str
    """Its full name, such as `NVIDIA H100 80GB HBM3`."""
    free_bytes: int
    """Memory that no process uses now."""


def nvml_module() -> Any:
    """Return the module `pynvml`; None where the extra `gpu` is not installed."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    return pynvml


def installed_gpus(nvml: Any = None) -> list[InstalledGpu]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves, in its order; empty without NVML.

    Args:
        nvml: The module `pynvml`; the installed one if None.
    """
    nvml = nvml or nvml_module()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    gpus = []
    with suppress(nvml.NVMLError):  # Such as a GPU that has fallen off the bus.
        for handle in _visible(nvml):
            name, free = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle).free
            gpus.append(InstalledGpu(name, int(free)))
    nvml.nvmlShutdown()
    return gpus


def driver_version(nvml: Any = None) -> str | None:
    """Return the version of NVIDIA's driver; None without it or without NVML.

    Args:
        nvml: As for `installed_gpus`.
    """
    nvml = nvml or nvml_module()
    if nvml is None:
        return None
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        try:
            return str(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    return None


def _visible(nvml: Any) -> list[Any]:
    """Return the handles of the visible GPUs; as CUDA, stop at the first that does not exist."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return handles
    by_id = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    found = []
    for entry in map(str.strip, asked.split(",")):
        # CUDA numbers unequal GPUs by speed unless CUDA_DEVICE_ORDER says PCI_BUS_ID; NVML numbers
        # them as they are plugged in. Equal GPUs have the same name and memory in any order.
        if entry.isdecimal():
            named = handles[int(entry) : int(entry) + 1]
        elif entry.startswith("MIG-"):
            named = [nvml.nvmlDeviceGetHandleByUUID(entry)]
        else:  # The beginning of an id is enough.
            named = [handle for uuid, handle in by_id.items() if entry and uuid.startswith(entry)]
        if len(named) != 1:
            break
        found += named
    return found
