"""Whether trainings can run with the memory and disk that there are, checked before any starts.

One check for trainings, one for a sweep's trials, one for the students of a teacher that is not
trained yet. Each raises one error that names the nearest setting that fits. If `RAY_ADDRESS` names
a cluster, only the disk is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.planning.fit import ResourceRequest, check_fit, needed_memory, request_of
from orchestrator.planning.resources import (
    FreeBytes,
    Resources,
    local_free_bytes,
    local_resources,
)
from orchestrator.planning.trial_gpus import assign_trial_gpus
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings, Settings, SweepSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.training.job import DONE_NAME, finished_outcome
from orchestrator.training.job_checks import check_job
from orchestrator.workspace.errors import UserError

MeasureFree = Callable[..., FreeBytes]
"""Returns free memory and disk, like `local_free_bytes`."""


def check_trainings(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings,
    *,
    settings: Sequence[Settings] = (),
    measure_free: MeasureFree = local_free_bytes,
) -> None:
    """Refuse trainings that cannot run: job descriptions, memory, disk. Finished jobs need nothing.

    The number of CPUs and GPUs has been checked before; see `check_resources`.

    Args:
        jobs: The trainings; as many run side by side as there are CPUs or GPUs for.
        settings: Settings of each job, if a smaller model may be proposed.

    Raises:
        UserError: If one cannot run; says what could.
    """
    num_workers = cluster.num_gpus or cluster.num_workers
    for job in jobs:
        check_job(job, num_workers=num_workers)
    waiting = {n: job for n, job in enumerate(jobs) if finished_outcome(job) is None}
    # On GPUs each job has its own memory; on CPUs jobs that run at the same time share it.
    at_once = max(1, min(len(waiting), local_resources(count_gpus=False).cpus // num_workers))
    requests = []
    for number, job in waiting.items():
        request = replace(
            request_of(job),
            num_workers=num_workers,
            on_gpus=cluster.num_gpus > 0,
            parallel=cluster.parallel,
            model=settings[number].model if settings else None,
        )
        free = measure_free(
            job.folder, num_workers=num_workers * at_once, num_gpus=cluster.num_gpus
        )
        check_fit(request, free, present_bytes=_checkpoint_bytes(job.folder))
        requests.append((job.folder, request))
    _check_disk(requests, at_once=at_once, measure_free=measure_free)


def check_trials_fit(
    jobs: Sequence[TrainingJob],
    sweep: SweepSettings,
    *,
    teacher_bytes: int = 0,
    resources: Resources | None = None,
    measure_free: MeasureFree = local_free_bytes,
) -> None:
    """Refuse a sweep's trials that would run out of memory (each trial) or disk (all together).

    Args:
        jobs: Trials that are not finished.
        sweep: How many trials run at once, with how many workers or GPUs each.
        teacher_bytes: Size of the teacher cache that will be written for them.
        resources: Available CPUs; this machine's if unset.

    Raises:
        UserError: If they do not fit; says what would.
    """
    gpus, workers, at_once = _trials_at_once(sweep, len(jobs), resources)
    requests = []
    for job in jobs:
        request = replace(request_of(job), num_workers=workers, on_gpus=gpus > 0)
        free = measure_free(job.folder, num_workers=workers, num_gpus=gpus)
        check_fit(request, free, present_bytes=_checkpoint_bytes(job.folder))
        if not (job.folder / DONE_NAME).is_file():  # A trained one is only evaluated.
            requests.append((job.folder, request))
        if free.memory is None or gpus:
            continue
        needed = needed_memory(request.estimate())
        most = free.memory // needed
        if most < at_once:
            raise UserError(
                f"{at_once} trials at once would take about "
                f"{format_bytes(at_once * workers * needed)} of memory, and this machine has "
                f"{format_bytes(workers * free.memory)} free; the nearest setting that fits: "
                f"--set sweep.trials_at_once={most}"
            )
    _check_disk(requests, at_once=at_once, teacher_bytes=teacher_bytes, measure_free=measure_free)


def check_students_fit(
    settings: Settings,
    jobs: Sequence[TrainingJob],
    max_students: int,
    *,
    measure_free: MeasureFree = local_free_bytes,
) -> None:
    """Refuse students that would not fit, before their teacher is trained.

    Args:
        jobs: The teacher first, then the baselines that are pretrained with it.
        max_students: Largest number of students that the sweep may train.

    Raises:
        UserError: If one student, or all trainings together, would not fit; says what would.
    """
    teacher, distillation = jobs[0].model, settings.distillation
    request = ResourceRequest(
        config=teacher,
        recipe=distillation.training,
        section="distillation.training",
        teacher=teacher if distillation.control == "distill" else None,
    )
    sweep = assign_trial_gpus(settings, [request]).sweep
    gpus, workers, at_once = _trials_at_once(sweep, max_students)
    student = replace(request, num_workers=workers, on_gpus=gpus > 0)
    folder = jobs[0].folder.parent  # It holds no checkpoints itself.
    check_fit(student, measure_free(folder, num_workers=workers, num_gpus=gpus))
    pretrained = [(job.folder, request_of(job)) for job in jobs if finished_outcome(job) is None]
    students = [(folder, student)] * max_students
    _check_disk([*pretrained, *students], at_once=at_once, measure_free=measure_free)


def _trials_at_once(
    sweep: SweepSettings, num_trials: int, resources: Resources | None = None
) -> tuple[int, int, int]:
    """Return GPUs per trial, workers per trial, and how many trials run side by side."""
    resources = resources or local_resources(count_gpus=False)
    gpus = sweep.gpus_per_trial or 0
    workers = gpus or sweep.workers_per_trial
    most = max(1, resources.cpus // workers)
    return gpus, workers, min(sweep.trials_at_once or most, most, num_trials)


def _check_disk(
    requests: Sequence[tuple[Path, ResourceRequest]],
    *,
    at_once: int,
    measure_free: MeasureFree,
    teacher_bytes: int = 0,
) -> None:
    """Refuse trainings that fit on the disk one by one, but not together.

    Args:
        requests: Run folder and request of each.
        at_once: How many run, and so write a checkpoint, at the same time.
        teacher_bytes: Size of the teacher cache that will be written for them.
    """
    disk = measure_free(requests[0][0]).disk if requests else None
    if disk is None:
        return

    def checkpoint_bytes(max_kept: int | None = None) -> int:
        new_bytes, bytes_in_writing = 0, []
        for folder, request in requests:
            kept = request.recipe.num_checkpoints_kept
            estimate = request.estimate(num_checkpoints_kept=min(kept, max_kept or kept))
            new_bytes += max(0, estimate.kept_bytes - _checkpoint_bytes(folder))
            bytes_in_writing.append(estimate.disk_bytes - estimate.kept_bytes)
        return new_bytes + sum(sorted(bytes_in_writing, reverse=True)[:at_once])

    checkpoints = checkpoint_bytes()
    if checkpoints + teacher_bytes <= disk:
        return
    sections = dict.fromkeys(request.section for _, request in requests)
    most = max(request.recipe.num_checkpoints_kept for _, request in requests)
    changes = [
        " ".join(f"--set {section}.num_checkpoints_kept={number}" for section in sections)
        for number in range(most - 1, 0, -1)
        if checkpoint_bytes(number) + teacher_bytes <= disk
    ]
    if checkpoints <= disk:
        changes.append("--set distillation.teacher_cache=live")
    advice = f"the nearest setting that fits: {changes[0]}; or " if changes else ""
    cache = f" and the teacher cache {format_bytes(teacher_bytes)}" if teacher_bytes else ""
    raise UserError(
        f"{len(requests)} trainings would write about "
        f"{format_bytes(checkpoints + teacher_bytes)} together (checkpoints "
        f"{format_bytes(checkpoints)}{cache}), and the workspace's disk has {format_bytes(disk)} "
        f"free; {advice}free some space, or choose another place with --workspace"
    )


def _checkpoint_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for checkpoint in find_checkpoints(folder)
        for path in checkpoint.iterdir()
        if path.is_file()
    )
