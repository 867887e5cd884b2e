"""Whether the students of one teacher ask it themselves or read what it said, and why.

All students of a sweep see the same sequences in the same order, so their teacher says the same to
each of them. Stored once, that costs disk instead of one forward pass a student and step; it pays
from two students on, while the disk can spare it. Exact answers give each student the same losses
to the last bit (on the same machine with the same number of threads); coarse ones are another loss
and so another trial, chosen by name only. Hidden states are not stored: who learns from them needs
the teacher itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from orchestrator.settings import DistillationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training.job import TrainingJob
from orchestrator.training.teacher_cache import (
    Answer,
    Answers,
    CachePlan,
    bytes_to_write,
    find_cache_damage,
    write_cache,
)
from orchestrator.training.teacher_outputs import cache_plan, teacher_answers, teaching_steps
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import delete_folder

LARGEST_BYTES = 2 << 30
"""`auto` stores no more than this."""
LARGEST_SHARE_OF_DISK = 0.1
"""`auto` takes no more than this share of the free disk."""
FEWEST_STUDENTS = 2
"""`auto` stores nothing for fewer."""
_KEPT_NAME = "kept"
"""File in the folder of answers that were asked for by name, which `auto` does not delete."""
_WHY_LIVE = "distillation.hidden_weight needs its hidden states, which are not stored"


def store_teacher_outputs(
    jobs: Sequence[TrainingJob],
    settings: DistillationSettings,
    parent: Path,
    *,
    on_gpu: bool = False,
    progress: Progress | None = None,
) -> list[TrainingJob]:
    """Store what the teacher of several jobs says, if that pays, and have the jobs read it.

    Args:
        jobs: Those that will run; ones without a teacher come back as they are.
        settings: `teacher_cache` says whether to store.
        parent: Folder of all caches.
        on_gpu: Whether the jobs run on GPUs; what is stored is then computed on one, too, if this
            process sees any.
        progress: Told what was chosen and why, and how far the storing is.

    Returns:
        The jobs in their order; `teacher_cache` is set in those that read.

    Raises:
        UserError: If the settings ask for a cache that is impossible.
        RunFailed: If the disk filled up meanwhile.
    """
    progress = progress or Progress()
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    found: dict[str, Path] = {}
    plans = [cache_plan(job) for job in jobs]
    if settings.hidden_weight and any(job.objective == "distill" for job in jobs):
        check_teacher_cache(settings)
        if settings.teacher_cache == "auto":
            progress.note(f"the teacher runs in each trial: {_WHY_LIVE}")
    room = _Room(settings.teacher_cache, parent)
    for plan in {p.key: p for p in plans if p}.values():
        students = [job for job, p in zip(jobs, plans, strict=True) if p and p.key == plan.key]
        is_stored, why = room.choice(plan, len(students))
        if why:
            progress.note(why)
        if is_stored:
            folder = _stored(plan, students[0], parent, device, progress)
            found[plan.key] = folder
            if settings.teacher_cache != "auto":
                (folder / _KEPT_NAME).touch()
    return [
        replace(job, teacher_cache=str(found[plan.key])) if plan and plan.key in found else job
        for job, plan in zip(jobs, plans, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """What the teachers of some jobs have yet to do."""

    num_tokens: int
    """Tokens that they will read."""
    num_stored_tokens: int
    """Those of them whose answers will be stored, each once."""
    num_bytes: int
    """Of these answers."""


def estimate_teacher_work(
    jobs: Sequence[TrainingJob],
    settings: DistillationSettings,
    parent: Path,
    *,
    steps_done: Sequence[int] | None = None,
) -> TeacherWork:
    """Return what teachers will do for these jobs: read once for all of those that share what is
    stored, and not at all where it is there.

    Args:
        jobs: Those that will run.
        settings: `teacher_cache` says whether to store.
        parent: Folder of all caches.
        steps_done: Of each job, steps after which it goes on; none are done when unset. A teacher
            that is asked live needs not read those again, and one that is stored reads all.
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
    room = _Room(settings.teacher_cache, parent)
    for plan, left in students.values():
        is_stored, _ = room.choice(plan, len(left))
        if not is_stored:
            num_tokens += sum(left)
        elif find_cache_damage(parent / plan.key, plan, read=False) is not None:
            num_stored += plan.num_rows * plan.context_length
            num_bytes += bytes_to_write(plan, parent)
    return TeacherWork(
        num_tokens=num_tokens + num_stored, num_stored_tokens=num_stored, num_bytes=num_bytes
    )


def check_teacher_cache(settings: DistillationSettings) -> None:
    """Refuse to store a teacher's answers where its hidden states are asked for, too.

    Raises:
        UserError: If `teacher_cache` asks for that.
    """
    if settings.hidden_weight and settings.teacher_cache in ("exact", "top_k"):
        raise UserError(
            f"distillation.teacher_cache={settings.teacher_cache} cannot be: {_WHY_LIVE}; "
            "set it to live, or hidden_weight to 0"
        )


def delete_teacher_caches(jobs: Sequence[TrainingJob], settings: DistillationSettings) -> None:
    """Delete the stored answers that finished jobs have read, if nobody but `auto` chose to store
    them.

    Who reads them at this moment goes on reading; who comes later asks the teacher itself.
    """
    if settings.teacher_cache == "auto":
        for folder in {Path(job.teacher_cache) for job in jobs if job.teacher_cache}:
            if not (folder / _KEPT_NAME).exists():
                with suppress(OSError):
                    delete_folder(folder)


class _Room:
    """Decides about one cache after another, and remembers what those before will take."""

    def __init__(self, mode: str, parent: Path) -> None:
        self.mode, self.parent = mode, parent
        # Once: of what is written between two choices the disk would tell again.
        self._free, self._promised = _free_bytes(parent), 0

    def choice(self, plan: CachePlan, num_students: int) -> tuple[bool, str]:
        """Return whether to store, and the sentence for the user."""
        mode = self.mode
        if mode == "live":
            return False, ""
        size, needed = plan.num_bytes, bytes_to_write(plan, self.parent)
        free = self._free - self._promised
        is_there = find_cache_damage(self.parent / plan.key, plan, read=False) is None
        if is_there or mode != "auto":
            if not is_there and needed > free:
                raise UserError(
                    f"distillation.teacher_cache={mode} needs {_readable(needed)}, and "
                    f"{self.parent} has {_readable(free)} free; set it to live, or shorten "
                    "distillation.training"
                )
            self._promised += 0 if is_there else needed
            asked = "" if mode == "auto" else f", as distillation.teacher_cache={mode} asks"
            state = "are there already" if is_there else "are stored once"
            return True, f"the teacher's answers {state} ({_readable(size)}){asked}"
        if num_students < FEWEST_STUDENTS:
            return False, f"the teacher runs in each trial: {num_students} waits for it"
        limit = min(LARGEST_BYTES - self._promised, int(LARGEST_SHARE_OF_DISK * free))
        if needed > limit:
            return False, (
                f"the teacher runs in each trial: its answers would take {_readable(needed)}, "
                f"more than {_readable(max(limit, 0))} (the smaller of {_readable(LARGEST_BYTES)} "
                f"for all that a sweep stores and {LARGEST_SHARE_OF_DISK:.0%} of the free disk)"
            )
        self._promised += needed
        return (
            True,
            f"the teacher's answers are stored once ({_readable(size)}) for {num_students} trials",
        )


def _stored(
    plan: CachePlan, job: TrainingJob, parent: Path, device: str, progress: Progress
) -> Path:
    progress.start("teacher", plan.num_steps)
    try:
        folder = write_cache(plan, parent, _when_asked(job, device), progress=progress)
    except OSError as error:
        raise RunFailed(
            f"cannot store the teacher's answers in {parent} ({error.strerror or error}); "
            "free some disk, or set distillation.teacher_cache=live"
        ) from None
    if device != "cpu":
        torch.cuda.empty_cache()  # The trials come to the same GPU.
    num_tokens = plan.num_rows * plan.context_length
    progress.finish(f"answers about {num_tokens:,} tokens, {_readable(plan.num_bytes)}")
    return folder


def _when_asked(job: TrainingJob, device: str) -> Answers:
    """Load the teacher at the first question: a whole cache asks none."""
    loaded: list[Answers] = []

    def answers(number: int) -> tuple[torch.Tensor, Answer]:
        if not loaded:
            loaded.append(teacher_answers(job, device=device))
        return loaded[0](number)

    return answers


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _readable(num_bytes: int) -> str:
    amount, unit = (num_bytes / 1e9, "GB") if num_bytes >= 1e9 else (num_bytes / 1e6, "MB")
    return f"{amount:.3g} {unit}"
