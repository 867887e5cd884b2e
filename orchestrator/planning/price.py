"""The price of trainings before they start: tokens, FLOPs, hours, memory and disk.

Only training is counted, without validation, saving and measuring. What several trainings share
counts once: a first stage, and a teacher's stored outputs.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import Field

from iiet.cost import inference_cost
from orchestrator.planning.nodes import num_sharing
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.planning.rate import Rate, assumed_rate
from orchestrator.planning.resources import local_free_bytes, local_resources
from orchestrator.planning.trial_gpus import assign_trial_gpus, placed_trial
from orchestrator.records.record import Record
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.training.teacher_cache_policy import TeacherWork, estimate_teacher_work
from orchestrator.workspace.layout import LOCAL


@dataclass(frozen=True, kw_only=True)
class TrainingGroup:
    """Trainings that share the same devices."""

    trainings: tuple[PlannedTraining, ...]
    """Those that are not finished."""
    at_once: int = 1
    """Largest number of them that run at the same time."""
    sharing_a_gpu: int = 1
    """Largest number of them that share a GPU."""
    teacher: TeacherWork = field(default_factory=TeacherWork)
    """What their teacher computes."""
    is_trials: bool = False
    """Whether `sweep.trials_at_once` says how many run at the same time."""

    @property
    def num_devices(self) -> int:
        """GPUs that they use together, or the CPUs of this machine, which they share whole."""
        first = self.trainings[0]
        cpus = local_resources(count_gpus=False).cpus
        gpus = -(-self.at_once * first.num_workers // self.sharing_a_gpu)
        return gpus if first.on_gpus else cpus

    @property
    def teacher_flops(self) -> float:
        """FLOPs of their teacher."""
        teacher = next((each.teacher for each in self.trainings if each.teacher), None)
        per_token = inference_cost(teacher).forward_flops_per_token if teacher else 0.0
        return self.teacher.num_tokens * per_token

    def flops_of_a_device(self) -> float:
        """FLOPs of one device from the start of the first training to the end of the last.

        The longest training starts first, and each next one where one ends. A teacher's stored
        outputs are computed before, on one GPU or all CPUs; one that runs in a training slows it.
        """
        own = list(self.without_shared_steps())
        read = [each.num_teacher_tokens for each in own]
        stored = self.teacher.num_stored_tokens / max(1, self.teacher.num_tokens)
        live_flops = (1 - stored) * self.teacher_flops / max(1, sum(read))
        works = (each.flops + live_flops * tokens for each, tokens in zip(own, read, strict=True))
        places = [0.0] * self.at_once
        for work in sorted(works, reverse=True):
            heapq.heapreplace(places, places[0] + work)
        writers = 1 if own[0].on_gpus else self.num_devices
        last = max(places) * self.at_once / self.num_devices
        return stored * self.teacher_flops / writers + last

    def disk(self, most_kept: int | None = None) -> dict[str, int]:
        """Return the bytes that are written, by name.

        Args:
            most_kept: Largest number of checkpoints that a training keeps; its own when unset.
        """
        kept = [each.new_bytes(most_kept) for each in self.trainings]
        in_writing = sorted(each.bytes_in_writing(most_kept) for each in self.trainings)
        stages = {
            each.first_stage.folder: each.checkpoint_bytes
            for each in self.trainings
            if each.first_stage and not each.first_stage.exists
        }
        return {
            "checkpoints": sum(kept) + sum(in_writing[-self.at_once :]),
            "shared first stages": sum(stages.values()),
            "teacher outputs": self.teacher.num_bytes,
        }

    def without_shared_steps(self) -> Iterator[PlannedTraining]:
        """Yield the trainings; one trains a first stage, and the others resume after it."""
        trained: set[Path] = set()
        for each in self.trainings:
            stage = each.first_stage
            if stage and stage.folder in trained and each.steps_done < stage.num_steps:
                yield replace(each, steps_done=stage.num_steps)
            else:
                yield each
            if stage:
                trained.add(stage.folder)


def pretraining_group(
    trainings: Sequence[PlannedTraining], cluster: ClusterSettings
) -> TrainingGroup:
    """Return trainings as `cluster` runs them: one after another on GPUs, side by side on CPUs."""
    num_workers = cluster.num_gpus or cluster.num_workers
    on_gpus = cluster.num_gpus > 0
    placed = (
        replace(
            each,
            num_workers=num_workers,
            on_gpus=on_gpus,
            parallel=cluster.parallel,
            shards=cluster.num_shards,
        )
        for each in trainings
    )
    places = 1 if on_gpus else local_resources(count_gpus=False).cpus // num_workers
    return TrainingGroup(
        trainings=tuple(placed),
        at_once=max(1, min(places, len(trainings))),
        teacher=TeacherWork(sum(each.num_teacher_tokens for each in trainings)),
    )


def trial_group(
    trainings: Sequence[PlannedTraining], settings: Settings, teachers: Path
) -> TrainingGroup:
    """Return trainings on the devices of a sweep's trials.

    Args:
        teachers: Folder of stored teacher outputs.

    Raises:
        UserError: If trials and devices do not go together, or a teacher's outputs do not fit on
            the disk.
    """
    sweep = assign_trial_gpus(settings, trainings).sweep
    gpus = sweep.gpus_per_trial or 0
    num_workers = sweep.num_workers_per_trial
    most = max(1, local_resources(count_gpus=False).cpus // num_workers)
    at_once = (sweep.trials_at_once or 1) if gpus else min(sweep.trials_at_once or most, most)
    teacher = estimate_teacher_work(
        [each.cache for each in trainings],
        [each.num_teacher_tokens for each in trainings],
        settings.distillation.teacher_cache,
        teachers,
    )
    return TrainingGroup(
        trainings=tuple(
            placed_trial(each, num_workers, settings.cluster, on_gpus=gpus > 0)
            for each in trainings
        ),
        at_once=max(1, min(at_once, len(trainings))),
        sharing_a_gpu=num_sharing(gpus) if gpus else 1,
        teacher=teacher,
        is_trials=True,
    )


class Price(Record):
    """What trainings take from here on."""

    is_upper_bound: bool = False
    """Whether not all trainings are known, and the others are priced as the costliest."""
    num_trainings: int = 0
    num_tokens: int = 0
    """Tokens that they train on."""
    num_teacher_tokens: int = 0
    """Tokens that their teachers read."""
    flops: float = 0.0
    """FLOPs of both."""
    hours: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest time at the assumed rate, until the last training ends."""
    num_devices: int = 0
    """GPUs or CPUs that are used."""
    uses_gpus: bool = False
    rate: Rate | None = None
    """Assumed speed of one of them; None if nothing is trained."""
    memory: dict[str, int] = Field(default_factory=dict)
    """Name -> bytes of what takes memory in a worker of the largest training."""
    disk: dict[str, int] = Field(default_factory=dict)
    """Name -> bytes of what will be written, at most."""
    free_disk: int | None = None
    """Free bytes on the workspace's disk."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of all that will be written."""
        return sum(self.disk.values())


@dataclass(frozen=True, kw_only=True)
class PlannedWork:
    """All that a run or sweep trains: groups that run one after another."""

    groups: Sequence[TrainingGroup]
    folder: Path
    """A folder on the workspace's disk; it need not exist."""
    new_token_bytes: int = 0
    """Bytes of the tokens that are prepared first."""
    is_upper_bound: bool = False
    """Whether not all trainings are known, and the others are the costliest that are possible."""
    address: str = LOCAL
    """Address of the Ray cluster that trains them."""

    @property
    def trainings(self) -> list[PlannedTraining]:
        """The trainings of all groups."""
        return [training for group in self.groups for training in group.trainings]

    def disk(self, most_kept: int | None = None) -> dict[str, int]:
        """Return the bytes that are written, by name, without zeros; see `TrainingGroup.disk`."""
        total = Counter({"tokens": self.new_token_bytes})
        for group in self.groups:
            total.update(group.disk(most_kept))
        return {name: value for name, value in total.items() if value}

    def price(self, share: float | None = None) -> Price:
        """Return the price; `share` of the peak FLOP/s is reached, or a usual one if unset."""
        flops, hours = 0.0, [0.0, 0.0]
        rate: Rate | None = None
        trainings: list[PlannedTraining] = []
        for group in filter(lambda group: group.trainings, self.groups):
            rate = assumed_rate(group.trainings[0], share)
            own = list(group.without_shared_steps())
            own_flops = sum(each.flops for each in own) + group.teacher_flops
            for number, speed in enumerate(rate.flops_range):
                hours[number] += group.flops_of_a_device() / speed / 3600
            flops += own_flops
            trainings += own
        largest = max(trainings, key=lambda each: each.worker_bytes, default=None)
        return Price(
            is_upper_bound=self.is_upper_bound,
            num_trainings=len(trainings),
            num_tokens=sum(each.num_tokens for each in trainings),
            num_teacher_tokens=sum(group.teacher.num_tokens for group in self.groups),
            flops=flops,
            hours=(hours[0], hours[1]),
            num_devices=max((g.num_devices for g in self.groups if g.trainings), default=0),
            uses_gpus=any(each.on_gpus for each in trainings),
            rate=rate,
            memory=largest.worker_memory if largest else {},
            disk=self.disk(),
            free_disk=local_free_bytes(self.folder).disk,
        )
