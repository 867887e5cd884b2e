"""How many GPUs each trial of a sweep gets, where the settings leave it open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from orchestrator.planning import machine
from orchestrator.planning.devices import trial_devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.gpus import GPUS, USUAL_GPU
from orchestrator.settings import Settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.workspace.errors import UserError


def on_trial_devices(trainings: Iterable[Estimate], settings: Settings) -> list[Estimate]:
    """Return trainings on the devices of a sweep's trials; see `assign_trial_gpus`."""
    devices = trial_devices(settings)
    return [replace(training, devices=devices) for training in trainings]


def assign_trial_gpus(
    settings: Settings, trainings: Sequence[Estimate] = (), *, gpu_bytes: int | None = None
) -> Settings:
    """Return the settings with the GPUs of a sweep's trials filled in.

    If the run has GPUs, each trial gets the smallest number on which every trial fits, and as many
    run at once as there are GPUs for.

    Args:
        trainings: The trials that are left.
        gpu_bytes: Memory of a GPU; by default that of the one that `cluster.gpu` names, else of
            this machine's, else of the usual one.
    """
    cluster = settings.cluster
    sweep = settings.sweep
    if not cluster.num_gpus:
        return _with_sweep(settings, gpus_per_trial=sweep.gpus_per_trial or 0)
    gpus_per_trial = sweep.gpus_per_trial
    if gpus_per_trial is None and sweep.workers_per_trial > 1:
        gpus_per_trial = sweep.workers_per_trial  # Each worker has one.
    if gpus_per_trial is None:
        installed = machine.installed_gpus() if cluster.ray_address == LOCAL else ()
        if gpu_bytes is None and cluster.gpu is None and installed:
            gpu_bytes = installed[0].free_bytes
        gpu_bytes = gpu_bytes or GPUS[cluster.gpu or USUAL_GPU].free_bytes
        gpus_per_trial = _fewest_gpus(settings, trainings, gpu_bytes)
    trials_per_gpu = machine.num_sharing(gpus_per_trial)
    most_at_once = int(cluster.num_gpus * trials_per_gpu // math.ceil(gpus_per_trial))
    at_once = min(sweep.trials_at_once or most_at_once, most_at_once)
    return _with_sweep(settings, gpus_per_trial=gpus_per_trial, trials_at_once=at_once)


def _fewest_gpus(settings: Settings, trainings: Sequence[Estimate], gpu_bytes: int) -> int:
    """Return the fewest GPUs on which every trial fits; all of them if none does.

    A trial that does not fit is refused later.
    """
    num_gpus = settings.cluster.num_gpus
    for number in range(1, num_gpus):
        placed = on_trial_devices(trainings, _with_sweep(settings, gpus_per_trial=number))
        try:
            needed = max((training.worker_bytes for training in placed), default=0)
        except UserError:
            continue  # These workers cannot share a step's sequences evenly.
        if needed <= gpu_bytes:
            return number
    return num_gpus


def _with_sweep(settings: Settings, **changes: float) -> Settings:
    return settings.model_copy(update={"sweep": settings.sweep.model_copy(update=changes)})
