"""The processors of this machine: what they are called, and how many this process may use."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of containers."""
CPUINFO = Path("/proc/cpuinfo")
"""Linux's description of the processors."""


def num_cpus(control_group: Path = CONTROL_GROUPS) -> int:
    """Return the CPUs of this process's affinity, or of its container's quota if that is less."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # There is no quota, or the file says "max".
        quota, period = map(int, (control_group / "cpu.max").read_text().split())
        cpus = max(1, min(cpus, math.ceil(quota / period)))
    return cpus


@cache
def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """Return such as `AMD EPYC 9554 64-Core Processor`; the kind of machine where none is given."""
    return _value_of(cpuinfo, "model name") or platform.processor() or platform.machine()


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """Return the features of the first processor; empty where the system does not list them."""
    # ARM processors call them `Features`.
    text = _value_of(cpuinfo, "flags") or _value_of(cpuinfo, "Features")
    return set(text.split())


def _value_of(cpuinfo: Path, field: str) -> str:
    """Return what Linux says of the first processor under a name; empty if it says nothing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
