"""Where training jobs run: under Ray Train, or in this process.

Ray is imported only where it is used: importing it takes two seconds, and a debugger wants none of
its processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.planning.resources import check_resources
from orchestrator.settings import ClusterSettings
from orchestrator.training.job import TrainingJob, TrainingOutcome, check_job
from orchestrator.workspace.errors import UserError


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


def check_jobs(
    jobs: Sequence[TrainingJob], cluster: ClusterSettings, *, local: bool = False
) -> None:
    """Check, before anything is written or started, that jobs can run as described.

    Args:
        jobs: What will run.
        cluster: Workers and GPUs of each.
        local: Whether they run in this process.

    Raises:
        UserError: If there are too few CPUs or GPUs, or a job cannot run as described.
    """
    if local:
        check_local(cluster.num_workers, cluster.num_gpus)
    num_workers = check_resources(cluster.num_workers, cluster.num_gpus)
    for job in jobs:
        check_job(job, num_workers=num_workers)


def check_local(num_workers: int, num_gpus: int) -> None:
    """Refuse `--local` with several workers.

    Raises:
        UserError: If more than one worker or GPU is asked for.
    """
    if max(num_workers, num_gpus) > 1:
        asked = f"--gpus {num_gpus}" if num_gpus > 1 else f"--workers {num_workers}"
        raise UserError(
            f"--local trains in this process alone, and {asked} asks for several (cluster.num_gpus "
            "and cluster.num_workers in the settings); leave out --local, or type "
            "--set cluster.num_workers=1" + (" --set cluster.num_gpus=1" if num_gpus else "")
        )
