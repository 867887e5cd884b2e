"""How many GPUs each trial of a sweep gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from orchestrator.planning.nodes import num_sharing
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.planning.resources import local_free_bytes
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.training.peak_flops import ASSUMED_GPU_BYTES
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import LOCAL


def assign_trial_gpus(
    settings: Settings,
    trainings: Sequence[PlannedTraining] = (),
    *,
    gpu_bytes: int | None = None,
) -> Settings:
    """Return the settings with the GPUs of a sweep's trials filled in.

    If the run has GPUs, each trial gets the smallest number on which every trial fits, and only as
    many trials run at once as the run's GPUs allow.

    Args:
        trainings: The unfinished trials; if unknown, a trial gets one GPU.
        gpu_bytes: Free memory of a GPU; that of this machine's, or of the assumed GPU, if unset.

    Raises:
        UserError: If trials are sent to CPUs although the run has GPUs, or ask for more GPUs than
            it has.
    """
    num_gpus, sweep = settings.cluster.num_gpus, settings.sweep
    per_trial = sweep.gpus_per_trial
    if not num_gpus:
        return _with_sweep(settings, gpus_per_trial=per_trial or 0)
    if per_trial == 0:
        raise UserError(
            f"sweep.gpus_per_trial=0 trains trials on CPUs, and cluster.num_gpus={num_gpus} names "
            "GPUs; leave sweep.gpus_per_trial out, or set cluster.num_gpus=0 to train everything "
            "on CPUs"
        )
    if per_trial is None and sweep.workers_per_trial > 1:
        per_trial = sweep.workers_per_trial
    if per_trial is None:
        if gpu_bytes is None and settings.cluster.ray_address == LOCAL:
            gpu_bytes = local_free_bytes(Path.cwd(), num_gpus=1).memory
        free = gpu_bytes or ASSUMED_GPU_BYTES
        fitting = (
            number
            for number in range(1, num_gpus)
            if all(_fits(each, number, settings.cluster, free) for each in trainings)
        )
        per_trial = next(fitting, num_gpus)
    if per_trial > num_gpus:
        raise UserError(
            f"a trial asks for {per_trial:g} GPUs (sweep.gpus_per_trial, sweep.workers_per_trial), "
            f"and the run has {num_gpus} (cluster.num_gpus); lower the first or raise the second"
        )
    most = num_gpus * num_sharing(per_trial) // ceil(per_trial)
    at_once = min(sweep.trials_at_once or most, most)
    return _with_sweep(settings, gpus_per_trial=per_trial, trials_at_once=at_once)


def _with_sweep(settings: Settings, **changes: float) -> Settings:
    return settings.model_copy(update={"sweep": settings.sweep.model_copy(update=changes)})


def placed_trial(
    training: PlannedTraining, num_workers: int, cluster: ClusterSettings, *, on_gpus: bool
) -> PlannedTraining:
    """Return a training on the workers of a trial, which share the model as `cluster` says."""
    return replace(
        training,
        num_workers=num_workers,
        on_gpus=on_gpus,
        parallel=cluster.parallel,
        shards=cluster.shards_of(num_workers),
    )


def _fits(training: PlannedTraining, num_gpus: int, cluster: ClusterSettings, free: int) -> bool:
    try:
        return placed_trial(training, num_gpus, cluster, on_gpus=True).worker_bytes <= free
    except UserError:
        return False  # The sequences of a step cannot be divided evenly among this many GPUs.
