"""Decide whether the students of a teacher read its stored outputs or run it themselves.

Stored outputs cost disk space and save each student but one a forward pass per step. Exact outputs
give the same losses to the last bit (on the same machine, with the same number of threads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from orchestrator.records.training import TrainingJob
from orchestrator.settings import DistillationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.training.device_work import OnDevice, on_cpu
from orchestrator.training.teacher_cache import (
    CachePlan,
    bytes_to_write,
    cache_plan,
    find_cache_damage,
    teacher_outputs_by_step,
    write_cache,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import delete_folder, free_disk

# Limits of `auto` for one sweep.
MAX_BYTES = 2 << 30
MAX_SHARE_OF_DISK = 0.1
MIN_STUDENTS = 2
_KEPT_NAME = "kept"  # File in a requested cache: `auto` does not delete it.


class TeacherWork(NamedTuple):
    """Tokens that teachers have yet to compute, those of them to store, and the bytes to store."""

    num_tokens: int = 0
    num_stored_tokens: int = 0
    num_bytes: int = 0


def store_teacher_outputs(
    jobs: Sequence[TrainingJob],
    settings: DistillationSettings,
    parent: Path,
    *,
    on_device: OnDevice = on_cpu,
    progress: Progress | None = None,
) -> list[TrainingJob]:
    """Store the teacher outputs of jobs if that pays; return the jobs, which then read them.

    Args:
        parent: Folder of all caches.
        on_device: Runs the teacher.

    Raises:
        UserError: If the requested cache is impossible.
        RunFailed: If the disk fills up.
    """
    progress, shared = progress or Progress(), list(jobs)
    is_distilled = any(job.objective == "distill" for job in jobs)
    if settings.hidden_weight and is_distilled and settings.teacher_cache == "auto":
        progress.note(
            "the teacher runs in each trial: distillation.hidden_weight needs its hidden states, "
            "which are not stored"
        )
    plans = [cache_plan(job) for job in jobs]
    for plan, students, _ in _chosen_caches(plans, settings.teacher_cache, parent, progress):
        progress.start("teacher", plan.num_steps)
        folder = parent / plan.key
        try:
            # A damaged cache is written again; an intact one needs no teacher and no device.
            if find_cache_damage(folder, plan):
                on_device(partial(_write_outputs, jobs[students[0]], plan, parent), progress)
        except OSError as error:
            raise RunFailed(
                f"cannot store the teacher's outputs in {parent} ({error.strerror or error}); "
                "free disk space, or set distillation.teacher_cache=live"
            ) from None
        progress.finish(f"outputs for {plan.num_tokens:,} tokens, {format_bytes(plan.num_bytes)}")
        if settings.teacher_cache != "auto":
            (folder / _KEPT_NAME).touch()
        for student in students:
            shared[student] = jobs[student].model_copy(update={"teacher_cache": str(folder)})
    return shared


def _write_outputs(
    job: TrainingJob, plan: CachePlan, parent: Path, device: str, progress: Progress
) -> None:
    outputs = teacher_outputs_by_step(job, device=device)
    write_cache(plan, parent, outputs, progress=progress)


def estimate_teacher_work(
    plans: Sequence[CachePlan | None], tokens_left: Sequence[int], mode: str, parent: Path
) -> TeacherWork:
    """Return what teachers will compute for trainings: shared outputs count once.

    Args:
        plans: The outputs that each training needs; None if they cannot be stored.
        tokens_left: Tokens that a teacher reads which runs in the training.
        mode: The setting `distillation.teacher_cache`.
        parent: Folder of all caches.

    Raises:
        UserError: If the requested outputs do not fit on the disk.
    """
    tokens_left = list(tokens_left)
    num_stored = num_bytes = 0
    for plan, students, needed in _chosen_caches(plans, mode, parent, Progress()):
        for student in students:
            tokens_left[student] = 0
        num_bytes += needed
        num_stored += plan.num_tokens if needed else 0
    return TeacherWork(sum(tokens_left) + num_stored, num_stored, num_bytes)


def delete_teacher_caches(jobs: Sequence[TrainingJob], settings: DistillationSettings) -> None:
    """Delete the outputs that `auto` stored for jobs that are finished.

    A process that has opened them can read on; a later one runs the teacher.
    """
    for folder in {Path(job.teacher_cache) for job in jobs if job.teacher_cache}:
        if settings.teacher_cache == "auto" and not (folder / _KEPT_NAME).exists():
            with suppress(OSError):
                delete_folder(folder)


def _chosen_caches(
    plans: Sequence[CachePlan | None], mode: str, parent: Path, progress: Progress
) -> Iterator[tuple[CachePlan, list[int], int]]:
    """Yield each cache to use, the numbers of its users, and its missing bytes; note each decision.

    A complete cache is used. Another one is written if its missing bytes fit on the disk and, for
    `auto`, if enough students share it and the bytes stay within the limits above.
    """
    name, is_auto = "distillation.teacher_cache", mode == "auto"
    caches: dict[str, tuple[CachePlan, list[int]]] = {}
    for number, plan in enumerate(plans):
        if mode != "live" and plan:
            caches.setdefault(plan.key, (plan, []))[1].append(number)
    # Read the free space once, so that bytes already promised are not subtracted twice.
    free, promised = free_disk(parent), 0
    for plan, students in caches.values():
        needed, limit = bytes_to_write(plan, parent), free - promised
        if is_auto:
            limit = max(0, min(MAX_BYTES - promised, int(MAX_SHARE_OF_DISK * limit)))
        if is_auto and needed and len(students) < MIN_STUDENTS:
            progress.note(f"the teacher runs in each trial: only {len(students)} needs it")
            continue
        if is_auto and needed > limit:
            progress.note(
                f"the teacher runs in each trial: its outputs would take {format_bytes(needed)}, "
                f"more than {format_bytes(limit)} (the smaller of {format_bytes(MAX_BYTES)} for "
                f"a whole sweep and {MAX_SHARE_OF_DISK:.0%} of the free disk)"
            )
            continue
        if needed > limit:
            raise UserError(
                f"{name}={mode} needs {format_bytes(needed)}, and {parent} has "
                f"{format_bytes(limit)} free; set it to live, or shorten distillation.training"
            )
        state = f"{'stored once' if needed else 'there already'} ({format_bytes(plan.num_bytes)})"
        why = f" for {len(students)} trials" if is_auto else f", as {name}={mode} asks"
        progress.note(f"the teacher's outputs are {state}{why}")
        promised += needed
        yield plan, students, needed
