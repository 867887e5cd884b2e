"""Where jobs and measurements run: under Ray, or in this process.

Ray is imported only where it is used: importing it takes two seconds, and a debugger wants none of
its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.device_work import DeviceWork, OnDevice, on_cpu
from orchestrator.workspace.ray_address import LOCAL

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
    """
    on_gpu = cluster.num_gpus > 0 or None
    return partial(_run_on_device, cluster=cluster, folder=folder, on_gpu=on_gpu)


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
    from orchestrator.training.model_loading import best_device

    return work(str(best_device()), progress)
