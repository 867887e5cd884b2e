"""Where jobs and measurements run: under Ray, or in this process.

Ray is imported only where it is used: importing it takes two seconds, and a debugger wants none of
its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.cluster.joining import check_ray_can_run
from orchestrator.planning.machine import Resources, check_device
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.progress import Progress
from orchestrator.training.devices import DeviceWork, OnDevice, on_cpu

T = TypeVar("T")


class RunJobs(Protocol):
    """Run jobs to their ends; see `run_train_jobs` and `run_local_jobs`."""

    def __call__(
        self,
        jobs: Sequence[TrainingJob],
        cluster: ClusterSettings | None = None,
        *,
        watch: Callable[[], None] | None = None,
        note: Callable[[str], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> list[TrainingOutcome]: ...


@contextmanager
def joined_cluster(
    cluster: ClusterSettings,
    folder: Path,
    check: Callable[[Resources], None],
    progress: Progress,
) -> Iterator[None]:
    """Join the cluster that the settings name for a block of code, and check it first.

    What the block prepares may take hours. A Ray of this machine starts later, with the first jobs.

    Args:
        folder: The workspace.
        check: Raises `UserError` if the nodes have too few CPUs or GPUs.

    Raises:
        UserError: If the cluster cannot be joined, or its nodes cannot be used.
    """
    if cluster.ray_address == LOCAL:
        check_ray_can_run(LOCAL)
        yield
        return
    from orchestrator.cluster.start import ray_cluster

    with ray_cluster(cluster, folder=folder, say=progress.start) as resources:
        if not cluster.wait_for_gpus:
            check(resources)
        yield


def job_runner(*, local: bool) -> RunJobs:
    """Return the function that runs jobs in this process, or under Ray Train."""
    if local:
        from orchestrator.cluster.local import run_local_jobs

        return run_local_jobs
    from orchestrator.cluster.ray_train import run_train_jobs

    return run_train_jobs


def trial_device(settings: Settings, folder: Path) -> OnDevice:
    """Return a function that runs work as the trials of a sweep: on a GPU if they have some.

    Args:
        folder: The workspace, or a folder in it; the GPU may be on another node.
    """
    on_gpu = settings.trials_use_gpus
    return partial(_run_on_device, cluster=settings.cluster, folder=folder, on_gpu=on_gpu)


def command_device(cluster: ClusterSettings, folder: Path) -> OnDevice:
    """Return a function that runs the work of a command that starts no jobs.

    The settings may name GPUs, or a cluster that has some: then the work is a Ray
    task with a GPU. Otherwise it runs in this process, on a GPU if this machine has one.
    `cluster.device` may name the CPU or a GPU instead.

    Raises:
        UserError: If this machine does not have that device.
    """
    on_gpu = cluster.num_gpus > 0 or None
    if cluster.device == "cuda" and cluster.ray_address != LOCAL:
        on_gpu = True
    elif cluster.device and not (cluster.device == "cuda" and on_gpu):
        check_device(cluster.device)
        return partial(_run_here, device=cluster.device)
    return partial(_run_on_device, cluster=cluster, folder=folder, on_gpu=on_gpu)


def _run_here(work: DeviceWork[T], progress: Progress, *, device: str) -> T:
    if device != "cpu":
        import torch

        torch.cuda.set_device(device)
    return work(device, progress)


def _run_on_device(
    work: DeviceWork[T],
    progress: Progress,
    *,
    cluster: ClusterSettings,
    folder: Path,
    on_gpu: bool | None,
) -> T:
    if on_gpu is False:
        return on_cpu(work, progress)
    if on_gpu or cluster.ray_address != LOCAL:
        from orchestrator.cluster.gpu_task import run_gpu_task
        from orchestrator.cluster.start import ray_cluster

        with ray_cluster(cluster, folder=folder, say=partial(progress.advance, 0)) as resources:
            if on_gpu or resources.gpus:
                return run_gpu_task(work, progress, waits_for_gpus=cluster.wait_for_gpus)
    from orchestrator.models.open import best_device

    return work(str(best_device()), progress)
