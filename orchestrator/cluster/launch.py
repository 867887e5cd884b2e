"""Where training jobs run: under Ray Train, or in this process.

Ray is imported only by who uses it: it takes two seconds, and a debugger wants none of its
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.settings import ClusterSettings
from orchestrator.training.job import TrainingJob, TrainingOutcome, check_job


def check_jobs(
    jobs: Sequence[TrainingJob], cluster: ClusterSettings, *, local: bool = False
) -> None:
    """Find in a moment, before anything is written or started, what would make jobs fail.

    Args:
        jobs: What will run.
        cluster: Workers and GPUs of each.
        local: Whether they run in this process.

    Raises:
        UserError: If there are too few CPUs or GPUs, or a job cannot run as described.
    """
    if local:
        from orchestrator.cluster.local import check_local

        check_local(cluster.num_workers, cluster.num_gpus)
        for job in jobs:
            check_job(job)
        return
    from orchestrator.cluster.train import check_train_jobs

    check_train_jobs(jobs, num_workers=cluster.num_workers, num_gpus=cluster.num_gpus)


def run_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings,
    *,
    local: bool = False,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs to their ends; finished ones take no time, another process's are waited for.

    Args:
        jobs: What to train.
        cluster: Workers and GPUs of each, and how often a job is started again.
        local: Train in this process, without Ray, one after the other.
        watch: Called a few times a second, to show progress.
        note: Told if another process is waited for.
        say: Told that Ray starts.

    Raises:
        UserError: If a job cannot run as described.
        Interrupted: After Ctrl-C; says at which step the state is saved.
        RunFailed: If a job failed or diverged.
    """
    if local:
        from orchestrator.cluster.local import run_local_jobs

        return run_local_jobs(jobs, num_gpus=cluster.num_gpus, watch=watch, note=note)
    from orchestrator.cluster.train import run_train_jobs

    return run_train_jobs(
        jobs,
        num_workers=cluster.num_workers,
        num_gpus=cluster.num_gpus,
        parallel=cluster.parallel,
        max_failures=cluster.max_failures,
        watch=watch,
        note=note,
        say=say,
    )
