"""The devices that trainings run on, as the settings say: workers, GPUs, how many at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.machine import num_sharing
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.settings.cluster import GpuModel
from orchestrator.workspace.processors import num_cpus


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices that trainings share: some at the same time, each on workers of its own."""

    num_workers: int = 1
    """Workers of each training."""
    on_gpus: bool = False
    """Whether each worker has a GPU, or a share of one."""
    at_once: int = 1
    """Most trainings at the same time."""
    sharing_a_gpu: int = 1
    """Most of them that share a GPU."""
    gpu: GpuModel | None = None
    """Model of the GPUs that is assumed; None for the installed one, if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp`: the workers share the model."""
    shards: int | None = None
    """With `fsdp`, workers that share one replica of the model, if not all."""
    are_trials: bool = False
    """Whether the trainings are trials of a sweep, so `sweep.trials_at_once` limits them."""

    @property
    def num_shards(self) -> int:
        """Workers that share weights, gradients and moments; 1 if each has all."""
        if self.parallel != "fsdp":
            return 1
        return self.shards or self.num_workers


def run_devices(cluster: ClusterSettings) -> Devices:
    """Return the devices of a run's trainings: one after another on GPUs, side by side on CPUs."""
    num_workers = cluster.num_gpus or cluster.num_workers
    on_gpus = cluster.num_gpus > 0
    return Devices(
        num_workers=num_workers,
        on_gpus=on_gpus,
        at_once=1 if on_gpus else max(1, num_cpus() // num_workers),
        gpu=cluster.gpu,
        parallel=cluster.parallel,
        shards=cluster.num_shards,
    )


def trial_devices(settings: Settings) -> Devices:
    """Return the devices of a sweep's trials, whose GPUs `assign_trial_gpus` has filled in."""
    sweep = settings.sweep
    cluster = settings.cluster
    gpus_per_trial = sweep.gpus_per_trial or 0
    num_workers = sweep.num_workers_per_trial
    if gpus_per_trial:
        at_once = sweep.trials_at_once or 1
    else:
        most_on_cpus = max(1, num_cpus() // num_workers)
        at_once = min(sweep.trials_at_once or most_on_cpus, most_on_cpus)
    return Devices(
        num_workers=num_workers,
        on_gpus=gpus_per_trial > 0,
        at_once=at_once,
        sharing_a_gpu=num_sharing(gpus_per_trial) if gpus_per_trial else 1,
        gpu=cluster.gpu,
        parallel=cluster.parallel,
        shards=cluster.shards_of(num_workers),
        are_trials=True,
    )
