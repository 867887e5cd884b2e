"""How many jobs run at the same time, and the CPUs and GPUs of each of their workers.

A job is one process, or several data-parallel workers of equal CPUs, with one GPU each or none. As
many jobs run at the same time as the nodes hold with all of their workers, so none waits for half
of them. Jobs on CPUs share all CPUs evenly; a worker with a GPU gets the CPUs that belong to it.
Each worker uses as many threads as CPUs.

A machine without GPUs can rehearse how jobs are placed on a cluster of GPUs: start Ray with
`--num-gpus 8`, and set `IIET_PRETENDED_GPUS=1` for Ray and for the command.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from orchestrator.cluster import PRETENDED_GPUS
from orchestrator.planning.machine import (
    Resources,
    check_available,
    cpus_of_cpu_worker,
    cpus_of_gpu_worker,
    num_places,
)
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.workspace.errors import DeviceError

TRIAL_PROCESS_BYTES = 256 * 2**20
"""Memory of a process that imports PyTorch and waits for its workers."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What each of the jobs that run at the same time gets."""

    jobs_at_once: int
    workers: int
    """Workers of each job."""
    cpus: int
    """CPUs and threads of each worker; a job has `workers` times as many."""
    gpus: float = 0
    """GPUs of each worker: 1, a share of one, or 0."""
    on_one_node: bool = False
    """Whether all workers of a job must lie on the same node."""
    min_workers: int | None = None
    """Fewest workers of a job whose number varies with the nodes; None: always `workers`."""
    collective_timeout_seconds: int = ClusterSettings().collective_timeout_seconds
    """Longest wait of a worker for the others in a collective operation."""

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

        A single worker is that process. If there are several, they reserve their own CPUs and GPUs,
        and a trial that took some, too, could keep them from its workers. By its memory, Ray
        spreads the processes over the nodes.
        """
        return self.worker_resources if self.workers == 1 else {"memory": TRIAL_PROCESS_BYTES}


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
        num_jobs: Jobs that wait.
        num_workers: Data-parallel workers of each job; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of each job, one for each worker, or a share of one; 0 runs on CPUs.
        resources: What the Ray that runs has.
        min_gpus: Fewest GPUs of a job, if their number may vary.
        most_at_once: Limit of jobs at the same time.
        per_trial: Whether the jobs are trials of a sweep, for the error.

    Raises:
        UserError: If there is too little for one job.
    """
    # A cluster elsewhere may have less than is asked for; nothing else could know before.
    check_available(num_workers, num_gpus, resources, min_gpus=min_gpus, per_trial=per_trial)
    nodes = resources.nodes
    workers = math.ceil(num_gpus) or num_workers
    gpus = num_gpus / workers
    cpus = cpus_of_gpu_worker(nodes, gpus) if gpus else 1
    # GPUs of one node are connected best, so a job waits for a node rather than lie on two.
    # One whose number of workers varies takes what there is.
    can_wait = gpus > 0 and min_gpus is None
    on_one_node = can_wait and num_places(nodes, workers, cpus, gpus, on_one_node=True) > 0
    places = num_places(nodes, workers, cpus, gpus, on_one_node=on_one_node)
    at_once = max(1, min(most_at_once or places, places, num_jobs))
    return Placement(
        jobs_at_once=at_once,
        workers=workers,
        cpus=cpus if gpus else cpus_of_cpu_worker(nodes, workers, at_once),
        gpus=gpus,
        on_one_node=on_one_node,
        min_workers=min_gpus,
    )


def pretraining_placement(
    cluster: ClusterSettings, num_jobs: int, resources: Resources
) -> Placement:
    """Share CPUs and GPUs among jobs; on GPUs, one job at a time has all that the settings name.

    Raises:
        UserError: If there is too little for one job.
    """
    most = 1 if cluster.num_gpus else None
    placement = job_placement(
        num_jobs,
        cluster.num_workers,
        cluster.num_gpus,
        resources,
        min_gpus=cluster.min_gpus,
        most_at_once=most,
    )
    return replace(placement, collective_timeout_seconds=cluster.collective_timeout_seconds)


def trial_placement(sweep: SweepSettings, num_trials: int, resources: Resources) -> Placement:
    """Share CPUs and GPUs among the trials of a sweep.

    Raises:
        UserError: If there is too little for one trial.
    """
    return job_placement(
        num_trials,
        sweep.workers_per_trial,
        sweep.gpus_per_trial or 0,
        resources,
        most_at_once=sweep.trials_at_once,
        per_trial=True,
    )


def use_fake_gpus() -> bool:
    """Return whether Ray's GPUs are only names, and work that reserves one runs on CPUs."""
    return os.environ.get(PRETENDED_GPUS) == "1"


def worker_device(*, use_gpu: bool) -> str:
    """Return the device of this process, which is a Ray task or actor: `cpu` or `cuda`.

    Args:
        use_gpu: Whether it has reserved a GPU.

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
