"""Whether trainings fit into memory and onto the disk, and if not, the nearest setting that does.

The nearest setting is the first of these that fits: fewer sequences per pass (same gradients),
layers recomputed in the backward pass (slower), a model shared by its workers, a smaller model.
On a cluster that is joined, only the disk is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from iiet.config import PRESETS
from orchestrator.planning.installed_gpus import installed_gpus
from orchestrator.planning.planned_training import PlannedTraining, planned_training
from orchestrator.planning.price import PlannedWork, TrainingGroup, pretraining_group
from orchestrator.planning.resources import FreeBytes, local_free_bytes
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.terminal.render import format_byte_parts, format_bytes, format_count
from orchestrator.training.job import finished_outcome
from orchestrator.training.job_checks import check_job
from orchestrator.training.model_config import build_model_config
from orchestrator.training.peak_flops import ASSUMED_GPU, ASSUMED_GPU_BYTES
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import LOCAL

MeasureFree = Callable[..., FreeBytes]
"""Returns free memory and disk, like `local_free_bytes`."""


def check_trainings(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings,
    *,
    settings: Sequence[Settings] = (),
    measure_free: MeasureFree = local_free_bytes,
) -> None:
    """Refuse jobs that cannot run: descriptions, memory, disk. Finished jobs need nothing.

    The number of CPUs and GPUs has been checked before; see `check_resources`.

    Args:
        jobs: The trainings; as many run side by side as there are CPUs or GPUs for.
        settings: Settings of each job, if a smaller model may be proposed.

    Raises:
        UserError: If one cannot run; says what could.
    """
    for job in jobs:
        for num_gpus in {cluster.num_gpus, cluster.fewest_gpus}:
            check_job(job, num_workers=num_gpus or cluster.num_workers)
    waiting = [n for n, job in enumerate(jobs) if finished_outcome(job) is None]
    trainings = [
        replace(planned_training(jobs[n]), model=settings[n].model if settings else None)
        for n in waiting
    ]
    # The fewest GPUs of a job have the largest shares of a step.
    fewest = cluster.model_copy(update={"num_gpus": cluster.fewest_gpus})
    groups = [pretraining_group(trainings, fewest)]
    work = PlannedWork(groups=groups, folder=jobs[0].folder, address=cluster.ray_address)
    check_fit(work, measure_free=measure_free)


def check_fit(work: PlannedWork, *, measure_free: MeasureFree = local_free_bytes) -> None:
    """Refuse trainings that would run out of memory (each of them) or disk (all together).

    Raises:
        UserError: If they do not fit; says what would.
    """
    for group in work.groups:
        if group.trainings and work.address == LOCAL:
            _check_memory(group, work.folder, measure_free)
    if work.trainings and (disk := measure_free(work.folder).disk) is not None:
        _check_disk(work, disk)


def find_problems(work: PlannedWork, check_devices: Callable[[], None]) -> dict[str, str | None]:
    """Return place -> why trainings do not fit there, None if they do.

    The first place is this machine. Without the GPUs that are asked for, an assumed one is another.

    Args:
        check_devices: Raises `UserError` if this machine has too few CPUs or GPUs.
    """

    def problem_of(*checks: Callable[[], None]) -> str | None:
        found = []
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
        return ". Also: ".join(found) or None

    is_far = work.address != LOCAL
    place = "this machine" + " (the cluster's memory is unknown)" * is_far
    problems = {place: problem_of(check_devices, partial(check_fit, work))}
    if not installed_gpus() and any(training.on_gpus for training in work.trainings):
        gpu = FreeBytes(memory=ASSUMED_GPU_BYTES, disk=None, place=f"an {ASSUMED_GPU}")
        there = replace(work, address=LOCAL)
        fits_there = partial(check_fit, there, measure_free=partial(_free_on, gpu))
        problems[gpu.place] = problem_of(fits_there)
    return problems


def _free_on(gpu: FreeBytes, *_: Any, num_gpus: int = 0, **__: Any) -> FreeBytes:
    # The memory of the machine that has this GPU is not known.
    return gpu if num_gpus else replace(gpu, memory=None)


def _check_memory(group: TrainingGroup, folder: Path, measure_free: MeasureFree) -> None:
    first = group.trainings[0]
    # A training on GPUs has its own memory, or a share of it. On CPUs those that run at the same
    # time share it, and of the trials of a sweep fewer can be asked for.
    sharing = 1 if first.on_gpus or group.is_trials else group.at_once
    free = measure_free(
        folder,
        num_workers=first.num_workers * sharing,
        num_gpus=first.num_workers if first.on_gpus else 0,
    )
    if free.memory is None:
        return
    on_same_gpu = min(group.sharing_a_gpu, group.at_once)
    memory = free.memory // on_same_gpu
    place = f"{free.place}, shared by {on_same_gpu} trials," if on_same_gpu > 1 else free.place
    for training in group.trainings:
        if training.worker_bytes > memory:
            raise UserError(_too_little_memory(training, memory, place))
    if first.on_gpus:
        _check_host_memory(group, measure_free(folder).memory)
    needed = max(training.worker_bytes for training in group.trainings)
    most = memory // needed
    if group.is_trials and not first.on_gpus and most < group.at_once:
        raise UserError(
            f"{group.at_once} trials at once would take about "
            f"{format_bytes(group.at_once * first.num_workers * needed)} of memory, and this "
            f"machine has {format_bytes(first.num_workers * memory)} free; the nearest "
            f"setting that fits: --set sweep.trials_at_once={most}"
        )


def _check_host_memory(group: TrainingGroup, free: int | None) -> None:
    largest = max(group.trainings, key=lambda training: training.host_bytes)
    if free is None or group.at_once * largest.host_bytes <= free:
        return
    at_once = min(free // largest.host_bytes, group.at_once - 1)
    num_gpus = (n for n in range(largest.num_workers - 1, 0, -1) if not group.is_trials)
    fewer = (n for n in num_gpus if replace(largest, num_workers=n).host_bytes <= free)
    if at_once:
        change = f"--set sweep.trials_at_once={at_once}"
    elif gpus := next(fewer, 0):
        change = f"--set cluster.num_gpus={gpus}"
    else:
        change = nearest_fit(largest, lambda other: other.host_bytes <= free) or ""
    advice = f"the nearest setting that fits: {change}" if change else "no setting needs as little"
    many, each = "training", ""
    if group.at_once > 1:
        many, each = f"{group.at_once} trainings at once", " for each"
    raise UserError(
        f"{many} on {format_count(group.num_devices, 'GPU')} would take about "
        f"{format_bytes(group.at_once * largest.host_bytes)} of the machine's own memory "
        f"({format_byte_parts(largest.host_memory)}{each}), and it has {format_bytes(free)} free; "
        f"{advice}"
    )


def _too_little_memory(training: PlannedTraining, free: int, place: str) -> str:
    each = f" for each of {training.num_workers} workers" if training.num_workers > 1 else ""
    change = nearest_fit(training, lambda other: other.worker_bytes <= free)
    advice = f"the nearest setting that fits: {change}" if change else "no setting needs as little"
    return (
        f"training would take about {format_bytes(training.worker_bytes)}{each} "
        f"({format_byte_parts(training.worker_memory)}), and {place} has {format_bytes(free)} "
        f"free{' for each' if each else ''}; {advice}"
    )


def _check_disk(work: PlannedWork, disk: int) -> None:
    needed, trainings = work.disk(), work.trainings
    total = sum(needed.values())
    if total <= disk:
        return
    sections = dict.fromkeys(training.section for training in trainings)
    most = max(training.recipe.num_checkpoints_kept for training in trainings)
    changes = [
        " ".join(f"--set {section}.num_checkpoints_kept={number}" for section in sections)
        for number in range(most - 1, 0, -1)
        if sum(work.disk(number).values()) <= disk
    ]
    if total - needed.get("teacher outputs", 0) <= disk:
        changes.append("--set distillation.teacher_cache=live")
    if len(trainings) == 1:
        others = total - trainings[0].new_bytes() - trainings[0].bytes_in_writing()
        change = nearest_fit(
            trainings[0],
            lambda other: others + other.new_bytes() + other.bytes_in_writing() <= disk,
        )
        changes += [change] if change else []
    advice = f"the nearest setting that fits: {changes[0]}; or " if changes else ""
    what = f"{len(trainings)} trainings" if len(trainings) > 1 else "the run"
    raise UserError(
        f"{what} would write about {format_bytes(total)} ({format_byte_parts(needed)}), and the "
        f"workspace's disk has {format_bytes(disk)} free; {advice}free some space, or choose "
        "another place with --workspace"
    )


def nearest_fit(training: PlannedTraining, fits: Callable[[PlannedTraining], bool]) -> str | None:
    """Return what to type for the smallest change of a training that fits; None if none does."""
    return next((text for text, other in _alternatives(training) if fits(other)), None)


def _alternatives(training: PlannedTraining) -> Iterator[tuple[str, PlannedTraining]]:
    """Yield what to type and the training that it gives, the smallest change first."""
    yield from _with_less_memory(training)
    if training.parallel == "ddp" and training.num_workers > 1:
        shared = replace(training, parallel="fsdp")
        yield from _with_less_memory(shared, "--set cluster.parallel=fsdp")
    if training.shards and training.shards < training.num_workers:
        shared, text = replace(training, shards=None), f"cluster.num_shards={training.num_workers}"
        yield from _with_less_memory(shared, f"--set {text}")
    for name, smaller in _smaller_presets(training):
        yield from _with_less_memory(smaller, f"--set model.preset={name}")


def _with_less_memory(
    training: PlannedTraining, text: str = ""
) -> Iterator[tuple[str, PlannedTraining]]:
    """Yield `text` alone, with fewer sequences per pass, and both with layers recomputed."""
    if text:
        yield text, training
    per_pass, key = training.sequences_per_pass, f"--set {training.section}."
    for recomputes in (False, True):
        for sequences in (per_pass >> halvings for halvings in range(per_pass.bit_length())):
            if sequences == per_pass and not recomputes:
                continue
            parts = (
                text,
                f"{key}activation_checkpointing=true" if recomputes else "",
                f"{key}num_sequences_per_pass={sequences}" if sequences < per_pass else "",
            )
            yield (
                " ".join(filter(None, parts)),
                training.with_recipe(
                    num_sequences_per_pass=sequences,
                    activation_checkpointing=recomputes or training.recipe.activation_checkpointing,
                ),
            )


def _smaller_presets(training: PlannedTraining) -> list[tuple[str, PlannedTraining]]:
    """Return the presets that make the model smaller, the largest first."""
    if training.model is None:
        return []
    found = []
    for name in PRESETS:
        changed = training.model.model_copy(update={"preset": name})
        try:
            config = build_model_config(
                changed,
                vocab_size=training.config.vocab_size,
                context_length=training.config.context_length,
            )
            smaller = replace(training, config=config)
            smaller.sequences_per_worker  # noqa: B018  # raises if the step does not go with it
        except UserError:
            continue  # The settings' own sizes do not go with this preset.
        if smaller.num_parameters < training.num_parameters:
            found.append((name, smaller))
    return sorted(found, key=lambda entry: -entry[1].num_parameters)
