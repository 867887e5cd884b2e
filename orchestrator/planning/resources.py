"""CPUs, GPUs, memory and disk of this machine, and the check that they are enough for a job.

Ray would wait forever for GPUs that do not exist. Only counting GPUs imports PyTorch, so a wrong
number on the command line is reported at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from orchestrator.planning.installed_gpus import installed_gpus
from orchestrator.planning.nodes import Node, describe_nodes, num_workers_on
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.layout import LOCAL

if TYPE_CHECKING:
    from orchestrator.settings import ClusterSettings

CONTROL_GROUPS = Path("/sys/fs/cgroup")
THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class Resources:
    """Nodes that jobs may use."""

    nodes: tuple[Node, ...]
    """A machine without a cluster is one; its GPUs are 0 if they were not counted."""
    place: str = THIS_MACHINE
    """Where they are, for messages."""

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


@dataclass(frozen=True)
class FreeBytes:
    """Free memory and disk where a job would run; None if this process cannot know it."""

    memory: int | None
    """For each worker."""
    disk: int | None
    """On the workspace's disk."""
    place: str = "this machine"
    """Whose memory it is, for messages."""


def local_resources(*, count_gpus: bool = True) -> Resources:
    """Return what this process may use of this machine; counting GPUs imports PyTorch."""
    num_gpus = 0
    if count_gpus:
        import torch

        num_gpus = torch.cuda.device_count()
    return Resources((Node(_available_cpus(), num_gpus),))


def check_resources(
    num_workers: int,
    num_gpus: float,
    *,
    address: str = LOCAL,
    local: bool = False,
    per_trial: bool = False,
) -> None:
    """Check, before anything starts, that one training's workers get enough CPUs and GPUs.

    Args:
        num_workers: Data-parallel workers; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of the training, one per worker, or a share of one; 0 trains on CPUs.
        address: Address of the Ray cluster; only this machine (`local`) is compared.
        local: Whether the training runs in this process, without Ray.
        per_trial: Whether a trial of a sweep is meant, which has settings of its own.

    Raises:
        UserError: If there are too few CPUs or GPUs; says how many there are and what to type.
    """
    if local and max(num_workers, num_gpus) > 1:
        asked = f"num_gpus={num_gpus:g}" if num_gpus > 1 else f"num_workers={num_workers}"
        raise UserError(
            f"--local trains in this process alone, and cluster.{asked} asks for several; leave "
            "out --local, or type --set cluster.num_workers=1"
            + (" --set cluster.num_gpus=1" if num_gpus else "")
        )
    if num_gpus and num_workers not in (1, num_gpus):
        key = "sweep.workers_per_trial" if per_trial else "cluster.num_workers"
        raise UserError(
            f"{num_workers} workers on {num_gpus:g} GPUs were asked for, but each worker has one; "
            f"leave {key} out, or type --set {key}={math.ceil(num_gpus)}"
        )
    # A cluster elsewhere says itself what it has, once Ray runs: see `cluster.placement`.
    if address == LOCAL:
        resources = local_resources(count_gpus=num_gpus > 0)
        check_available(num_workers, num_gpus, resources, per_trial=per_trial)


def check_run_resources(cluster: ClusterSettings, *, local: bool = False) -> None:
    """Check that a run gets the workers and GPUs of its settings; see `check_resources`."""
    address = LOCAL if local else cluster.ray_address
    check_resources(cluster.num_workers, cluster.num_gpus, address=address, local=local)


def check_device(device: str) -> None:
    """Check that this machine has a device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: If it has not; says what it has.
    """
    from orchestrator.settings.cluster import device_problem  # Imports PyTorch.

    if problem := device_problem(device):
        raise UserError(f"--device {quoted(device)}: {problem}")
    if device == "cpu":
        return
    gpus = local_resources().gpus
    if not gpus:
        raise UserError(
            f"--device {device}: this machine has no GPU that PyTorch{_torch_build()} can use; "
            "leave --device out to use the CPU"
        )
    if int(device.partition(":")[2] or 0) >= gpus:
        others = "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise UserError(f"--device {device}: this machine has {others}")


def check_on_cluster(cluster: ClusterSettings, resources: Resources) -> None:
    """Check that a run gets the workers and GPUs of its settings on the nodes of a cluster."""
    check_available(cluster.num_workers, cluster.num_gpus, resources, min_gpus=cluster.min_gpus)


def check_available(
    num_workers: int,
    num_gpus: float,
    resources: Resources,
    *,
    min_gpus: int | None = None,
    per_trial: bool = False,
) -> None:
    """Check that one training's workers find places on these nodes; see `check_resources`.

    Args:
        min_gpus: Fewest GPUs with which it starts, if their number may vary.
    """
    num_gpus = min_gpus or num_gpus
    num_workers = math.ceil(num_gpus) or num_workers
    gpus_per_worker = num_gpus / num_workers
    places = sum(num_workers_on(node, 1, gpus_per_worker) for node in resources.nodes)
    if num_workers <= places:
        return
    if num_gpus:
        key = "sweep.gpus_per_trial" if per_trial else "cluster.num_gpus"
        key = "cluster.min_gpus" if min_gpus else key
        # A trial uses GPUs also because the run does.
        on_cpus = "leave sweep.gpus_per_trial out and " * per_trial + "set cluster.num_gpus=0"
        raise UserError(_too_few_gpus(num_gpus, places, resources, key, on_cpus))
    key = "sweep.workers_per_trial" if per_trial else "cluster.num_workers"
    raise UserError(
        f"{num_workers} workers were asked for, but {resources.place} has {_cpus(resources)}, "
        f"and each worker needs one; type --set {key}={resources.cpus}"
    )


def _too_few_gpus(
    num_gpus: float, places: int, resources: Resources, key: str, on_cpus: str
) -> str:
    """`key` is the setting that asks for GPUs; `on_cpus` says how to train without them."""
    is_cluster = resources.place != THIS_MACHINE
    count = f"{num_gpus:g} GPU{'s' * (num_gpus > 1)}"
    other = f"name a Ray cluster that has {count} by --set cluster.address=HOST:PORT"
    if is_cluster:
        other = "set cluster.wait_for_gpus=true to wait for nodes that join later"
    if resources.gpus:
        needs = "" if resources.gpus < num_gpus else ", and each worker needs a CPU beside its GPU"
        return (
            f"{key}={num_gpus:g}: {resources.place} has {resources.gpus} "
            f"({describe_nodes(resources.nodes)}){needs}; "
            + (f"type --set {key}={places}, or {other}" if places else other)
        )
    return (
        f"{key}={num_gpus:g}: {resources.place} has no GPU"
        f"{'' if is_cluster else f' that PyTorch{_torch_build()} can use'}; "
        f"{on_cpus} to train on its {_cpus(resources)}, or {other}"
    )


def _torch_build() -> str:
    import torch

    is_cpu_build = torch.version.cuda is None and getattr(torch.version, "hip", None) is None
    return f" {torch.__version__} (a build without GPU support)" if is_cpu_build else ""


def _cpus(resources: Resources) -> str:
    return f"{resources.cpus} CPU{'s' * (resources.cpus != 1)}"


def _available_cpus() -> int:
    # The affinity of this process or the quota of its container, whichever is smaller.
    has_affinity = hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        quota, period = (CONTROL_GROUPS / "cpu.max").read_text().split()
        return max(1, min(cpus, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cpus


def local_free_bytes(folder: Path, *, num_workers: int = 1, num_gpus: int = 0) -> FreeBytes:
    """Return the free memory for each worker of a job, and the free disk.

    Args:
        folder: Where the job writes; it need not exist yet.
        num_workers: Workers that share this machine's memory.
        num_gpus: If not 0, the memory is that of a GPU, one per worker.
    """
    disk = free_disk(folder)
    if num_gpus:
        # The free bytes of each, not its size: other processes may use it too.
        free = min((gpu.free_bytes for gpu in installed_gpus()[:num_gpus]), default=None)
        return FreeBytes(memory=free, disk=disk, place="a GPU of this machine")
    return FreeBytes(memory=free_memory() // num_workers, disk=disk)


def free_memory(groups: Iterable[Path] | None = None) -> int:
    """Return the machine's free bytes, or what a container's limit leaves, whichever is less.

    Args:
        groups: Folders of control groups that may have a limit; those of this process if unset.
    """
    free = int(psutil.virtual_memory().available)
    limits = [_free_in_group(group) for group in (_memory_groups() if groups is None else groups)]
    return min([free, *(number for number in limits if number is not None)])


_GROUP_FILES = (
    # Limit, use, and the entry of memory.stat for cached files that were not read lately.
    ("memory.max", "memory.current", "inactive_file"),  # Version 2 of control groups.
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # Version 1.
)


def _free_in_group(group: Path) -> int | None:
    for limit_name, used_name, cache_name in _GROUP_FILES:
        try:
            limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
        except (OSError, ValueError):  # The file is missing, or says "max".
            continue
        # Tokenizing leaves gigabytes of cached files. The system drops them if it needs memory, so
        # they count as free.
        return max(0, limit - max(0, used - _stat_entry(group / "memory.stat", cache_name)))
    return None


def _stat_entry(path: Path, name: str) -> int:
    try:
        pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(pairs.get(name, 0))
    except (OSError, ValueError):
        return 0


def _memory_groups() -> Iterator[Path]:
    """Yield the folders of the control groups of this process, from the inside out."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = CONTROL_GROUPS / controllers  # Version 2 names no controller.
            own = root / path.lstrip("/")
            # In a container the path may be the host's, and the container's group is the root.
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root))
