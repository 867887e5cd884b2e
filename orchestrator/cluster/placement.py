"""How many jobs run at the same time, and the CPUs and GPUs of each of their workers.

A job is one process, or several data-parallel workers of equal CPUs or one GPU each. As many jobs
run at the same time as find places for all of their workers, so none waits for half of them. The
CPUs are shared evenly among all workers that run at the same time; each uses as many threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.resources import Resources, check_resources
from orchestrator.settings import SweepSettings


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What each of the jobs that run at the same time gets."""

    jobs_at_once: int
    workers: int
    """Workers of each job."""
    cpus: int
    """CPUs and threads of each worker; a job has `workers` times as many."""
    use_gpu: bool
    """Whether each worker has a GPU."""


def job_placement(
    num_jobs: int,
    num_workers: int,
    num_gpus: int,
    resources: Resources,
    *,
    most_at_once: int | None = None,
) -> Placement:
    """Share CPUs and GPUs among jobs.

    Args:
        num_jobs: Jobs that wait.
        num_workers: Data-parallel workers of each job; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of each job, one for each worker; 0 runs on CPUs.
        resources: What there is to share.
        most_at_once: Limit of jobs at the same time.

    Raises:
        UserError: If there is too little for one job.
    """
    workers = check_resources(num_workers, num_gpus, resources)
    places = (resources.gpus if num_gpus else resources.cpus) // workers
    at_once = max(1, min(most_at_once or places, places, num_jobs))
    cpus = max(1, resources.cpus // (at_once * workers))
    return Placement(jobs_at_once=at_once, workers=workers, cpus=cpus, use_gpu=num_gpus > 0)


def trial_placement(sweep: SweepSettings, num_trials: int, resources: Resources) -> Placement:
    """Share CPUs and GPUs among the trials of a sweep.

    Raises:
        UserError: If there is too little for one trial.
    """
    workers = check_trial_size(sweep, resources)
    num_gpus = sweep.gpus_per_trial or 0
    return job_placement(
        num_trials, workers, num_gpus, resources, most_at_once=sweep.trials_at_once
    )


def check_trial_size(sweep: SweepSettings, resources: Resources | None = None) -> int:
    """Check that there is enough for one trial, and return the number of its workers.

    Args:
        sweep: Workers and GPUs of a trial.
        resources: What there is; this machine's when unset.

    Raises:
        UserError: If there is not; says what would fit.
    """
    return check_resources(
        sweep.workers_per_trial, sweep.gpus_per_trial or 0, resources, per_trial=True
    )
