"""The nodes of the running Ray, the slots of jobs on them, and requests to stop.

A job is one process, or several data-parallel workers of equal CPUs, with one GPU each or none. As
many jobs run at the same time as the nodes hold with all of their workers. Jobs on CPUs share all
CPUs evenly; a worker with a GPU gets the CPUs that belong to it. Each worker uses as many threads
as CPUs. A machine without GPUs can rehearse how jobs are placed on GPUs: start Ray with
`--num-gpus 8`, and set `IIET_PRETENDED_GPUS=1` for Ray and for the command.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster import PRETENDED_GPUS
from orchestrator.planning.machine import (
    Node,
    Resources,
    check_available,
    cpus_of_cpu_worker,
    cpus_of_gpu_worker,
    num_slots,
)
from orchestrator.workspace.errors import DeviceError

PLACEMENT_SECONDS = 2.0
"""Where nodes are free, Ray finds a slot within this time."""
TRIAL_PROCESS_BYTES = 512 * 2**20
"""Memory of a process that imports PyTorch and waits for its workers."""
NAMESPACE = "iiet-orch"
SECONDS_BETWEEN_LOOKS = 0.5


# Nodes


def nodes_with_devices() -> list[dict[str, Any]]:
    """Return Ray's description of each node that has CPUs or GPUs."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and {"CPU", "GPU"} & set(node["Resources"])]


def alive_nodes() -> tuple[Node, ...]:
    """Return the nodes that have CPUs or GPUs."""
    resources = [node["Resources"] for node in nodes_with_devices()]
    return tuple(Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources)


# Slots of jobs


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What each job gets, when several run at the same time."""

    jobs_at_once: int
    workers: int
    """Workers of each job."""
    cpus: int
    """CPUs, and threads, of each worker."""
    gpus: float = 0
    """GPUs of each worker: 1, a share of one, or 0."""
    on_one_node: bool = False
    """Whether all workers of a job must be on one node."""
    min_workers: int | None = None
    """Fewest workers of a job of variable size; None: always `workers`."""

    @property
    def use_gpu(self) -> bool:
        """Whether each worker has a GPU, or a share of one."""
        return self.gpus > 0

    @property
    def strategy(self) -> str:
        """How Ray packs a job's workers: on one node, or on as few as there is room on."""
        return "STRICT_PACK" if self.on_one_node else "PACK"

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    @property
    def trial_resources(self) -> dict[str, float]:
        """What Ray reserves for a trial's own process.

        A single worker is that process. Several workers reserve their own CPUs and GPUs, which the
        process must not take from them; it reserves memory, by which Ray spreads such processes
        over the nodes.
        """
        return self.worker_resources if self.workers == 1 else {"memory": TRIAL_PROCESS_BYTES}

    def num_slots(self) -> int:
        """Return how many jobs the nodes hold now, each with its fewest workers."""
        workers = self.min_workers or self.workers
        alive = alive_nodes()
        return num_slots(alive, workers, self.cpus, self.gpus, on_one_node=self.on_one_node)


def job_placement(
    num_jobs: int,
    num_workers: int,
    num_gpus: float,
    resources: Resources,
    *,
    min_gpus: int | None = None,
    most_at_once: int | None = None,
    per_trial: bool = False,
) -> Placement:
    """Share CPUs and GPUs among jobs.

    Args:
        num_workers: Data-parallel workers of each job; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of each job, one for each worker, or a share of one; 0 runs on CPUs.
        min_gpus: Fewest GPUs of a job, if their number may vary.
        per_trial: Whether the jobs are trials of a sweep, which the error names.

    Raises:
        UserError: If there is too little for one job.
    """
    # Only now it is known what a joined cluster has.
    check_available(num_workers, num_gpus, resources, min_gpus=min_gpus, per_trial=per_trial)
    nodes = resources.nodes
    workers = math.ceil(num_gpus) or num_workers
    gpus = num_gpus / workers
    cpus = cpus_of_gpu_worker(nodes, gpus) if gpus else 1
    # GPUs of one node are connected best, so a job waits for a free node instead of
    # taking two. A job of variable size takes what is free.
    can_wait = gpus > 0 and min_gpus is None
    on_one_node = can_wait and num_slots(nodes, workers, cpus, gpus, on_one_node=True) > 0
    slots = num_slots(nodes, workers, cpus, gpus, on_one_node=on_one_node)
    at_once = max(1, min(most_at_once or slots, slots, num_jobs))
    return Placement(
        jobs_at_once=at_once,
        workers=workers,
        cpus=cpus if gpus else cpus_of_cpu_worker(nodes, workers, at_once),
        gpus=gpus,
        on_one_node=on_one_node,
        min_workers=min_gpus,
    )


def use_fake_gpus() -> bool:
    """Return whether Ray's GPUs are pretended, and work that reserves one runs on CPUs."""
    return os.environ.get(PRETENDED_GPUS) == "1"


def worker_device(*, use_gpu: bool) -> str:
    """Return the device of this process, a Ray task or actor that may have reserved a GPU.

    Raises:
        DeviceError: If PyTorch cannot use the GPU that Ray reserved.
    """
    if not use_gpu or use_fake_gpus():
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            f"Ray reserved a GPU on {os.uname().nodename}, but PyTorch {torch.__version__} cannot "
            "use it; install a CUDA build of PyTorch and a driver that it supports on each node"
        )
    return "cuda"


@contextmanager
def reserved_slots(bundles: Sequence[dict[str, float]], strategy: str = "PACK") -> Iterator[Any]:
    """Reserve slots until the block ends; yields the placement group.

    Its `wait(seconds)` returns whether Ray has found them. Ray's autoscaler starts nodes for them.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([*bundles], strategy)
    try:
        yield group
    finally:
        remove_placement_group(group)


# Requests to stop


class Signal:
    """A one-time message from a driver to its processes on all nodes.

    It is sent when Ray has an actor of its name. The actor ends with the driver.
    """

    def __init__(self) -> None:
        """Make an unsent signal; its pickled copies share it."""
        self._key = uuid.uuid4().hex
        self._is_sent = False
        self._next_look = -math.inf

    def send(self) -> None:
        """Send the signal, unless it was sent before."""
        import ray

        self._is_sent = True  # For this process, also after Ray has ended.
        actor: Any = ray.remote(num_cpus=0)(_Sent)
        name = {"name": self._key, "namespace": NAMESPACE, "get_if_exists": True}
        _sent.append(actor.options(**name).remote())

    def is_sent(self) -> bool:
        """Return whether it was sent; asks Ray's head at most twice a second."""
        import ray
        import ray.exceptions

        if not self._is_sent and time.monotonic() >= self._next_look:
            # There is no such actor, or Ray's head is busy or gone.
            with suppress(ValueError, ray.exceptions.RayError):
                ray.get_actor(self._key, namespace=NAMESPACE)
                self._is_sent = True
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return self._is_sent


class _Sent:
    """The actor of a sent signal; its existence is the message."""


_sent: list[Any] = []
"""Actors of sent signals: an actor lives as long as it is referenced."""


class StopRequests:
    """Keys of the trials that ASHA asks to end. A Ray actor holds them for trials on all nodes."""

    def __init__(self) -> None:
        """Start the actor; it ends with the last pickled copy of this object."""
        import ray

        # The actor's class is in this module because Ray imports the module, and Tune's takes
        # seconds.
        self._actor: Any = ray.remote(num_cpus=0)(_Keys).remote()

    def ask(self, key: str) -> None:
        """Ask a trial to end. When this returns, `is_asked` is true for it on all nodes."""
        import ray

        ray.get(self._actor.add.remote(key))

    def is_asked(self, key: str) -> bool:
        """Return whether a trial was asked to end."""
        import ray

        answer: bool = ray.get(self._actor.contains.remote(key))
        return answer


class _Keys:
    """The actor of `StopRequests`."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def add(self, key: str) -> None:
        self._keys.add(key)

    def contains(self, key: str) -> bool:
        return key in self._keys
