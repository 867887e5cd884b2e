"""What several trainings take together: hours on their devices, memory of the largest, disk.

Speeds are assumed, not measured: the peak of the GPU that the settings name, else of an installed
one, else of an H100, or of a CPU core, times the shares of it that trainings reach, or the share
that `--mfu` names. No training is faster than its host starts operations. The hours are those of
training alone; what starts and measurements add is a second range.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from orchestrator.planning import machine
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.gpus import GPUS, USUAL_GPU
from orchestrator.records.record import Record
from orchestrator.settings.training import Precision
from orchestrator.training.world import gpu_peak_flops
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.processors import num_cpus

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
    """FLOPs of both."""
    hours: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time at the assumed rate, until the last training ends."""
    hours_beside: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time that starts and measurements add."""
    num_devices: int = 0
    """GPUs or CPUs that are used."""
    uses_gpus: bool = False
    rate: Rate | None = None
    """Assumed speed of one of them in the costliest training; None if nothing is trained."""
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

    def seconds_at(
        self, flops_per_second: Callable[[Estimate], float], seconds_per_evaluation: float
    ) -> float:
        """Return the seconds until the last training ends.

        Args:
            flops_per_second: Training -> FLOP/s that a device reaches in its precision.
            seconds_per_evaluation: Time in which a host starts a field evaluation's operations.
        """
        devices_of_one = self.num_devices / self.at_once
        seconds = []
        for training in self.trainings:
            computing = training.total_flops / (flops_per_second(training) * devices_of_one)
            seconds.append(max(computing, training.num_evaluations * seconds_per_evaluation))
        # The longest training starts first, and each next one where one ends.
        places = [0.0] * self.at_once
        for seconds_of_one in sorted(seconds, reverse=True):
            heapq.heapreplace(places, places[0] + seconds_of_one)
        return max(places)

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


def price_of(
    trainings: Sequence[Estimate],
    folder: Path,
    *,
    hours_of_influence: tuple[float, float] = (0.0, 0.0),
    new_token_bytes: int = 0,
    is_upper_bound: bool = False,
    mfu: float | None = None,
) -> Price:
    """Return the price of trainings; those on other devices run one after another.

    Args:
        trainings: Those that are not finished.
        hours_of_influence: Shortest and longest time in which influence is measured before them.
        folder: A folder on the workspace's disk; it need not exist.
        new_token_bytes: Bytes of the tokens that are prepared first.
        is_upper_bound: Whether some of them stand for others that are not known yet.
        mfu: Share of the peak FLOP/s that is assumed; a usual range if unset.
    """
    groups = groups_by_devices(trainings)
    priced = [training for group in groups for training in group.trainings]

    # Hours: one group after another. Trainings of a group may differ in precision, so in rate.
    # Each rate is looked up once: the driver is asked for the GPU's name.
    rates: dict[tuple[bool, str], Rate] = {}
    for training in priced:
        device_and_precision = (training.devices.on_gpus, training.recipe.precision)
        if device_and_precision not in rates:
            rates[device_and_precision] = assumed_rate(
                training.devices, training.recipe.precision, mfu
            )

    def rate_of(training: Estimate) -> Rate:
        return rates[training.devices.on_gpus, training.recipe.precision]

    def reached_flops(training: Estimate, share: int) -> float:
        rate = rate_of(training)
        return rate.peak_flops * rate.shares[share]

    least_seconds, most_seconds = SECONDS_PER_EVALUATION
    shortest = longest = 0.0
    for group in groups:
        shortest += group.seconds_at(partial(reached_flops, share=1), least_seconds) / 3600
        longest += group.seconds_at(partial(reached_flops, share=0), most_seconds) / 3600
    # Trainings that run at the same time start and are measured at the same time.
    num_rounds = sum(math.ceil(len(group.trainings) / group.at_once) for group in groups)
    least_beside, most_beside = (
        of_influence + ((start + num_rounds * beside) / 3600 if groups else 0.0)
        for of_influence, start, beside in zip(
            hours_of_influence, START_SECONDS, SECONDS_BESIDE_A_TRAINING, strict=True
        )
    )
    costliest = max(priced, key=lambda training: training.total_flops, default=None)

    disk = {
        "tokens": new_token_bytes,
        "checkpoints": sum(group.checkpoint_bytes for group in groups),
    }

    largest = max(trainings, key=lambda training: training.worker_bytes, default=None)
    return Price(
        is_upper_bound=is_upper_bound,
        num_trainings=len(trainings),
        num_tokens=sum(training.num_tokens for training in priced),
        num_teacher_tokens=sum(training.num_teacher_tokens for training in priced),
        flops=sum(group.flops for group in groups),
        hours=(shortest, longest),
        hours_beside=(least_beside, most_beside),
        num_devices=max((group.num_devices for group in groups), default=0),
        uses_gpus=any(group.devices.on_gpus for group in groups),
        rate=rate_of(costliest) if costliest else None,
        memory=largest.worker_memory if largest else {},
        disk={name: num_bytes for name, num_bytes in disk.items() if num_bytes},
        free_disk=free_disk(folder),
    )
