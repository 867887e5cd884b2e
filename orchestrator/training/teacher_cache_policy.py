"""Decide whether the students of a teacher read its stored outputs or run it themselves.

All students of a sweep see the same sequences in the same order, so their teacher computes the same
outputs for each. Storing them once costs disk space and saves one forward pass per student and
step; that pays from two students on. Exact outputs give the same losses to the last bit (on the
same machine, with the same number of threads). Coarse outputs are another loss and another trial,
used only on request. Hidden states are not stored: a loss that needs them needs the teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orchestrator.settings import DistillationSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import TrainingJob
from orchestrator.training.teacher_cache import (
    CachePlan,
    bytes_to_write,
    find_cache_damage,
    write_cache,
)
from orchestrator.training.teacher_outputs import (
    cache_plan,
    teacher_outputs_by_step,
    teaching_steps,
)
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.whole_folders import delete_folder

MAX_BYTES = 2 << 30
"""Most bytes that `auto` stores for one sweep."""
MAX_SHARE_OF_DISK = 0.1
"""Largest share of the free disk space that `auto` uses."""
MIN_STUDENTS = 2
"""Fewest students for which `auto` stores outputs."""
_KEPT_NAME = "kept"
"""File in the folder of outputs that were requested by name; `auto` does not delete them."""
_NEEDS_TEACHER = "distillation.hidden_weight needs its hidden states, which are not stored"


def store_teacher_outputs(
    jobs: Sequence[TrainingJob],
    settings: DistillationSettings,
    parent: Path,
    *,
    on_gpu: bool = False,
    progress: Progress | None = None,
) -> list[TrainingJob]:
    """Store the teacher outputs of several jobs if that pays, and have the jobs read them.

    Args:
        jobs: The jobs to run; those without a teacher are returned unchanged.
        settings: `teacher_cache` decides whether to store.
        parent: Folder of all caches.
        on_gpu: Whether the jobs run on GPUs; the teacher then runs on a GPU of this process, if
            there is one.
        progress: Shows the decision and the progress of storing.

    Returns:
        The jobs in their order; `teacher_cache` is set in those that read stored outputs.

    Raises:
        UserError: If the requested cache is impossible.
        RunFailed: If the disk fills up.
    """
    progress = progress or Progress()
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    plans = [cache_plan(job) for job in jobs]
    if settings.hidden_weight and any(job.objective == "distill" for job in jobs):
        check_teacher_cache(settings)
        if settings.teacher_cache == "auto":
            progress.note(f"the teacher runs in each trial: {_NEEDS_TEACHER}")
    policy = _StoragePolicy(settings.teacher_cache, parent)
    folders: dict[str, Path] = {}
    for plan in {p.key: p for p in plans if p}.values():
        students = [job for job, p in zip(jobs, plans, strict=True) if p and p.key == plan.key]
        is_stored, reason = policy.decide(plan, len(students))
        if reason:
            progress.note(reason)
        if is_stored:
            folders[plan.key] = _store(plan, students[0], parent, device, progress)
            if settings.teacher_cache != "auto":
                (folders[plan.key] / _KEPT_NAME).touch()
    return [
        replace(job, teacher_cache=str(folders[plan.key])) if plan and plan.key in folders else job
        for job, plan in zip(jobs, plans, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """What the teachers of some jobs still have to compute."""

    num_tokens: int
    """Tokens of their forward passes."""
    num_stored_tokens: int
    """Part of these tokens whose outputs are stored, each once."""
    num_bytes: int
    """Size of the outputs to store."""


def estimate_teacher_work(
    jobs: Sequence[TrainingJob],
    settings: DistillationSettings,
    parent: Path,
    *,
    steps_done: Sequence[int] | None = None,
) -> TeacherWork:
    """Return what teachers will compute: shared outputs once, outputs that are stored not at all.

    Args:
        jobs: The jobs to run.
        settings: `teacher_cache` decides whether to store.
        parent: Folder of all caches.
        steps_done: Step that each job resumes from; 0 when unset. A teacher whose outputs are not
            stored skips these steps.
    """
    students: dict[str, tuple[CachePlan, list[int]]] = {}
    num_tokens = num_stored = num_bytes = 0
    for job, done in zip(jobs, steps_done or [0] * len(jobs), strict=True):
        plan, steps = cache_plan(job), teaching_steps(job)
        tokens_left = sum(step >= done for step in steps) * job.recipe.num_tokens_per_step
        if plan:
            students.setdefault(plan.key, (plan, []))[1].append(tokens_left)
        elif job.teacher_folder and job.objective == "distill":
            num_tokens += tokens_left
    policy = _StoragePolicy(settings.teacher_cache, parent)
    for plan, left in students.values():
        is_stored, _ = policy.decide(plan, len(left))
        if not is_stored:
            num_tokens += sum(left)
        elif _is_missing(plan, parent):
            num_stored += plan.num_rows * plan.context_length
            num_bytes += bytes_to_write(plan, parent)
    return TeacherWork(
        num_tokens=num_tokens + num_stored, num_stored_tokens=num_stored, num_bytes=num_bytes
    )


def check_teacher_cache(settings: DistillationSettings) -> None:
    """Refuse a teacher cache for a loss that needs hidden states.

    Raises:
        UserError: If `teacher_cache` asks for one.
    """
    if settings.hidden_weight and settings.teacher_cache in ("exact", "top_k"):
        raise UserError(
            f"distillation.teacher_cache={settings.teacher_cache} cannot be: {_NEEDS_TEACHER}; "
            "set it to live, or hidden_weight to 0"
        )


def delete_teacher_caches(jobs: Sequence[TrainingJob], settings: DistillationSettings) -> None:
    """Delete the outputs that `auto` stored for jobs that are finished.

    A process that has opened them can read on; a later one runs the teacher.
    """
    if settings.teacher_cache == "auto":
        for folder in {Path(job.teacher_cache) for job in jobs if job.teacher_cache}:
            if not (folder / _KEPT_NAME).exists():
                with suppress(OSError):
                    delete_folder(folder)


class _StoragePolicy:
    """Decides about one cache after another, and counts the bytes of those that it accepted."""

    def __init__(self, mode: str, parent: Path) -> None:
        self.mode, self.parent = mode, parent
        # Read the free space once, so that bytes already promised are not subtracted twice.
        self._free, self._promised = _free_bytes(parent), 0

    def decide(self, plan: CachePlan, num_students: int) -> tuple[bool, str]:
        """Return whether to store, and a sentence for the user."""
        mode = self.mode
        if mode == "live":
            return False, ""
        size, needed = format_bytes(plan.num_bytes), bytes_to_write(plan, self.parent)
        free = self._free - self._promised
        if not _is_missing(plan, self.parent):
            return True, f"the teacher's outputs are there already ({size}){self._requested()}"
        if mode != "auto":
            if needed > free:
                raise UserError(
                    f"distillation.teacher_cache={mode} needs {format_bytes(needed)}, and "
                    f"{self.parent} has {format_bytes(free)} free; set it to live, or shorten "
                    "distillation.training"
                )
            self._promised += needed
            return True, f"the teacher's outputs are stored once ({size}){self._requested()}"
        if num_students < MIN_STUDENTS:
            return False, f"the teacher runs in each trial: only {num_students} needs it"
        limit = min(MAX_BYTES - self._promised, int(MAX_SHARE_OF_DISK * free))
        if needed > limit:
            return False, (
                f"the teacher runs in each trial: its outputs would take {format_bytes(needed)}, "
                f"more than {format_bytes(max(limit, 0))} (the smaller of "
                f"{format_bytes(MAX_BYTES)} for a whole sweep and {MAX_SHARE_OF_DISK:.0%} of the "
                "free disk)"
            )
        self._promised += needed
        return True, f"the teacher's outputs are stored once ({size}) for {num_students} trials"

    def _requested(self) -> str:
        return "" if self.mode == "auto" else f", as distillation.teacher_cache={self.mode} asks"


def _is_missing(plan: CachePlan, parent: Path) -> bool:
    return find_cache_damage(parent / plan.key, plan, read=False) is not None


def _store(
    plan: CachePlan, job: TrainingJob, parent: Path, device: str, progress: Progress
) -> Path:
    progress.start("teacher", plan.num_steps)
    try:
        outputs = teacher_outputs_by_step(job, device=device)
        folder = write_cache(plan, parent, outputs, progress=progress)
    except OSError as error:
        raise RunFailed(
            f"cannot store the teacher's outputs in {parent} ({error.strerror or error}); "
            "free disk space, or set distillation.teacher_cache=live"
        ) from None
    if device != "cpu":
        del outputs  # Free the teacher's memory: the trials use the same GPU.
        torch.cuda.empty_cache()
    num_tokens = plan.num_rows * plan.context_length
    progress.finish(f"outputs for {num_tokens:,} tokens, {format_bytes(plan.num_bytes)}")
    return folder


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
