"""What several trainings take together: hours on their devices, memory of the largest, disk.

Speeds are those that equal trainings had in this workspace (`speeds.py`). Where there were none,
they are assumed: a share of the peak of a GPU (the one that the settings name, else an installed
one, else an H100) or of a CPU core. No training is then faster than its host starts operations. The
hours are those of training alone; what starts and measurements add is a second range.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from orchestrator.planning import machine
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.gpus import GPUS, USUAL_GPU
from orchestrator.planning.speeds import Speed, speed_range
from orchestrator.records.record import Record
from orchestrator.settings.training import Precision
from orchestrator.training.world import gpu_peak_flops
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.processors import num_cpus, processor_name

GPU_SHARES = (0.15, 0.25)
"""Shares of a GPU's peak that training reaches: traces of eager steps at 340M give 17 to 28%."""
CPU_SHARES = (0.2, 0.8)
"""CPUs differ more, and no table knows their peaks."""
CPU_PEAK_FLOPS = 1e11
"""Assumed peak of one CPU core: 2 fused products of 8 numbers in each of 3 billion cycles."""

SECONDS_PER_EVALUATION = (0.0003, 0.001)
"""Shortest and longest time in which a host starts the operations of a field evaluation, forward
and backward: a CPU core took 0.9 to 1.3 ms at width 8; compiled fields have fewer operations."""
START_SECONDS = (5.0, 40.0)
"""Assumed time until Ray has started, on an idle and on a busy machine."""
SECONDS_BESIDE_A_TRAINING = (5.0, 60.0)
"""Assumed time of a training's process to start, and to measure what is trained."""


class Rate(Record):
    """Assumed speed of one device: FLOP/s at most, and the shares of them that are reached."""

    peak_flops: float
    shares: tuple[float, float]
    source: str
    """What the peak is of, as text."""


class Price(Record):
    """What trainings take from here on."""

    is_upper_bound: bool = False
    """Whether not all are known, and the others are priced as the costliest that are possible."""
    num_trainings: int = 0
    num_tokens: int = 0
    """Tokens that they train on."""
    num_teacher_tokens: int = 0
    """Tokens that their teachers read."""
    flops: float = 0.0
    """FLOPs of the trainings and their teachers."""
    hours: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time until the last training ends."""
    num_assumed: int = 0
    """Trainings whose speed is assumed; that of the others is one that was measured."""
    additional_hours: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time of starts and measurements, in addition."""
    num_devices: int = 0
    """GPUs or CPUs that are used."""
    uses_gpus: bool = False
    rate: Rate | None = None
    """Assumed speed of one of them, in the costliest training of those; None if there are none."""
    memory: dict[str, int] = Field(default_factory=dict)
    """Name -> bytes of what takes memory in a worker of the largest training."""
    disk: dict[str, int] = Field(default_factory=dict)
    """Name -> bytes of what will be written, at most."""
    free_disk: int | None = None
    """Free bytes on the workspace's disk."""


@dataclass(frozen=True)
class Group:
    """Trainings that share devices."""

    devices: Devices
    trainings: list[Estimate]

    @property
    def at_once(self) -> int:
        """How many of them run at the same time."""
        return min(self.devices.at_once, len(self.trainings))

    @property
    def num_devices(self) -> int:
        """GPUs or CPUs that they use."""
        if not self.devices.on_gpus:
            return num_cpus()
        return math.ceil(self.at_once * self.devices.num_workers / self.devices.sharing_a_gpu)

    @property
    def largest(self) -> Estimate:
        """The training whose workers need the most memory."""
        return max(self.trainings, key=lambda training: training.worker_bytes)

    @property
    def flops(self) -> float:
        """FLOPs of all of them."""
        return sum(training.total_flops for training in self.trainings)

    @property
    def devices_of_one(self) -> float:
        """GPUs or CPUs of each training, or its share of one."""
        return self.num_devices / self.at_once

    def seconds_until_end(self, seconds_of_each: Iterable[float]) -> float:
        """Return the seconds until the last training ends, from those of each."""
        # The longest training starts first, and each next one where one ends.
        slots = [0.0] * self.at_once
        for seconds_of_one in sorted(seconds_of_each, reverse=True):
            heapq.heapreplace(slots, slots[0] + seconds_of_one)
        return max(slots)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all checkpoints that exist at one time, at most."""
        kept = sum(training.new_checkpoint_bytes for training in self.trainings)
        in_writing = sorted(training.bytes_in_writing for training in self.trainings)
        return kept + sum(in_writing[-self.at_once :])


def groups_by_devices(trainings: Iterable[Estimate]) -> list[Group]:
    """Return the trainings that share devices."""
    groups: dict[Devices, Group] = {}
    for training in trainings:
        group = groups.setdefault(training.devices, Group(training.devices, []))
        group.trainings.append(training)
    return list(groups.values())


def assumed_rate(devices: Devices, precision: Precision, share: float | None = None) -> Rate:
    """Return the rate of one device in a precision: of a GPU, or of a CPU core.

    Args:
        share: Share of the peak that is reached; a usual range if unset.
    """
    shares = GPU_SHARES if devices.on_gpus else CPU_SHARES
    if share:
        shares = (share, share)
    if devices.on_gpus:
        names = [GPUS[devices.gpu or USUAL_GPU].name]
        if devices.gpu is None:
            names = [*(gpu.name for gpu in machine.installed_gpus()[:1]), *names]
        for name in names:
            if peak := gpu_peak_flops(name, precision):
                source = f"{name}, {precision}, dense"
                return Rate(peak_flops=peak, shares=shares, source=source)
    return Rate(peak_flops=CPU_PEAK_FLOPS, shares=shares, source="a CPU core, assumed")


def measuring_hours(flops: float, num_evaluations: int, *, on_gpu: bool) -> tuple[float, float]:
    """Return the shortest and longest time of forward passes in float32, on one GPU or all CPUs.

    Args:
        num_evaluations: Field evaluations whose operations the host starts, over all passes.
    """
    rate = assumed_rate(Devices(on_gpus=on_gpu), "fp32")
    num_devices = 1 if on_gpu else num_cpus()
    slowest, fastest = (num_devices * rate.peak_flops * share for share in rate.shares)
    least_seconds, most_seconds = SECONDS_PER_EVALUATION
    shortest = max(flops / fastest, num_evaluations * least_seconds)
    longest = max(flops / slowest, num_evaluations * most_seconds)
    return shortest / 3600, longest / 3600


def seconds_range(training: Estimate, rate: Rate, num_devices: float) -> tuple[float, float]:
    """Return the shortest and longest time of a training at an assumed rate of each device."""
    lowest_share, highest_share = rate.shares
    full_rate = rate.peak_flops * num_devices
    least_seconds, most_seconds = SECONDS_PER_EVALUATION
    shortest = training.total_flops / (full_rate * highest_share)
    longest = training.total_flops / (full_rate * lowest_share)
    return (
        max(shortest, training.num_evaluations * least_seconds),
        max(longest, training.num_evaluations * most_seconds),
    )


def price_of(
    trainings: Sequence[Estimate],
    folder: Path,
    *,
    speeds: Sequence[Speed] = (),
    hours_of_influence: tuple[float, float] = (0.0, 0.0),
    new_token_bytes: int = 0,
    is_upper_bound: bool = False,
    mfu: float | None = None,
) -> Price:
    """Return the price of trainings; those on other devices run one after another.

    Args:
        trainings: Those that are not finished.
        folder: A folder on the workspace's disk; it need not exist.
        speeds: Of trainings that were measured.
        hours_of_influence: Shortest and longest time in which influence is measured before them.
        new_token_bytes: Bytes of the tokens that are prepared first.
        is_upper_bound: Whether some of them stand for others that are not known yet.
        mfu: Share of the peak FLOP/s that is assumed, also where speeds were measured; a usual
            range if unset.
    """
    groups = groups_by_devices(trainings)

    # Hours: one group after another. Each rate is looked up once: the driver is asked for the GPU's
    # name. Trainings of a group may differ in precision, so in rate.
    rates: dict[tuple[bool, Precision], Rate] = {}
    assumed: list[Estimate] = []
    shortest = longest = 0.0
    for group in groups:
        processor = _processor_of(group.devices) if speeds and not mfu else None
        shortest_of_each: list[float] = []
        longest_of_each: list[float] = []
        for training in group.trainings:
            measured = None
            if processor:
                measured = speed_range(training, speeds, processor, int(group.devices_of_one))
            if measured:
                lowest, highest = measured
                shortest_of_one = training.total_flops / highest
                longest_of_one = training.total_flops / lowest
            else:
                precision = training.recipe.precision
                device_and_precision = (group.devices.on_gpus, precision)
                if device_and_precision not in rates:
                    rates[device_and_precision] = assumed_rate(group.devices, precision, mfu)
                shortest_of_one, longest_of_one = seconds_range(
                    training, rates[device_and_precision], group.devices_of_one
                )
                assumed.append(training)
            shortest_of_each.append(shortest_of_one)
            longest_of_each.append(longest_of_one)
        shortest += group.seconds_until_end(shortest_of_each) / 3600
        longest += group.seconds_until_end(longest_of_each) / 3600
    # Trainings that run at the same time start and are measured at the same time.
    num_rounds = sum(math.ceil(len(group.trainings) / group.at_once) for group in groups)
    least_additional, most_additional = (
        of_influence + ((start + num_rounds * beside) / 3600 if groups else 0.0)
        for of_influence, start, beside in zip(
            hours_of_influence, START_SECONDS, SECONDS_BESIDE_A_TRAINING, strict=True
        )
    )
    costliest = max(assumed, key=lambda training: training.total_flops, default=None)
    rate = None
    if costliest is not None:
        rate = rates[costliest.devices.on_gpus, costliest.recipe.precision]

    disk = {
        "tokens": new_token_bytes,
        "checkpoints": sum(group.checkpoint_bytes for group in groups),
    }

    largest = max(trainings, key=lambda training: training.worker_bytes, default=None)
    return Price(
        is_upper_bound=is_upper_bound,
        num_trainings=len(trainings),
        num_tokens=sum(training.num_tokens for training in trainings),
        num_teacher_tokens=sum(training.num_teacher_tokens for training in trainings),
        flops=sum(group.flops for group in groups),
        hours=(shortest, longest),
        num_assumed=len(assumed),
        additional_hours=(least_additional, most_additional),
        num_devices=max((group.num_devices for group in groups), default=0),
        uses_gpus=any(group.devices.on_gpus for group in groups),
        rate=rate,
        memory=largest.worker_memory if largest else {},
        disk={name: num_bytes for name, num_bytes in disk.items() if num_bytes},
        free_disk=free_disk(folder),
    )


def _processor_of(devices: Devices) -> str | None:
    """Return the name of the GPU or CPU of this machine that trainings get.

    None if they share a GPU, whose share journals do not tell, or if another GPU is named.
    """
    if not devices.on_gpus:
        return processor_name()
    if devices.gpu is not None or devices.sharing_a_gpu > 1:
        return None
    return next((gpu.name for gpu in machine.installed_gpus()), None)
