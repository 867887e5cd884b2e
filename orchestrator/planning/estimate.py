"""What trainings take before they start: FLOPs, hours, memory and disk, and whether they fit.

If they do not fit, three settings are proposed, alone or together: fewer sequences per pass (same
gradients), layers recomputed in the backward pass (slower), and a model that its workers share. On
a cluster that is joined, only the disk is checked.

An `Estimate` follows from the settings of one training, so it needs neither prepared tokens nor a
trained teacher. A `Price` is that of several: their schedule on the devices, the longest first.
Nothing is measured: speeds are assumed. `hours` count training only, `seconds` all that a command
does, by stage.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from iiet import cost
from iiet.config import DistillationConfig, ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.models.folder import load_config, load_provenance, newest_checkpoint
from orchestrator.planning import machine
from orchestrator.records.record import Record
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, Settings, TrainingSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_byte_parts, format_bytes, format_duration
from orchestrator.training import schedules
from orchestrator.training.job import FirstStage, first_stage_of, sequences_per_step
from orchestrator.training.world import ASSUMED_GPU, ASSUMED_GPU_BYTES, gpu_peak_flops
from orchestrator.workspace.errors import DeviceError, UserError, out_of_memory_text
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.journal import SPEED_METRIC, read_tail
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints, step_of

if TYPE_CHECKING:
    from orchestrator.training.teacher_cache import CachePlan
    from orchestrator.training.world import World

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""A float32 weight and AdamW's two moments."""
PROCESS_BYTES = 512 * 2**20
"""Roughly what PyTorch, Ray and kernels take in each worker beside tensors."""
ALLOCATOR_FACTOR = 1.1
"""The allocator holds more than the activations that exist at one time."""
GPU_SHARES = (0.15, 0.25)
"""Shares of a GPU's peak that training reaches: traces of eager steps at 340M give 17 to 28%."""
CPU_SHARES = (0.2, 0.8)
"""CPUs differ more, and no table knows their peaks."""
CPU_HALF_WIDTH = 90
"""Width of a model that reaches half of the assumed peak: on this project's machines, models of
width 64 reach 40 %, of width 128 63 %."""
CPU_PEAK_FLOPS = 1e11
"""Assumed peak of one CPU core: 2 fused products of 8 numbers in each of 3 billion cycles."""
STAGES = ("start", "pretrain", "influence", "teacher", "distill", "sweep", "report")
"""What a command does, in this order; `teacher` stores outputs, `sweep` also measures."""
SECONDS = {"start": 20.0, "pretrain": 9.0, "distill": 9.0, "influence": 2.0, "sweep": 2.0,
           "report": 5.0}  # fmt: skip
"""Assumed time before the first training, of each worker until its first step, of a report."""
LEAST_SECONDS = 4.0
"""Enough to save small models, with a message to the workers and the end of their processes."""
WRITE_BYTES_PER_SECOND = 300e6
"""Assumed speed of a checkpoint that is gathered, hashed and flushed to a shared disk."""
UPLOAD_BYTES_PER_SECOND = 100e6
"""Assumed speed of a copy to the run's storage."""
LARGEST_SHARE = 0.8
"""Share of a failed plan's bytes that a proposal may take: the plan left something out."""


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
    cache: Any = None
    """The teacher's outputs, a `CachePlan`, if they may be stored."""
    first_stage: FirstStage | None = None
    """Its first stage, if it may be shared; trainings with the same one train it once."""
    steps_done: int = 0
    """Steps that it resumes after."""
    present_bytes: int = 0
    """Bytes of its checkpoints, which new ones replace."""
    storage: str | None = None
    """URI for copies of its checkpoints."""
    is_bound: bool = False
    """Whether it stands for students under schedules that are not known yet, none to all."""
    devices: Devices = Devices()
    """Where it runs."""

    @staticmethod
    def of(job: TrainingJob) -> Estimate:
        """Return what is left of a job that is not finished, on one CPU worker.

        Raises:
            UserError: If its teacher is missing or damaged.
        """
        from orchestrator.training.teacher_cache import cache_plan  # Imports PyTorch.

        teacher = job.teacher_folder if job.objective == "distill" else None
        newest = newest_checkpoint(job.folder) if job.tokens_folder else None
        steps_done = int(load_provenance(newest)["step"]) if newest else 0
        stage = first_stage_of(job)
        if stage and stage.exists:
            steps_done = max(steps_done, stage.num_steps)
        if job.continued_from:
            steps_done = max(steps_done, step_of(Path(job.continued_from)))
        files = chain.from_iterable(folder.iterdir() for folder in find_checkpoints(job.folder))
        return Estimate(
            config=job.model,
            recipe=job.recipe,
            section=job.section,
            teacher=load_config(Path(teacher)) if teacher else None,
            loss=job.distillation or DistillationConfig(),
            cache=cache_plan(job),
            first_stage=stage,
            steps_done=steps_done,
            present_bytes=sum(path.stat().st_size for path in files if path.is_file()),
            storage=job.storage,
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
        """Tokens that a teacher which runs in this training reads in them."""
        steps = sum(map(self.loss.uses_teacher, self.steps_left)) if self.teacher else 0
        return steps * self.recipe.num_tokens_per_step

    @cached_property
    def stages(self) -> dict[IterationSchedule, int]:
        """Iteration schedule -> number of these steps under it."""
        schedule_at = schedules.schedule_by_step(self.config.corrections, self.recipe)
        return dict(Counter(map(schedule_at, self.steps_left)))

    @cached_property
    def flops(self) -> float:
        """Training FLOPs of these steps, without a teacher's."""
        trained = [
            n * cost.training_flops_per_token(self.config, s) for s, n in self.stages.items()
        ]
        if elastic := self.recipe.elastic:
            drawn_at = schedules.drawn_by_step(self.config.corrections, self.recipe)
            reads_full = schedules.members_read_full(elastic, has_teacher=bool(self.teacher))
            drawn = Counter(chain.from_iterable(map(drawn_at, self.steps_left)))
            trained += [
                times * cost.member_flops_per_token(self.config, member, reads_full=reads_full)
                for member, times in drawn.items()
            ]
        return self.recipe.num_tokens_per_step * sum(trained)

    @property
    def expected_flops(self) -> float:
        """The same, for a bound as if the schedules were spread evenly from none to all."""
        of_none, of_all = (
            cost.training_flops_per_token(self.config, each)
            for each in (self.config.corrections.none(self.config.num_layers), None)
        )
        return self.flops * (1 + of_none / of_all) / 2 if self.is_bound else self.flops

    @cached_property
    def teacher_flops_per_token(self) -> float:
        """FLOPs of the teacher's forward pass, 0 without one."""
        model = self.teacher
        return cost.inference_cost(model).forward_flops_per_token if model else 0.0

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
            nearest = -(-sequences // workers) * workers * self.config.context_length
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
            precision=self.recipe.precision,
            on_gpus=devices.on_gpus,
            activation_checkpointing=self.recipe.activation_checkpointing,
            num_shards=(devices.shards or devices.num_workers) if devices.parallel == "fsdp" else 1,
            num_passes=self.num_passes * (1 + self.num_members),
            has_teacher=self.teacher is not None,
            has_members=self.num_members > 0,
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
        return CHECKPOINT_BYTES_PER_PARAMETER * cost.num_parameters(self.config)

    @property
    def disk_bytes(self) -> tuple[int, int]:
        """Bytes of all checkpoints that are kept, beside those that exist, and of one in writing.

        The second is 0 if the training writes no more checkpoints than it keeps.
        """
        recipe = self.recipe
        has_stable = 0 < schedules.stable_steps(recipe) < recipe.num_steps
        kept = recipe.num_checkpoints_kept + recipe.keep_best + has_stable
        written = -(-recipe.num_steps // recipe.checkpoint_every_steps) + has_stable
        most = written if recipe.checkpoint_every_minutes is None else kept + 1
        numbers = min(kept, most), min(kept + 1, most)
        new = max(0, self.checkpoint_bytes * numbers[0] - self.present_bytes)
        return new, self.checkpoint_bytes * (numbers[1] - numbers[0])


class Rate(Record):
    """Assumed speed of one device: FLOP/s at most, and the shares of them that are reached."""

    peak_flops: float
    shares: tuple[float, float]
    expected_flops: float
    """FLOP/s that are expected."""
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
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage of `STAGES` -> how long it is expected to take, all that is no training included."""
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
    num_saving: int = 0
    """Most trainings that save their state at the same time after a request to stop."""
    stop_seconds: float = 0.0
    """Longest time, without a step, until they have."""


def assumed_rate(training: Estimate, share: float | None = None) -> Rate:
    """Return the rate of an installed GPU, else of an H100, or of a CPU core; see `price_of`."""
    peak, shares, source = CPU_PEAK_FLOPS, CPU_SHARES, "a CPU core, assumed"
    expected = training.config.dim / (training.config.dim + CPU_HALF_WIDTH)
    if training.devices.on_gpus:
        precision, shares = training.recipe.precision, GPU_SHARES
        expected = sum(shares) / 2
        for name in [*(gpu.name for gpu in machine.installed_gpus()[:1]), ASSUMED_GPU]:
            if known := gpu_peak_flops(name, precision):
                peak, source = known, f"{name}, {precision}, dense"
                break
    shares = (share, share) if share else shares
    return Rate(
        peak_flops=peak, shares=shares, expected_flops=peak * (share or expected), source=source
    )


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


def _price_of_group(
    group: Sequence[Estimate], answer_flops: float, *, is_stored: bool, mfu: float | None
) -> Price:
    """Return the price of trainings that share devices; `answer_flops` is of outputs to store."""
    devices, rate = group[0].devices, assumed_rate(group[0], mfu)
    at_once, num_devices = min(devices.at_once, len(group)), machine.num_cpus()
    if devices.on_gpus:
        num_devices = -(-at_once * devices.num_workers // devices.sharing_a_gpu)
    # The longest training starts first, and each next one where one ends. A teacher that runs in a
    # training slows it; its stored outputs are computed before, on one GPU or all CPUs.
    live_tokens = [0 if is_stored and e.cache else e.num_teacher_tokens for e in group]
    lives = [e.teacher_flops_per_token * n for e, n in zip(group, live_tokens, strict=True)]
    works = [each.flops + live for each, live in zip(group, lives, strict=True)]
    places = [0.0] * at_once
    for work in sorted(works, reverse=True):
        heapq.heapreplace(places, places[0] + work)
    flops = max(places) * at_once / num_devices
    answers = answer_flops / (1 if devices.on_gpus else num_devices)
    longest = flops + answers * any(each.teacher for each in group)
    least, most = (longest / (rate.peak_flops * share) / 3600 for share in rate.shares[::-1])

    # Bounds are expected to take less.
    flops *= (sum(e.expected_flops for e in group) + sum(lives)) / (sum(works) or 1.0)
    alone = "pretrain" if group[0].section == "training" else "distill"
    stage, rounds = "sweep" if devices.are_trials else alone, math.ceil(len(group) / at_once)
    seconds = {stage: flops / rate.expected_flops + SECONDS[stage] * rounds}
    if devices.are_trials:
        seconds["teacher"] = answers / rate.expected_flops
    kept, in_writing = zip(*(each.disk_bytes for each in group), strict=True)
    saving = sorted(_write_seconds(each.checkpoint_bytes, each.storage) for each in group)
    return Price(
        num_trainings=len(group),
        num_tokens=sum(each.num_tokens for each in group),
        num_teacher_tokens=sum(live_tokens),
        flops=sum(works),
        hours=(least, most),
        seconds=seconds,
        num_devices=num_devices,
        uses_gpus=devices.on_gpus,
        rate=rate,
        disk={"checkpoints": sum(kept) + sum(sorted(in_writing)[-at_once:])},
        num_saving=at_once,
        stop_seconds=LEAST_SECONDS + 2 * sum(saving[-at_once:]),
    )


def price_of(
    trainings: Sequence[Estimate],
    folder: Path,
    *,
    new_token_bytes: int = 0,
    is_upper_bound: bool = False,
    teachers: Path | None = None,
    mfu: float | None = None,
    influence_flops: float = 0.0,
    measuring_flops: Sequence[float] = (),
) -> Price:
    """Return the price of trainings; those on other devices run one after another.

    Args:
        trainings: Those that are not finished.
        folder: A folder on the workspace's disk; it need not exist.
        new_token_bytes: Bytes of the tokens that are prepared first.
        is_upper_bound: Whether some of them stand for others that are not known yet.
        teachers: Folder of stored teacher outputs, if trainings read them.
        mfu: Share of the peak FLOP/s that is assumed; a usual range if unset.
        influence_flops: What measuring the influence of the teachers takes.
        measuring_flops: What measuring each model of a sweep takes.
    """
    groups = groups_by_devices(trainings)
    left = [*chain(*groups)]
    answers: list[CachePlan] = []
    if teachers and left:
        from orchestrator.training.teacher_cache import missing_caches  # Imports PyTorch.

        answers = missing_caches([each.cache for each in left], teachers)
    per_token = {each.cache.key: each.teacher_flops_per_token for each in left if each.cache}
    answer_flops = sum(plan.num_tokens * per_token[plan.key] for plan in answers)
    parts = [
        _price_of_group(group, answer_flops, is_stored=teachers is not None, mfu=mfu)
        for group in groups
    ]
    rate = parts[-1].rate if parts else None
    measuring, speed = sum(measuring_flops), CPU_PEAK_FLOPS * sum(CPU_SHARES) / 2
    speed *= machine.num_cpus()
    if rate:
        speed = rate.expected_flops * parts[-1].num_devices
    stages = {name: sum(part.seconds.get(name, 0.0) for part in parts) for name in STAGES}
    stages["sweep"] += measuring / speed
    if influence_flops:
        stages["influence"] = influence_flops / speed + SECONDS["influence"]
    if measuring:
        stages["report"] = SECONDS["report"]
    if measuring or trainings:
        stages["start"] = SECONDS["start"]

    first_stages = {
        stage.key: each.checkpoint_bytes
        for each in trainings
        if (stage := each.first_stage) and not stage.exists
    }
    disk = {
        "tokens": new_token_bytes,
        "checkpoints": sum(part.disk["checkpoints"] for part in parts),
        "shared first stages": sum(first_stages.values()),
        "teacher outputs": sum(plan.num_bytes for plan in answers),
    }
    answer_tokens = sum(plan.num_tokens for plan in answers)
    largest = max(trainings, key=lambda each: each.worker_bytes, default=None)
    return Price(
        is_upper_bound=is_upper_bound,
        num_trainings=len(trainings),
        num_tokens=sum(part.num_tokens for part in parts),
        num_teacher_tokens=answer_tokens + sum(part.num_teacher_tokens for part in parts),
        flops=sum(part.flops for part in parts) + answer_flops,
        hours=(sum(part.hours[0] for part in parts), sum(part.hours[1] for part in parts)),
        seconds={stage: seconds for stage, seconds in stages.items() if seconds},
        num_devices=max((part.num_devices for part in parts), default=0),
        uses_gpus=any(part.uses_gpus for part in parts),
        rate=rate,
        memory=largest.worker_memory if largest else {},
        disk={name: value for name, value in disk.items() if value},
        free_disk=free_disk(folder),
        num_saving=max((part.num_saving for part in parts), default=0),
        stop_seconds=max((part.stop_seconds for part in parts), default=0.0),
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


def seconds_to_save(
    jobs: Iterable[TrainingJob], note: Callable[[str], None] | None = None
) -> float:
    """Return the longest time from a request to stop until jobs on one disk have saved their state.

    The request is seen between two steps, so a step and a validation may come first. A checkpoint
    may be being written, then the state is; each is uploaded, too, if the run has a storage.

    Args:
        jobs: Those that were started; finished ones need nothing.
        note: Called with a sentence that announces the wait.
    """
    seconds, step, num_bytes = LEAST_SECONDS, 0.0, 0
    for job in jobs:
        if (job.folder / DONE_NAME).is_file():
            continue
        records, recipe = read_tail(job.folder), job.recipe
        size = CHECKPOINT_BYTES_PER_PARAMETER * cost.num_parameters(job.model)
        num_bytes += size
        seconds += 2 * _write_seconds(size, job.storage, records)
        speeds = [r["values"].get(SPEED_METRIC) for r in records if r["kind"] == "metrics"]
        if known := [speed for speed in speeds if speed]:
            num_tokens = recipe.num_tokens_per_step + recipe.num_validation_tokens
            step = max(step, num_tokens / known[-1])
    seconds += step
    if note and num_bytes:
        note(f"saving {format_bytes(num_bytes)}, at most {format_duration(seconds)}")
    return seconds


def _write_seconds(
    num_bytes: int, storage: str | None, records: Sequence[dict[str, Any]] = ()
) -> float:
    seconds = {"checkpoint": num_bytes / WRITE_BYTES_PER_SECOND}
    if storage:
        seconds["uploaded"] = num_bytes / UPLOAD_BYTES_PER_SECOND
    for record in records:  # As the newest checkpoint of this run took, if there is one.
        if record.get("name") in seconds:
            seconds[record["name"]] = record.get("seconds", seconds[record["name"]])
    return sum(seconds.values())


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
            f"{advice(largest, memory // sharing)}" + ", or set sweep.trials_at_once lower" * fewer
        )
    needed = sum(disk.values())
    if free.disk is not None and needed > free.disk:
        reasons.append(
            f"the run would write about {format_bytes(needed)} ({format_byte_parts(disk)}), and "
            f"the workspace's disk has {format_bytes(free.disk)} free; free some space, or choose "
            "another place with --workspace"
        )
    return reasons


def advice(training: Estimate, most_bytes: int) -> str:
    """Return, in words, the smallest change of settings with which a worker fits into memory.

    Fewer sequences per pass come first, then recomputed layers, then a shared model.

    Args:
        most_bytes: Memory that the worker may take.
    """
    section, per_pass = training.section, training.sequences_per_pass
    usual, recomputed = training.devices.parallel, training.recipe.activation_checkpointing
    parallels = [usual, "fsdp"] if training.devices.num_workers > 1 else [usual]
    numbers = [per_pass >> halvings for halvings in range(per_pass.bit_length())]
    for parallel, recomputes, number in product(parallels, (recomputed, True), numbers):
        changed = {"num_sequences_per_pass": number, "activation_checkpointing": recomputes}
        recipe = training.recipe.model_copy(update=changed)
        devices = replace(training.devices, parallel=parallel)
        if replace(training, recipe=recipe, devices=devices).worker_bytes <= most_bytes:
            changes = {
                "cluster.parallel=fsdp": parallel != usual,
                f"{section}.activation_checkpointing=true": recomputes != recomputed,
                f"{section}.num_sequences_per_pass={number}": number < per_pass,
            }
            made = " ".join(f"--set {change}" for change, is_made in changes.items() if is_made)
            return f"the nearest setting that fits: {made}"
    return "no setting needs as little; take a smaller model, or more memory"


@contextmanager
def out_of_memory_explained(
    job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"] = "ddp"
) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error in the block, which trains a job, into a `DeviceError`.

    Trying again would end the same way.

    Raises:
        DeviceError: Says what was planned, and the nearest setting that takes clearly less.
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
            f"({format_byte_parts(training.worker_memory)}); "
            f"{advice(training, int(LARGEST_SHARE * training.worker_bytes))}; the checkpoints are "
            "kept"
        ) from None
