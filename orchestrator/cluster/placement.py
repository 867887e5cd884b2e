"""How many trials find their places side by side, and what each of their workers gets.

A trial is one process, or several data-parallel workers of one CPU share or one GPU each. Trials
never wait for half of their workers: as many run at once as have room in full, and the CPUs are
shared out evenly among all workers that run together, which is each worker's number of threads.
What does not fit is the user's mistake, found before anything is started.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.resources import Resources, check_resources
from orchestrator.workspace.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """How many trials run side by side, on what, and how often one may fail."""

    at_once: int | None = None
    """Most trials side by side; as many as there is room for when unset."""
    workers_per_trial: int = 1
    """Data-parallel workers of a trial; with GPUs, 1 or the number of GPUs."""
    gpus_per_trial: int = 0
    """GPUs of a trial, one for each worker; 0 trains on CPUs."""
    max_failures: int = 2
    """How often a failed trial is tried again."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What trials get."""

    at_once: int
    """Trials side by side."""
    workers: int
    """Workers of each."""
    cpus: int
    """CPUs of each worker, and its threads; a trial has `workers` times as many."""
    use_gpu: bool
    """Whether each worker has a GPU."""


def find_room(limits: TrialLimits, num_trials: int, resources: Resources) -> Room:
    """Share out what there is.

    Args:
        limits: What a trial needs.
        num_trials: Trials that wait.
        resources: What there is.

    Raises:
        UserError: If there is no room for one trial.
    """
    workers = check_trial_size(limits, resources)
    use_gpu = limits.gpus_per_trial > 0
    places = (resources.gpus if use_gpu else resources.cpus) // workers
    at_once = max(1, min(limits.at_once or places, places, num_trials))
    cpus = max(1, resources.cpus // (at_once * workers))
    return Room(at_once=at_once, workers=workers, cpus=cpus, use_gpu=use_gpu)


def check_trial_size(limits: TrialLimits, resources: Resources | None = None) -> int:
    """Check that one trial finds its places, and return the number of its workers.

    Args:
        limits: What a trial needs.
        resources: What there is; this machine's when unset.

    Raises:
        UserError: If it does not; says what would fit.
    """
    try:
        return check_resources(limits.workers_per_trial, limits.gpus_per_trial, resources)
    except UserError as error:
        # The options of a single job have their counterparts for each trial of a sweep.
        text = str(error).replace("--workers", "--workers-per-trial")
        # Trials run on GPUs also because the run does.
        text = text.replace("leave out --gpus", "leave out --gpus and set cluster.num_gpus=0")
        raise UserError(text.replace("--gpus", "--gpus-per-trial")) from None
