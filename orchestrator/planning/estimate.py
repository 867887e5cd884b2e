"""What trainings take before they start: FLOPs, hours, memory and disk, and whether they fit.

On a cluster that is joined, only the disk is checked.

An `Estimate` follows from the settings of one training, so it needs neither prepared tokens nor a
trained teacher. A `Price` is that of several: their schedule on the devices, the longest first.
Nothing is measured: speeds are assumed. The hours are those of training alone.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from iiet import cost
from iiet.config import DistillationConfig, ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import decoder_config, newest_checkpoint
from orchestrator.planning import machine
from orchestrator.records.record import Record
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, Settings, TrainingSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_byte_parts, format_bytes
from orchestrator.training import schedules
from orchestrator.training.job import sequences_per_step
from orchestrator.training.shared_steps import FirstStage, first_stage_of, first_step
from orchestrator.training.world import ASSUMED_GPU, ASSUMED_GPU_BYTES, gpu_peak_flops
from orchestrator.workspace.errors import DeviceError, UserError, out_of_memory_text
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints, step_of

if TYPE_CHECKING:
    from orchestrator.training.world import World

WEIGHT_BYTES, MOMENTS_BYTES = 4, 8
"""Bytes in a checkpoint of a float32 weight, and of AdamW's two moments of one that is trained."""
PROCESS_BYTES = 512 * 2**20
"""Roughly what PyTorch, Ray and kernels take in each worker beside tensors."""
ALLOCATOR_FACTOR = 1.1
"""The allocator holds more than the activations that exist at one time."""
GPU_SHARES = (0.15, 0.25)
"""Shares of a GPU's peak that training reaches: traces of eager steps at 340M give 17 to 28%."""
CPU_SHARES = (0.2, 0.8)
"""CPUs differ more, and no table knows their peaks."""
CPU_PEAK_FLOPS = 1e11
"""Assumed peak of one CPU core: 2 fused products of 8 numbers in each of 3 billion cycles."""


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
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp`: the workers share the model."""
    shards: int | None = None
    """With `fsdp`, workers that share one copy of the model, if not all."""
    are_trials: bool = False
    """Whether the trainings are trials of a sweep, so `sweep.trials_at_once` limits them."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training takes that may start, or resume."""

    config: ModelConfig
    recipe: TrainingSettings
    section: str = "training"
    """Section of the settings that holds the recipe, for messages."""
    teacher: ModelConfig | None = None
    """A frozen model whose forward pass runs in the steps that `loss` names."""
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    first_stage: FirstStage | None = None
    """Its first stage, if it may be shared; trainings with the same one train it once."""
    steps_done: int = 0
    """Steps that it resumes after."""
    present_bytes: int = 0
    """Bytes of its checkpoints, which new ones replace."""
    devices: Devices = Devices()
    """Where it runs."""

    @staticmethod
    def of(job: TrainingJob) -> Estimate:
        """Return what is left of a job that is not finished, on one CPU worker.

        Raises:
            UserError: If its teacher is missing or damaged.
        """
        saved_step = 0
        if job.tokens_folder and (newest := newest_checkpoint(job.folder)):
            saved_step = step_of(newest)
        teacher = None
        if job.frozen_teacher:
            teacher = decoder_config(Path(job.frozen_teacher))
        files = chain.from_iterable(folder.iterdir() for folder in find_checkpoints(job.folder))
        return Estimate(
            config=job.model,
            recipe=job.recipe,
            section=job.section,
            teacher=teacher,
            loss=job.teaching or DistillationConfig(),
            first_stage=first_stage_of(job),
            steps_done=first_step(job, saved_step),
            present_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        )

    @property
    def steps_left(self) -> range:
        """The steps that are left."""
        return range(self.steps_done, self.recipe.num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of these steps."""
        return len(self.steps_left) * self.recipe.num_tokens_per_step

    @cached_property
    def num_teacher_tokens(self) -> int:
        """Tokens that the teacher reads in them."""
        steps = sum(map(self.loss.uses_teacher, self.steps_left)) if self.teacher else 0
        return steps * self.recipe.num_tokens_per_step

    @cached_property
    def stages(self) -> dict[IterationSchedule, int]:
        """Iteration schedule -> number of these steps under it."""
        schedule_at = schedules.schedule_by_step(self.config.corrections, self.recipe)
        return dict(Counter(map(schedule_at, self.steps_left)))

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.recipe.tokens_per_sequence(self.config)

    @cached_property
    def flops(self) -> float:
        """Training FLOPs of these steps, without a teacher's."""
        config, length = self.config, self.sequence_length
        trained = [
            num_steps
            * cost.training_flops_per_token(
                config, schedule, context_length=length, trained=self.recipe.trained_layers
            )
            for schedule, num_steps in self.stages.items()
        ]
        if elastic := self.recipe.elastic:
            drawn_at = schedules.drawn_by_step(self.config.corrections, self.recipe)
            # Members of a retrofit learn from its full schedule, also beside a source.
            is_student = self.teacher is not None and not self.recipe.source_kl_weight
            reads_full = schedules.members_read_full(elastic, has_teacher=is_student)
            drawn = Counter(chain.from_iterable(map(drawn_at, self.steps_left)))
            trained += [
                times
                * cost.member_flops_per_token(
                    config,
                    member,
                    reads_full=reads_full,
                    context_length=length,
                    trained=self.recipe.trained_layers,
                )
                for member, times in drawn.items()
            ]
        return self.recipe.num_tokens_per_step * sum(trained)

    @cached_property
    def teacher_flops(self) -> float:
        """FLOPs of the teacher in these steps, 0 without one."""
        if self.teacher is None:
            return 0.0
        read = cost.inference_cost(self.teacher, context_length=self.sequence_length)
        return self.num_teacher_tokens * read.forward_flops_per_token

    @property
    def num_members(self) -> int:
        """Schedules of an elastic training that a step trains beside the full one."""
        family = schedules.elastic_family(self.config.corrections, self.recipe.elastic)
        return min(len(family), self.recipe.elastic.num_drawn) if self.recipe.elastic else 0

    @property
    def sequences_per_worker(self) -> int:
        """Sequences of one step.

        Raises:
            UserError: If the workers cannot share a step's sequences evenly.
        """
        sequences = sequences_per_step(self.recipe, self.config, section=self.section)
        workers = self.devices.num_workers
        if sequences % workers:
            nearest = -(-sequences // workers) * workers * self.sequence_length
            raise UserError(
                f"a step has {sequences} sequences, which {workers} workers cannot share evenly; "
                f"type --set {self.section}.num_tokens_per_step={nearest}"
            )
        return sequences // workers

    @property
    def sequences_per_pass(self) -> int:
        """Largest number of sequences in one forward and backward pass."""
        per_worker = self.sequences_per_worker
        return min(per_worker, self.recipe.num_sequences_per_pass or per_worker)

    @property
    def num_passes(self) -> int:
        """Passes of one worker in one step (gradient accumulation)."""
        return -(-self.sequences_per_worker // self.sequences_per_pass)

    @cached_property
    def worker_memory(self) -> dict[str, int]:
        """What takes memory -> bytes that one worker needs for it."""
        from orchestrator.planning.training_memory import training_memory  # Imports PyTorch.

        devices = self.devices
        schedule_at = schedules.schedule_by_step(self.config.corrections, self.recipe)
        parts = training_memory(
            self.config,
            schedule_at(self.recipe.num_steps - 1),  # No earlier one makes more corrections.
            num_sequences=self.sequences_per_pass,
            sequence_length=self.sequence_length,
            precision=self.recipe.precision,
            on_gpus=devices.on_gpus,
            activation_checkpointing=self.recipe.activation_checkpointing,
            num_shards=(devices.shards or devices.num_workers) if devices.parallel == "fsdp" else 1,
            num_passes=self.num_passes * (1 + self.num_members),
            has_teacher=self.teacher is not None,
            has_members=self.num_members > 0,
            trained=self.recipe.trained_layers,
        )
        if not devices.on_gpus:
            # By the first worker, while training continues; workers on CPUs share memory.
            parts["a copy for the checkpoint"] = self.checkpoint_bytes // devices.num_workers
        kept_free = int(parts["activations"] * (ALLOCATOR_FACTOR - 1))
        return {**parts, "PyTorch": PROCESS_BYTES + kept_free}

    @property
    def worker_bytes(self) -> int:
        """Memory that one worker needs."""
        return sum(self.worker_memory.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.config, self.recipe)

    @property
    def disk_bytes(self) -> tuple[int, int]:
        """Bytes of all checkpoints that are kept, beside those that exist, and of one in writing.

        The second is 0 if the training writes no more checkpoints than it keeps.
        """
        recipe = self.recipe
        has_stable = 0 < schedules.stable_steps(recipe) < recipe.num_steps
        kept = recipe.num_checkpoints_kept + has_stable
        written = -(-recipe.num_steps // recipe.checkpoint_every_steps) + has_stable
        most = written if recipe.checkpoint_every_minutes is None else kept + 1
        numbers = min(kept, most), min(kept + 1, most)
        new = max(0, self.checkpoint_bytes * numbers[0] - self.present_bytes)
        return new, self.checkpoint_bytes * (numbers[1] - numbers[0])


def checkpoint_bytes(config: ModelConfig, recipe: TrainingSettings) -> int:
    """Return the bytes of one checkpoint."""
    num_trained = cost.num_trained_parameters(config, recipe.trained_layers)
    return WEIGHT_BYTES * cost.num_parameters(config) + MOMENTS_BYTES * num_trained


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


def assumed_rate(training: Estimate, share: float | None = None) -> Rate:
    """Return the rate of an installed GPU, else of an H100, or of a CPU core; see `price_of`."""
    peak, shares, source = CPU_PEAK_FLOPS, CPU_SHARES, "a CPU core, assumed"
    if training.devices.on_gpus:
        precision, shares = training.recipe.precision, GPU_SHARES
        for name in [*(gpu.name for gpu in machine.installed_gpus()[:1]), ASSUMED_GPU]:
            if known := gpu_peak_flops(name, precision):
                peak, source = known, f"{name}, {precision}, dense"
                break
    shares = (share, share) if share else shares
    return Rate(peak_flops=peak, shares=shares, source=source)


def groups_by_devices(trainings: Iterable[Estimate]) -> list[list[Estimate]]:
    """Return the trainings that share devices; one of those with the same first stage trains it."""
    groups: dict[Devices, list[Estimate]] = {}
    trained: set[str] = set()
    for each in trainings:
        if stage := each.first_stage:
            if stage.key in trained and each.steps_done < stage.num_steps:
                each = replace(each, steps_done=stage.num_steps)
            trained.add(stage.key)
        groups.setdefault(each.devices, []).append(each)
    return list(groups.values())


def _price_of_group(group: Sequence[Estimate], mfu: float | None) -> Price:
    """Return the price of trainings that share devices."""
    devices = group[0].devices
    rate = assumed_rate(group[0], mfu)
    at_once = min(devices.at_once, len(group))
    num_devices = machine.num_cpus()
    if devices.on_gpus:
        num_devices = -(-at_once * devices.num_workers // devices.sharing_a_gpu)
    # The longest training starts first, and each next one where one ends.
    flops = [training.flops + training.teacher_flops for training in group]
    places = [0.0] * at_once
    for flops_of_one in sorted(flops, reverse=True):
        heapq.heapreplace(places, places[0] + flops_of_one)
    flops_per_device = max(places) * at_once / num_devices
    shortest, longest = (
        flops_per_device / (rate.peak_flops * share) / 3600 for share in reversed(rate.shares)
    )
    kept, in_writing = zip(*(training.disk_bytes for training in group), strict=True)
    return Price(
        num_trainings=len(group),
        num_tokens=sum(training.num_tokens for training in group),
        num_teacher_tokens=sum(training.num_teacher_tokens for training in group),
        flops=sum(flops),
        hours=(shortest, longest),
        num_devices=num_devices,
        uses_gpus=devices.on_gpus,
        rate=rate,
        disk={"checkpoints": sum(kept) + sum(sorted(in_writing)[-at_once:])},
    )


def price_of(
    trainings: Sequence[Estimate],
    folder: Path,
    *,
    new_token_bytes: int = 0,
    is_upper_bound: bool = False,
    mfu: float | None = None,
) -> Price:
    """Return the price of trainings; those on other devices run one after another.

    Args:
        trainings: Those that are not finished.
        folder: A folder on the workspace's disk; it need not exist.
        new_token_bytes: Bytes of the tokens that are prepared first.
        is_upper_bound: Whether some of them stand for others that are not known yet.
        mfu: Share of the peak FLOP/s that is assumed; a usual range if unset.
    """
    parts = [_price_of_group(group, mfu) for group in groups_by_devices(trainings)]
    first_stages = {
        stage.key: each.checkpoint_bytes
        for each in trainings
        if (stage := each.first_stage) and not stage.exists
    }
    disk = {
        "tokens": new_token_bytes,
        "checkpoints": sum(part.disk["checkpoints"] for part in parts),
        "shared first stages": sum(first_stages.values()),
    }
    largest = max(trainings, key=lambda each: each.worker_bytes, default=None)
    return Price(
        is_upper_bound=is_upper_bound,
        num_trainings=len(trainings),
        num_tokens=sum(part.num_tokens for part in parts),
        num_teacher_tokens=sum(part.num_teacher_tokens for part in parts),
        flops=sum(part.flops for part in parts),
        hours=(sum(part.hours[0] for part in parts), sum(part.hours[1] for part in parts)),
        num_devices=max((part.num_devices for part in parts), default=0),
        uses_gpus=any(part.uses_gpus for part in parts),
        rate=parts[-1].rate if parts else None,
        memory=largest.worker_memory if largest else {},
        disk={name: value for name, value in disk.items() if value},
        free_disk=free_disk(folder),
    )


def run_devices(cluster: ClusterSettings) -> Devices:
    """Return the devices of a run's trainings: one after another on GPUs, side by side on CPUs."""
    num_workers, on_gpus = cluster.num_gpus or cluster.num_workers, cluster.num_gpus > 0
    return Devices(
        num_workers=num_workers,
        on_gpus=on_gpus,
        at_once=1 if on_gpus else max(1, machine.num_cpus() // num_workers),
        parallel=cluster.parallel,
        shards=cluster.num_shards,
    )


def on_trial_devices(trainings: Iterable[Estimate], settings: Settings) -> list[Estimate]:
    """Return trainings on the devices of a sweep's trials; see `assign_trial_gpus`."""
    sweep, cluster = settings.sweep, settings.cluster
    gpus, num_workers = sweep.gpus_per_trial or 0, sweep.num_workers_per_trial
    places = max(1, machine.num_cpus() // num_workers)
    devices = Devices(
        num_workers=num_workers,
        on_gpus=gpus > 0,
        at_once=sweep.trials_at_once or 1 if gpus else min(sweep.trials_at_once or places, places),
        sharing_a_gpu=machine.num_sharing(gpus) if gpus else 1,
        parallel=cluster.parallel,
        shards=cluster.shards_of(num_workers),
        are_trials=True,
    )
    return [replace(each, devices=devices) for each in trainings]


def assign_trial_gpus(
    settings: Settings, trainings: Sequence[Estimate] = (), *, gpu_bytes: int | None = None
) -> Settings:
    """Return the settings with the GPUs of a sweep's trials filled in.

    If the run has GPUs, each trial gets the smallest number on which every trial fits (by default
    on this machine's GPU, or on the assumed one), and as many run at once as there are GPUs for.
    """

    def filled(**changes: float) -> Settings:
        sweep = settings.sweep.model_copy(update=changes)
        return settings.model_copy(update={"sweep": sweep})

    cluster, sweep, per_trial = settings.cluster, settings.sweep, settings.sweep.gpus_per_trial
    if not cluster.num_gpus:
        return filled(gpus_per_trial=per_trial or 0)
    if per_trial is None and sweep.workers_per_trial > 1:
        per_trial = sweep.workers_per_trial
    if per_trial is None:
        if gpu_bytes is None and cluster.ray_address == LOCAL:
            gpu_bytes = next((gpu.free_bytes for gpu in machine.installed_gpus()), None)
        for per_trial in range(1, cluster.num_gpus + 1):
            with suppress(UserError):  # These workers cannot share a step's sequences evenly.
                placed = on_trial_devices(trainings, filled(gpus_per_trial=per_trial))
                needed = max((each.worker_bytes for each in placed), default=0)
                if needed <= (gpu_bytes or ASSUMED_GPU_BYTES):
                    break
    assert per_trial, "the rules of a sweep hold"
    most = int(cluster.num_gpus * machine.num_sharing(per_trial) // math.ceil(per_trial))
    return filled(gpus_per_trial=per_trial, trials_at_once=min(sweep.trials_at_once or most, most))


def note_saving(jobs: Iterable[TrainingJob], note: Callable[[str], None] | None) -> None:
    """Say how much the jobs that train save now that a stop was requested, and how to skip it."""
    num_bytes = sum(
        checkpoint_bytes(job.model, job.recipe)
        for job in jobs
        if not (job.folder / DONE_NAME).is_file()
    )
    if note and num_bytes:
        note(f"saving {format_bytes(num_bytes)}; a second Ctrl-C ends without it")


# Whether they fit


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
        trainings, disk: As in `reasons_not_to_fit`.
        folder: A folder on the workspace's disk; it need not exist.
        address: Of the Ray cluster; on one that is joined, only the disk is checked.
        checks: Raise `UserError` if this machine has too few CPUs or GPUs.
    """
    is_far = address != LOCAL
    place = "this machine" + " (the cluster's memory is unknown)" * is_far
    gpus = tuple(gpu.free_bytes for gpu in machine.installed_gpus())
    free = machine.FreeBytes(memory=machine.free_memory(), gpus=gpus, disk=free_disk(folder))
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    places = {place: [*found, *reasons_not_to_fit(() if is_far else trainings, disk, free)]}
    if any(each.devices.on_gpus for each in trainings) and not free.gpus:
        # The memory of the machine that has this GPU is not known.
        assumed = machine.FreeBytes(gpus=(ASSUMED_GPU_BYTES,), gpu_name=f"an {ASSUMED_GPU}")
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
    reasons = []
    for group in groups_by_devices(trainings):
        devices, largest = group[0].devices, max(group, key=lambda each: each.worker_bytes)
        workers, at_once = devices.num_workers, min(devices.at_once, len(group))
        # A worker on a GPU has its memory, or a share of it. All on CPUs share this machine's.
        memory, place, sharing = free.memory, machine.THIS_MACHINE, workers * at_once
        if devices.on_gpus:
            memory, place = min(free.gpus[:workers], default=None), free.gpu_name
            sharing = min(devices.sharing_a_gpu, at_once)
        if memory is None or largest.worker_bytes <= memory // sharing:
            continue
        number, fewer = sharing if sharing > 1 else workers, devices.are_trials and at_once > 1
        reasons.append(
            f"training would take about {format_bytes(largest.worker_bytes)}"
            + f" for each of {number} workers" * (number > 1)
            + f" ({format_byte_parts(largest.worker_memory)}), and {place} has "
            f"{format_bytes(memory // sharing)} free{' for each' * (number > 1)}; "
            + smaller_settings(largest.section)
            + ", or set sweep.trials_at_once lower" * fewer
        )
    needed = sum(disk.values())
    if free.disk is not None and needed > free.disk:
        reasons.append(
            f"the run would write about {format_bytes(needed)} ({format_byte_parts(disk)}), and "
            f"the workspace's disk has {format_bytes(free.disk)} free; free some space, or choose "
            "another place with --workspace"
        )
    return reasons


def smaller_settings(section: str) -> str:
    """Return, in words, the settings with which a training of this section takes less memory."""
    return (
        f"set {section}.num_sequences_per_pass lower (same gradients), "
        f"{section}.activation_checkpointing=true (slower), or cluster.parallel=fsdp (several "
        "workers share the model), take a smaller model, or more memory"
    )


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
            f"({format_byte_parts(training.worker_memory)}); {smaller_settings(job.section)}; "
            "the checkpoints are kept"
        ) from None
