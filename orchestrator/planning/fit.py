"""Whether trainings fit into memory and onto the disk, and if not, the nearest setting that does.

Three settings are proposed, alone or together: fewer sequences per pass (same gradients), layers
recomputed in the backward pass (slower), and a model that its workers share. On a cluster that is
joined, only the disk is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from orchestrator.planning.estimate import Devices, Estimate, groups_by_devices
from orchestrator.planning.machine import THIS_MACHINE, FreeBytes, local_free_bytes
from orchestrator.records.training import TrainingJob
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_byte_parts, format_bytes, format_count
from orchestrator.training.devices import World
from orchestrator.training.monitor import ASSUMED_GPU, ASSUMED_GPU_BYTES
from orchestrator.workspace.errors import DeviceError, UserError, out_of_memory_text

HOST_PROCESS_BYTES = 2 * 2**30
"""Roughly what PyTorch with CUDA and NCCL takes of the machine's memory in each worker on a GPU."""
LARGEST_SHARE = 0.8
"""Share of a failed plan's bytes that a proposal may take: the plan left something out."""


def find_problems(
    trainings: Sequence[Estimate],
    disk: Mapping[str, int],
    folder: Path,
    address: str,
    *checks: Callable[[], None],
) -> dict[str, str | None]:
    """Return place -> why trainings do not fit there, None if they do.

    The first place is this machine. Without the GPUs that are asked for, an assumed one is another.

    Args:
        trainings, disk: As in `check_fit`.
        folder: A folder on the workspace's disk; it need not exist.
        address: Of the Ray cluster; on one that is joined, only the disk is checked.
        checks: Raise `UserError` if this machine has too few CPUs or GPUs.
    """

    def problem_of(*checks: Callable[[], None]) -> str | None:
        found = []
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return ". Also: ".join(found) or None

    is_far = address != LOCAL
    place = "this machine" + " (the cluster's memory is unknown)" * is_far
    free, here = local_free_bytes(folder), () if is_far else trainings
    problems = {place: problem_of(*checks, partial(check_fit, here, disk, free))}
    if any(each.devices.on_gpus for each in trainings) and not free.gpus:
        # The memory of the machine that has this GPU is not known.
        assumed = FreeBytes(gpus=(ASSUMED_GPU_BYTES,), gpu_name=f"an {ASSUMED_GPU}")
        problems[assumed.gpu_name] = problem_of(partial(check_fit, trainings, disk, assumed))
    return problems


def check_fit(trainings: Sequence[Estimate], disk: Mapping[str, int], free: FreeBytes) -> None:
    """Refuse trainings that would run out of memory (each of them) or disk (all together).

    Args:
        disk: Name -> bytes of what is written; see `Price`.
        free: What is free where they run.

    Raises:
        UserError: If they do not fit; says what would.
    """
    for group in groups_by_devices(trainings):
        _check_memory(group, free)
    needed = sum(disk.values())
    if free.disk is not None and needed > free.disk:
        raise UserError(
            f"the run would write about {format_bytes(needed)} ({format_byte_parts(disk)}), and "
            f"the workspace's disk has {format_bytes(free.disk)} free; free some space, or choose "
            "another place with --workspace"
        )


def _check_memory(group: Sequence[Estimate], free: FreeBytes) -> None:
    devices, largest = group[0].devices, max(group, key=lambda each: each.worker_bytes)
    workers, at_once = devices.num_workers, min(devices.at_once, len(group))
    # A training on GPUs has its own memory, or a share of it. On CPUs those that run at the same
    # time share it, and of the trials of a sweep fewer can be asked for.
    if devices.on_gpus:
        memory, place = min(free.gpus[:workers], default=None), free.gpu_name
    else:
        sharing = workers * (1 if devices.are_trials else at_once)
        memory, place = free.memory and free.memory // sharing, THIS_MACHINE
    if memory is None:
        return
    on_same_gpu = min(devices.sharing_a_gpu, at_once)
    memory //= on_same_gpu
    if on_same_gpu > 1:
        place += f", shared by {on_same_gpu} trials,"
    if largest.worker_bytes > memory:
        each = f" for each of {workers} workers" * (workers > 1)
        raise UserError(
            f"training would take about {format_bytes(largest.worker_bytes)}{each} "
            f"({format_byte_parts(largest.worker_memory)}), and {place} has {format_bytes(memory)} "
            f"free{' for each' * (workers > 1)}; {advice(largest, memory)}"
        )
    parts = {name: workers * value for name, value in largest.worker_memory.items()}
    machine: int | None = memory * workers
    if devices.on_gpus:
        # PyTorch rounds each pinned buffer up to a power of two. Files that are mapped do not
        # count: the system drops them if it needs memory.
        pinned = 2 * largest.checkpoint_bytes
        parts = {"PyTorch": workers * HOST_PROCESS_BYTES, "pinned buffers for checkpoints": pinned}
        machine = free.memory
    needed = sum(parts.values())
    fewer = "sweep.trials_at_once" if devices.are_trials else "cluster.num_gpus"
    is_checked = devices.on_gpus or devices.are_trials
    if is_checked and machine is not None and at_once * needed > machine:
        many = f"{at_once} trainings at once" if at_once > 1 else "training"
        on = format_count(devices.num_used(at_once), "GPU" if devices.on_gpus else "CPU")
        raise UserError(
            f"{many} on {on} would take about {format_bytes(at_once * needed)} of the machine's "
            f"own memory ({format_byte_parts(parts)}{' for each' * (at_once > 1)}), and it has "
            f"{format_bytes(machine)} free; set {fewer} lower"
        )


def advice(training: Estimate, most_bytes: int) -> str:
    """Return, in words, the smallest change of settings with which a worker fits into memory."""
    changes = smaller_settings(training, most_bytes)
    if changes is None:
        return "no setting needs as little; take a smaller model, or more memory"
    return f"the nearest setting that fits: {' '.join(f'--set {change}' for change in changes)}"


def smaller_settings(training: Estimate, most_bytes: int) -> list[str] | None:
    """Return the smallest change of settings with which a worker fits into memory, if there is one.

    Fewer sequences per pass come first, then recomputed layers, then a shared model.

    Args:
        most_bytes: Memory that the worker may take.
    """
    devices, recipe, section = training.devices, training.recipe, training.section
    sharded: list[tuple[list[str], Devices]] = [([], devices)]
    if devices.parallel == "ddp" and devices.num_workers > 1:
        sharded.append((["cluster.parallel=fsdp"], replace(devices, parallel="fsdp")))
    per_pass = training.sequences_per_pass
    for sharding, placed in sharded:
        for recomputes in dict.fromkeys((recipe.activation_checkpointing, True)):
            for number in (per_pass >> halvings for halvings in range(per_pass.bit_length())):
                changed = {"num_sequences_per_pass": number, "activation_checkpointing": recomputes}
                smaller = recipe.model_copy(update=changed)
                other = replace(training, recipe=smaller, devices=placed)
                if other.worker_bytes <= most_bytes:
                    changes = list(sharding)
                    if recomputes and not recipe.activation_checkpointing:
                        changes.append(f"{section}.activation_checkpointing=true")
                    if number < per_pass:
                        changes.append(f"{section}.num_sequences_per_pass={number}")
                    return changes
    return None


@contextmanager
def out_of_memory_explained(
    job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"] | None = None
) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error in the block, which trains a job, into a `DeviceError`.

    Trying again would end the same way.

    Args:
        parallel: How the workers share the model; None if the settings offer no choice.

    Raises:
        DeviceError: Says what was planned, and the nearest setting that takes clearly less.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        devices = Devices(
            num_workers=world.size,
            on_gpus=world.device != "cpu",
            parallel=parallel,
            shards=world.shards,
        )
        training = replace(Estimate.of(job), devices=devices)
        raise DeviceError(
            f"training ran out of memory on {world.device} ({out_of_memory_text(error)}); its plan "
            f"was {format_bytes(training.worker_bytes)} "
            f"({format_byte_parts(training.worker_memory)}); "
            f"{advice(training, int(LARGEST_SHARE * training.worker_bytes))}; the checkpoints are "
            "kept"
        ) from None
