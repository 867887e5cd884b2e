"""What trainings may use: CPUs, GPUs, memory and disk of this machine, and the nodes of a cluster.

Ray would wait forever for GPUs that do not exist, so a number that is too large is refused at once;
only counting GPUs imports PyTorch. Names and free memory of GPUs come from NVML: PyTorch's own
functions take hundreds of MiB of each GPU until the process ends. Without NVIDIA's driver or the
extra `gpu`, and for AMD's GPUs, neither is known.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from orchestrator.settings.cluster import LOCAL, ClusterSettings, device_problem
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.processors import CONTROL_GROUPS, num_cpus

THIS_MACHINE = "this machine"
_GPU_UNITS = 10_000  # Ray's smallest share of a GPU is a ten-thousandth.


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine."""

    cpus: int
    gpus: int = 0

    def num_workers(self, cpus: int, gpus: float) -> int:
        """Return how many workers of these CPUs, and this GPU or share of one, find a place."""
        by_cpus = self.cpus // cpus
        return min(by_cpus, self.gpus * num_sharing(gpus)) if gpus else by_cpus


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


@dataclass(frozen=True, kw_only=True)
class FreeBytes:
    """Free memory and disk of a machine; None if this process cannot know it."""

    memory: int | None = None
    """Free bytes of the machine's own memory."""
    gpus: tuple[int, ...] = ()
    """Free bytes of each GPU's memory; empty if they are not known."""
    disk: int | None = None
    """Free bytes of the workspace's disk."""
    gpu_name: str = "a GPU of this machine"
    """For messages."""


class InstalledGpu(NamedTuple):
    """A GPU that this process may use: such as `NVIDIA H100 80GB HBM3`, and its free memory."""

    name: str
    free_bytes: int


def num_sharing(gpus: float) -> int:
    """Return how many workers share one GPU if each has this share of it; 1 from 1 GPU on."""
    return max(1, _GPU_UNITS // round(gpus * _GPU_UNITS))


def num_slots(
    nodes: Sequence[Node], num_workers: int, cpus: int, gpus: float, *, on_one_node: bool = False
) -> int:
    """Return how many jobs find slots for all of their workers, each with its CPUs and GPUs.

    A worker lies on one node, so the sum over a cluster says nothing: two nodes of 3 CPUs hold two
    workers of 2 CPUs, not three. With `on_one_node`, all workers of a job lie on the same node.
    """
    workers_by_node = [node.num_workers(cpus, gpus) for node in nodes]
    per_node = sum(number // num_workers for number in workers_by_node)
    return per_node if on_one_node else sum(workers_by_node) // num_workers


def cpus_of_gpu_worker(nodes: Sequence[Node], gpus: float) -> int:
    """Return the CPUs of a worker with a GPU or a share of one, so that all GPUs can be used."""
    sharing = num_sharing(gpus)
    shares = [node.cpus // (node.gpus * sharing) for node in nodes if node.gpus and node.cpus]
    return max(1, min(shares, default=1))


def cpus_of_cpu_worker(nodes: Sequence[Node], num_workers: int, num_jobs: int) -> int:
    """Return the most CPUs of each worker with which all jobs find slots at the same time."""
    most = max(node.cpus for node in nodes)
    for cpus in range(most, 1, -1):
        if num_slots(nodes, num_workers, cpus, 0) >= num_jobs:
            return cpus
    return 1


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Return such as "4 nodes with 64 CPUs and 8 GPUs each, 1 node with 8 CPUs"."""
    counts = Counter(sorted(nodes, key=lambda node: (-node.gpus, -node.cpus)))
    parts = []
    for node, number in counts.items():
        text = f"{format_count(number, 'node')} with {format_count(node.cpus, 'CPU')}"
        if node.gpus:
            text += f" and {format_count(node.gpus, 'GPU')}"
        if number > 1:
            text += " each"
        parts.append(text)
    return ", ".join(parts)


def local_resources(*, count_gpus: bool = True) -> Resources:
    """Return what this process may use of this machine; counting GPUs imports PyTorch."""
    if not count_gpus:
        return Resources((Node(num_cpus()),))
    import torch

    return Resources((Node(num_cpus(), torch.cuda.device_count()),))


def check_run_resources(
    cluster: ClusterSettings, resources: Resources | None = None, *, local: bool = False
) -> None:
    """Check that a training gets its workers and GPUs, see `check_available`.

    Args:
        local: Whether it runs in this process, without Ray.
    """
    if local and max(cluster.num_workers, cluster.num_gpus) > 1:
        setting = "num_gpus" if cluster.num_gpus > 1 else "num_workers"
        raise UserError(
            f"--local trains in this process alone, and cluster.{setting}="
            f"{getattr(cluster, setting)} asks for several; leave it out, or set it to 1"
        )
    check_available(
        cluster.num_workers,
        cluster.num_gpus,
        resources,
        address=LOCAL if local else cluster.ray_address,
        # A machine gets no more GPUs; nodes may join a cluster.
        min_gpus=cluster.min_gpus if resources else None,
    )


def check_available(
    num_workers: int,
    num_gpus: float,
    resources: Resources | None = None,
    *,
    address: str = LOCAL,
    min_gpus: int | None = None,
    per_trial: bool = False,
) -> None:
    """Check that one training's workers find slots.

    Args:
        num_workers: Data-parallel workers; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of the training, one per worker, or a share of one; 0 trains on CPUs.
        resources: Nodes of a cluster that was joined; this machine's when unset.
        address: Of the Ray cluster; before one is joined, nothing is known of it.
        min_gpus: Fewest GPUs with which it starts, if their number may vary.
        per_trial: Whether a trial of a sweep is meant, which has settings of its own.

    Raises:
        UserError: If there are too few CPUs or GPUs; says how many there are and what to type.
    """
    if resources is None and address != LOCAL:
        return
    resources = resources or local_resources(count_gpus=num_gpus > 0)
    num_gpus = min_gpus or num_gpus
    num_workers = math.ceil(num_gpus) or num_workers
    slots = num_slots(resources.nodes, 1, 1, num_gpus / num_workers)
    if num_workers <= slots:
        return
    if per_trial:
        setting = "sweep.gpus_per_trial" if num_gpus else "sweep.workers_per_trial"
    elif min_gpus:
        setting = "cluster.min_gpus"
    else:
        setting = "cluster.num_gpus" if num_gpus else "cluster.num_workers"
    is_here = resources.place == THIS_MACHINE
    hardware = describe_nodes(resources.nodes)
    needs = "a CPU and a GPU" if num_gpus else "a CPU"
    changes = [f"type --set {setting}={slots}"] if slots else []
    if num_gpus and not resources.gpus:
        hardware += " and no GPU"
        if is_here:
            import torch

            hardware += f" that PyTorch {torch.__version__} can use"
        leave_out = "leave sweep.gpus_per_trial out and " if per_trial else ""
        changes.append(f"{leave_out}set cluster.num_gpus=0 to train on CPUs")
    if num_gpus and is_here:
        changes.append("join a Ray cluster that has them by --set cluster.address=HOST:PORT")
    elif num_gpus:
        changes.append("run the command again when nodes that have them have joined")
    raise UserError(
        f"{setting}={num_gpus or num_workers:g}: {resources.place} has {hardware}, and each worker "
        f"needs {needs}; {', or '.join(changes)}"
    )


def check_device(device: str) -> None:
    """Check that this machine has a device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: If it has not; says what it has.
    """
    if problem := device_problem(device):
        raise UserError(f"--device {quoted(device)}: {problem}")
    gpus = 0 if device == "cpu" else local_resources().gpus
    if device != "cpu" and int(device.partition(":")[2] or 0) >= gpus:
        devices = (
            ", ".join(f"cuda:{number}" for number in range(gpus)) or "no GPU that PyTorch can use"
        )
        raise UserError(
            f"--device {device}: this machine has {devices}; leave it out to use the best device"
        )


def free_memory(groups: Iterable[Path] | None = None) -> int:
    """Return the machine's free bytes, or what a container's limit leaves, whichever is less.

    Args:
        groups: Folders of control groups (version 2); by default those of this process.
    """
    if groups is None:
        groups = []
        with suppress(OSError):
            path = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
            # In a container the path may be the host's, and the container's group is the root.
            own_group = CONTROL_GROUPS / path.lstrip("/")
            groups = [
                group
                for group in (own_group, *own_group.parents)
                if group.is_relative_to(CONTROL_GROUPS)
            ]
    free = int(psutil.virtual_memory().available)
    for group in groups:
        with suppress(OSError, ValueError):  # A file is missing, or says "max".
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            # Tokenizing leaves gigabytes of cached files. The system drops them if it needs memory,
            # so they count as free.
            cached = 0
            with suppress(OSError, ValueError):
                lines = (group / "memory.stat").read_text().splitlines()
                cached = int(dict(line.split() for line in lines).get("inactive_file", 0))
            free = min(free, max(0, limit - max(0, used - cached)))
    return free


def installed_gpus(nvml: Any = None) -> list[InstalledGpu]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves, in its order; empty without NVML."""
    return read_nvml(nvml)[1]


def read_nvml(nvml: Any = None) -> tuple[str | None, list[InstalledGpu]]:
    """Return the version of NVIDIA's driver, and `installed_gpus`.

    Without the driver or the extra `gpu`, these are None and empty.
    """
    gpus: list[InstalledGpu] = []
    try:
        nvml = nvml or import_module("pynvml")
        nvml.nvmlInit()
    except ModuleNotFoundError:
        return None, gpus
    except nvml.NVMLError:
        return None, gpus
    version = str(nvml.nvmlSystemGetDriverVersion())
    numbers = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
    # CUDA numbers unequal GPUs by speed unless CUDA_DEVICE_ORDER says PCI_BUS_ID; NVML numbers them
    # as they are plugged in. Equal GPUs are alike in any order. As CUDA, stop at the first that
    # does not exist.
    with suppress(nvml.NVMLError):
        for entry in map(str.strip, os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")):
            if entry.isdecimal():
                handle = nvml.nvmlDeviceGetHandleByIndex(int(entry))
            else:
                handle = nvml.nvmlDeviceGetHandleByUUID(entry)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(InstalledGpu(nvml.nvmlDeviceGetName(handle), int(memory.free)))
    nvml.nvmlShutdown()
    return version, gpus
