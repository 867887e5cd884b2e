"""What the machine has, and whether a job fits: an answer in a moment, before anything is started.

Ray would wait for ever for GPUs that do not exist. Nothing here imports Ray, and PyTorch only when
GPUs are asked for, so that a wrong number on the command line costs no start-up time.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.workspace.errors import UserError

CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Resources:
    """Processors that jobs may use."""

    cpus: int
    """CPUs, at least one."""
    gpus: int
    """GPUs that PyTorch can use."""
    place: str = "this machine"
    """Where they are, for messages."""


def local_resources(*, count_gpus: bool = True) -> Resources:
    """Return what this process may use of this machine.

    Args:
        count_gpus: Look for GPUs, which imports PyTorch; otherwise there are none.
    """
    return Resources(cpus=_available_cpus(), gpus=_visible_gpus() if count_gpus else 0)


def check_resources(num_workers: int, num_gpus: int, resources: Resources | None = None) -> int:
    """Check that a training job's workers find their places.

    Args:
        num_workers: Data-parallel workers; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of the job, one for each worker; 0 trains on CPUs.
        resources: What there is; this machine's when unset. With `RAY_ADDRESS` set, only a cluster
            that has been asked can say, so nothing is checked without it.

    Returns:
        The number of workers.

    Raises:
        UserError: If there are too few CPUs or GPUs, saying what there is and what to type instead.
    """
    if num_gpus and num_workers not in (1, num_gpus):
        raise UserError(
            f"{num_workers} workers on {num_gpus} GPUs were asked for, but each worker has one; "
            f"leave out --workers, or type --workers {num_gpus}"
        )
    num_workers = num_gpus or num_workers
    if resources is None:
        if os.environ.get("RAY_ADDRESS"):
            return num_workers
        resources = local_resources(count_gpus=num_gpus > 0)
    if num_gpus > resources.gpus:
        raise UserError(_too_few_gpus(num_gpus, resources))
    if num_workers > resources.cpus:
        raise UserError(
            f"{num_workers} workers were asked for, but {resources.place} has {_cpus(resources)}, "
            f"and each worker needs one; type --workers {resources.cpus}"
        )
    return num_workers


@dataclass(frozen=True)
class FreeBytes:
    """Bytes that are free where a job would run; None where this process cannot tell."""

    memory: int | None
    """For each worker."""
    disk: int | None
    """Where the workspace lies."""
    place: str = "this machine"
    """Whose memory it is, for messages."""


def local_free_bytes(folder: Path, *, num_workers: int = 1, num_gpus: int = 0) -> FreeBytes:
    """Return what is free for each of a job's workers, and on the disk.

    Args:
        folder: Where the job writes; it need not exist yet.
        num_workers: Workers that share this machine's memory.
        num_gpus: With GPUs, their memory counts, one for each worker.
    """
    disk = shutil.disk_usage(_existing(folder)).free
    if os.environ.get("RAY_ADDRESS"):
        return FreeBytes(
            memory=None, disk=disk, place=f"the cluster at {os.environ['RAY_ADDRESS']}"
        )
    if num_gpus:
        return FreeBytes(memory=_gpu_memory(num_gpus), disk=disk, place="a GPU of this machine")
    return FreeBytes(memory=free_memory() // num_workers, disk=disk)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _gpu_memory(num_gpus: int) -> int | None:
    import torch

    # What is free on each, and not its size: others may use it too.
    visible = range(min(num_gpus, torch.cuda.device_count()))
    return min((int(torch.cuda.mem_get_info(number)[0]) for number in visible), default=None)


def free_memory(groups: Iterable[Path] | None = None) -> int:
    """Return the machine's free bytes, or what a container's limit leaves, whichever is less.

    Args:
        groups: Folders of control groups that may have a limit; this process's own when unset.
    """
    free = int(psutil.virtual_memory().available)
    left = [_left_in_group(group) for group in (_memory_groups() if groups is None else groups)]
    return min([free, *(number for number in left if number is not None)])


_GROUP_FILES = (
    # Limit, use, and the entry of memory.stat for cached files that were not read lately.
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups of version 2, and of version 1."""


def _left_in_group(group: Path) -> int | None:
    """Return the bytes that a control group's limit leaves; None if it has no limit."""
    for limit_name, used_name, cache_name in _GROUP_FILES:
        try:
            limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
        except (OSError, ValueError):  # Missing, or no number but "max".
            continue
        # Tokenizing leaves gigabytes of cached files behind; the system drops them when asked for
        # memory, so they are as good as free.
        return max(0, limit - max(0, used - _entry(group / "memory.stat", cache_name)))
    return None


def _entry(path: Path, name: str) -> int:
    try:
        pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(pairs.get(name, 0))
    except (OSError, ValueError):
        return 0


def _memory_groups() -> Iterator[Path]:
    """Yield the folders of the groups that this process is in: its own, and those around it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = CONTROL_GROUPS / controllers  # Version 2 names no controller.
            own = root / path.lstrip("/")
            # Inside a container the path may be the host's, and its own group is the root.
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root))


def _too_few_gpus(num_gpus: int, resources: Resources) -> str:
    wanted = f"{num_gpus} GPU{'s' * (num_gpus > 1)}"
    cluster = f"set RAY_ADDRESS to a Ray cluster that has {wanted}"
    if resources.gpus:
        return (
            f"--gpus {num_gpus}: {resources.place} has {resources.gpus} of them; "
            f"type --gpus {resources.gpus}, or {cluster}"
        )
    return (
        f"--gpus {num_gpus}: {resources.place} has no GPU that PyTorch{_build()} can use; "
        f"leave out --gpus to train on its {_cpus(resources)}, or {cluster}"
    )


def _build() -> str:
    import torch

    cpu_only = torch.version.cuda is None and getattr(torch.version, "hip", None) is None
    return f" {torch.__version__} (a build without GPU support)" if cpu_only else ""


def _cpus(resources: Resources) -> str:
    return f"{resources.cpus} CPU{'s' * (resources.cpus > 1)}"


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _available_cpus() -> int:
    # The affinity of this process and the quota of its container, whichever is smaller.
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = (CONTROL_GROUPS / "cpu.max").read_text().split()
        return max(1, min(cpus, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus
