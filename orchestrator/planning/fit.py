"""Whether trainings fit the machine, and which settings take less.

On a cluster that is joined, only disk, CPUs and GPUs are checked: its memory is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.planning import machine
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.gpus import GPUS, USUAL_GPU
from orchestrator.planning.price import Group, groups_by_devices
from orchestrator.records.training import TrainingJob
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_byte_parts, format_bytes
from orchestrator.workspace.errors import DeviceError, out_of_memory_text
from orchestrator.workspace.files import free_disk

if TYPE_CHECKING:
    from orchestrator.training.world import World


def find_problems(
    trainings: Sequence[Estimate],
    disk: Mapping[str, int],
    folder: Path,
    address: str,
    lack: str | None,
) -> dict[str, str | None]:
    """Return place -> why trainings do not fit there, None if they do.

    The first place is this machine or the cluster. Where a model of GPU is named, or none is
    installed here, an assumed one is another.

    Args:
        trainings, disk: As in `reasons_not_to_fit`.
        folder: A folder on the workspace's disk; it need not exist.
        address: Of the Ray cluster.
        lack: Why this machine or the cluster has too few CPUs or GPUs; None if it has enough.
    """
    reasons = [lack] if lack else []
    gpus = tuple(gpu.free_bytes for gpu in machine.installed_gpus())
    free = machine.FreeBytes(memory=machine.free_memory(), gpus=gpus, disk=free_disk(folder))
    if address == LOCAL:
        place = "this machine"
        reasons += reasons_not_to_fit(trainings, disk, free)
    else:
        place = f"the cluster at {address} (its memory is unknown)"
        reasons += reasons_not_to_fit((), disk, free)
    places = {place: reasons}
    on_gpus = [training.devices for training in trainings if training.devices.on_gpus]
    if on_gpus and (on_gpus[0].gpu or not free.gpus):
        # The memory of the machine that has this GPU is not known.
        model = on_gpus[0].gpu or USUAL_GPU
        assumed = machine.FreeBytes(gpus=(GPUS[model].free_bytes,), gpu_name=f"an {model}")
        places[assumed.gpu_name] = reasons_not_to_fit(trainings, disk, assumed)
    return {place: ". Also: ".join(reasons) or None for place, reasons in places.items()}


def reasons_not_to_fit(
    trainings: Sequence[Estimate], disk: Mapping[str, int], free: machine.FreeBytes
) -> list[str]:
    """Return why trainings would run out of memory (each of them) or of disk (all together).

    Args:
        disk: Name -> bytes of what is written; see `Price`.
        free: What is free where they run.
    """
    reasons = [
        reason
        for group in groups_by_devices(trainings)
        if (reason := _reason_of_memory(group, free))
    ]
    needed = sum(disk.values())
    if free.disk is not None and needed > free.disk:
        reasons.append(
            f"the run would write about {format_bytes(needed)} ({format_byte_parts(disk)}), and "
            f"the workspace's disk has {format_bytes(free.disk)} free; free some space, or choose "
            "another place with --workspace"
        )
    return reasons


def _reason_of_memory(group: Group, free: machine.FreeBytes) -> str | None:
    """Return why the largest training of a group does not fit into memory; None if it does."""
    devices = group.devices
    if devices.on_gpus:
        # A worker has the memory of a GPU, or a share of it.
        memory = min(free.gpus[: devices.num_workers], default=None)
        place = free.gpu_name
        num_sharing = min(devices.sharing_a_gpu, group.at_once)
    else:
        # All workers on CPUs share this machine's.
        memory = free.memory
        place = machine.THIS_MACHINE
        num_sharing = devices.num_workers * group.at_once
    if memory is None or group.largest.worker_bytes <= memory // num_sharing:
        return None
    number = num_sharing if num_sharing > 1 else devices.num_workers
    text = f"training would take about {format_bytes(group.largest.worker_bytes)}"
    if number > 1:
        text += f" for each of {number} workers"
    text += (
        f" ({format_byte_parts(group.largest.worker_memory)}), and {place} has "
        f"{format_bytes(memory // num_sharing)} free"
    )
    if number > 1:
        text += " for each"
    text += f"; {smaller_settings(group.largest.section)}"
    if devices.are_trials and group.at_once > 1:
        text += ", or set sweep.trials_at_once lower"
    return text


def smaller_settings(section: str) -> str:
    """Return, in words, the settings with which a training of this section takes less memory."""
    return (
        f"set {section}.num_sequences_per_pass lower (same gradients), "
        f"{section}.activation_checkpointing=true (slower), or cluster.parallel=fsdp (several "
        "workers share the model), take a smaller model, or more memory"
    )


def sequences_if_uncompiled(
    job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"] = "ddp"
) -> int | None:
    """Return the most sequences of a pass with which a training that is not compiled fits the
    memory that is free on its GPU, at least 1; None on a CPU."""
    import torch

    if world.device == "cpu":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(world.device)
    estimate = _estimate_on(job, world, parallel)
    num_sequences = estimate.sequences_per_pass
    while num_sequences > 1:
        changes = {"compile": False, "num_sequences_per_pass": num_sequences}
        plain = replace(estimate, recipe=estimate.recipe.model_copy(update=changes))
        if plain.worker_bytes <= free_bytes:
            break
        num_sequences -= 1
    return num_sequences


def _estimate_on(job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"]) -> Estimate:
    devices = Devices(
        num_workers=world.size,
        on_gpus=world.device != "cpu",
        parallel=parallel,
        shards=world.shards,
    )
    return replace(Estimate.of(job), devices=devices)


@contextmanager
def out_of_memory_explained(
    job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"] = "ddp"
) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error in the block, which trains a job, into a `DeviceError`.

    Trying again would end the same way.

    Raises:
        DeviceError: Says what was planned, and which settings take less.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        training = _estimate_on(job, world, parallel)
        raise DeviceError(
            f"training ran out of memory on {world.device} ({out_of_memory_text(error)}); its plan "
            f"was {format_bytes(training.worker_bytes)} "
            f"({format_byte_parts(training.worker_memory)}); {smaller_settings(job.section)}; "
            "the checkpoints are kept"
        ) from None
