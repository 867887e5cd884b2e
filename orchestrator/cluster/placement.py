"""How many jobs run at the same time, and the CPUs and GPUs of each of their workers.

A job is one process, or several data-parallel workers of equal CPUs or one GPU each. As many jobs
run at the same time as find places for all of their workers, so none waits for half of them. The
CPUs are shared evenly among all workers that run at the same time; each uses as many threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.resources import Resources, check_available
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
    per_trial: bool = False,
) -> Placement:
    """Share CPUs and GPUs among jobs.

    Args:
        num_jobs: Jobs that wait.
        num_workers: Data-parallel workers of each job; with GPUs, 1 or the number of GPUs.
        num_gpus: GPUs of each job, one for each worker; 0 runs on CPUs.
        resources: What the Ray that runs has.
        most_at_once: Limit of jobs at the same time.
        per_trial: Whether the jobs are trials of a sweep, for the error.

    Raises:
        UserError: If there is too little for one job.
    """
    # A cluster elsewhere may have less than is asked for; nothing else could know before.
    check_available(num_workers, num_gpus, resources, per_trial=per_trial)
    workers = num_gpus or num_workers
    places = (resources.gpus if num_gpus else resources.cpus) // workers
    at_once = max(1, min(most_at_once or places, places, num_jobs))
    cpus = max(1, resources.cpus // (at_once * workers))
    return Placement(jobs_at_once=at_once, workers=workers, cpus=cpus, use_gpu=num_gpus > 0)


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
