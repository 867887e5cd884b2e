"""Delete what a workspace no longer needs.

PyTorch is imported only to look into checkpoints. Finished weights, what evaluations refer to, and
what a process holds are never found. Before something is deleted its lock is taken, and it is
looked for again.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from orchestrator.pipelines.listing import (
    Note,
    folders_in,
    noted_once,
    run_locks,
    show_status,
    size_of,
    training_folders,
)
from orchestrator.pipelines.result import Result
from orchestrator.terminal.render import format_bytes, format_count
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import abandoned_folders, delete_folder, leftovers, read_json
from orchestrator.workspace.layout import (
    DONE_NAME,
    JOB_NAME,
    PLAN_FILE,
    RAY_FOLDER,
    RESULTS_FILE,
    TEMPORARY_PREFIX,
    RemovableKind,
    Workspace,
    checkpoint_name,
    find_checkpoints,
)
from orchestrator.workspace.locks import is_locked, lock_file

SECONDS_OF_WRITING = 3600.0
"""A file is not written for longer; an older temporary one was left by a killed process."""
Found = Iterator[tuple[Any, ...]]
"""Path, reason, and the files to lock while it is deleted."""


class Removable(Result):
    """Something that can be deleted."""

    kind: RemovableKind
    path: Path
    bytes: int
    """Disk space that it frees: a file that has another link frees none."""
    reason: str
    """Why it can go, and what it costs if it is needed again."""
    locks: tuple[Path, ...] = Field(default=(), exclude=True)
    """Files to lock while it is deleted."""


class CleanPlan(Result):
    """What can go."""

    root: Path = Field(exclude=True)
    found: tuple[Removable, ...]
    deleted: tuple[Removable, ...] = ()

    @property
    def size(self) -> str:
        """The disk space that all of it takes."""
        return format_bytes(sum(item.bytes for item in self.found))

    def shown(self) -> Iterable[str]:
        """Return a line for each kind, and one for each item."""
        if not self.found:
            yield f"nothing to delete in {self.root}"
        for kind, items in groupby(self.found, key=lambda item: item.kind):
            group = list(items)
            size = format_bytes(sum(item.bytes for item in group))
            yield f"{kind}: {format_count(len(group), 'item')}, {size}"
            for item in group:
                inside = item.path.is_relative_to(self.root)
                name = item.path.relative_to(self.root) if inside else item.path
                yield f"  {name}, {format_bytes(item.bytes)}: {item.reason}"


class CleanResult(CleanPlan):
    """What could go, and what is deleted."""

    def shown(self) -> Iterable[str]:
        """Return how much is deleted; `CleanPlan` shows what."""
        freed = format_bytes(sum(item.bytes for item in self.deleted))
        yield f"deleted {len(self.deleted)} of {len(self.found)}: {freed}"


def plan_clean(
    workspace: Workspace,
    kinds: Sequence[RemovableKind] = (),
    *,
    note: Note = lambda _: None,
) -> CleanPlan:
    """Return what can go, by kind (default: all kinds) and path; nothing is written.

    `note` is called with a sentence for each damaged file for which checkpoints are kept.
    """
    note, order = noted_once(note), tuple(RemovableKind)
    found = []
    for kind in kinds or order:
        for path, reason, *locks in _FINDERS[kind](workspace, note):
            size = size_of(path, links=False)
            found.append(
                Removable(kind=kind, path=path, bytes=size, reason=reason, locks=tuple(locks))
            )
    paths: dict[Path, Removable] = {}
    for item in sorted(found, key=lambda item: (order.index(item.kind), item.path)):
        # A damaged checkpoint may also be one that a finished run no longer needs.
        if not paths.keys() & {item.path, *item.path.parents}:
            paths[item.path] = item
    return CleanPlan(root=workspace.root, found=tuple(paths.values()))


def run_clean(plan: CleanPlan, workspace: Workspace) -> CleanResult:
    """Delete what can still go: it is looked for again; what a process has taken stays."""
    kinds = tuple(dict.fromkeys(item.kind for item in plan.found))
    still = {item.path for item in plan_clean(workspace, kinds).found} if kinds else set()
    deleted = tuple(item for item in plan.found if item.path in still and _delete(item))
    return CleanResult(root=plan.root, found=plan.found, deleted=deleted)


def _delete(item: Removable) -> bool:
    with ExitStack() as stack:
        for path in item.locks:
            if not stack.enter_context(lock_file(path, seconds=0.0)):
                return False
        with suppress(OSError):
            if not item.path.is_dir():
                item.path.unlink()
            elif item.kind in (RemovableKind.TEMPORARY, RemovableKind.RAY):
                shutil.rmtree(item.path)
            else:
                delete_folder(item.path)  # For readers it is gone at once.
            return True
    return False


def _temporary(workspace: Workspace, _: Note) -> Found:
    for folder in leftovers(workspace.root, below=True):
        yield folder, "half-written or half-deleted by a process that ended"
    for file in workspace.root.rglob(".*.tmp"):
        if file.is_file() and time.time() - file.stat().st_mtime > SECONDS_OF_WRITING:
            yield file, "half-written by a process that ended"
    places = ((workspace.tokens, "tokens"), (workspace.teachers, "teacher outputs"))
    for parent, what in places:
        for folder in parent.glob(f"{TEMPORARY_PREFIX}*"):
            key = folder.name.removeprefix(TEMPORARY_PREFIX)
            lock = parent / (".lock" if parent == workspace.tokens else f".{key}.lock")
            if not is_locked(lock):
                yield folder, f"{what} of an interrupted command, which would resume there", lock


def _ray_files(workspace: Workspace, _: Note) -> Found:
    for folder in abandoned_folders():
        yield folder, "Ray's temporary files of a command that ended"
    for folder in workspace.sweeps.glob(f"*/{RAY_FOLDER}-*"):
        if not _has_driver(folder):
            yield folder, "Ray Tune's files of a command that ended"
    for run in training_folders(workspace):
        folder = run / RAY_FOLDER
        if folder.is_dir() and not _is_in_use(run):
            yield folder, "Ray Train's files of a command that ended", *run_locks(run)


def _teachers(workspace: Workspace, _: Note) -> Found:
    for folder in _unused(workspace, workspace.teachers):
        reason = "teacher outputs for distillation; they are computed again when needed"
        yield folder, reason, folder.with_name(f".{folder.name}.lock")


def _first_stages(workspace: Workspace, _: Note) -> Found:
    for folder in _unused(workspace, workspace.first_stages):
        yield folder, "steps that models of one recipe share; another such model trains them again"


def _checkpoints(workspace: Workspace, note: Note) -> Found:
    needed: set[Path] = set()
    for pattern in (JOB_NAME, "result-*.json", PLAN_FILE, RESULTS_FILE):
        for file in workspace.root.glob(f"*/*/{pattern}"):
            try:
                stored = read_json(file, remedy="all checkpoints are kept")
            except UserError as error:  # It may have named any of them.
                note(str(error))
                return
            text = json.dumps(stored, ensure_ascii=False)
            names = re.findall(r'"([^"]+/step_\d{8,})"', text)
            needed |= {workspace.root / name for name in names}
    for folder in training_folders(workspace):
        checkpoints = find_checkpoints(folder)
        if _is_in_use(folder) or len(checkpoints) < 2:
            continue
        try:
            kept = _kept_checkpoints(folder)
        except UserError as error:
            note(f"the checkpoints in {folder} are kept: {error}")
            continue
        for checkpoint in checkpoints if kept else ():
            measured = any(checkpoint.glob("influence-*.json"))
            if checkpoint not in kept | needed and not measured:
                reason = "intermediate checkpoint of a finished training"
                yield checkpoint, reason, *run_locks(folder)


def _kept_checkpoints(folder: Path) -> set[Path]:
    """Return those of a finished training: the last, the best, and the one to continue from."""
    from orchestrator.records.training import TrainingJob
    from orchestrator.training.checkpoint import best_checkpoint
    from orchestrator.training.job import finished_outcome
    from orchestrator.training.schedules import stable_steps

    stored = read_json(folder / JOB_NAME)
    if stored is None:
        if (folder / DONE_NAME).exists():
            raise UserError(f"{folder / JOB_NAME} is missing")
        return set()
    job = TrainingJob.parse(stored.get("job", {}), folder / JOB_NAME)
    outcome = finished_outcome(job.model_copy(update={"run_folder": str(folder)}))
    if outcome is None or not outcome.finished:
        return set()
    stable = folder / checkpoint_name(stable_steps(job.recipe))
    return {Path(str(outcome.checkpoint)), best_checkpoint(folder) or stable, stable}


def _damaged(workspace: Workspace, _: Note) -> Found:
    from orchestrator.models.folder import check_checkpoint

    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder) if not _is_in_use(folder) else ():
            try:
                check_checkpoint(checkpoint)
            except UserError as error:
                reason = str(error).removeprefix(f"the checkpoint {checkpoint} ")
                yield checkpoint, reason, *run_locks(folder)
    for parent in (workspace.evaluations, workspace.benchmarks, workspace.tracked):
        for file in sorted(parent.rglob("*.json")):
            try:
                read_json(file, remedy="it is measured again")
            except UserError as error:
                yield file, str(error).removeprefix(f"{file} ")


_FINDERS: dict[RemovableKind, Callable[[Workspace, Note], Found]] = {
    RemovableKind.TEMPORARY: _temporary,
    RemovableKind.RAY: _ray_files,
    RemovableKind.TEACHERS: _teachers,
    RemovableKind.FIRST_STAGES: _first_stages,
    RemovableKind.CHECKPOINTS: _checkpoints,
    RemovableKind.DAMAGED: _damaged,
}


def _has_driver(folder: Path) -> bool:
    """Return whether the command of a sweep's Ray folder may still run."""
    process = folder.name.removeprefix(f"{RAY_FOLDER}-{socket.gethostname()}-")
    return not process.isdecimal() or psutil.pid_exists(int(process))


def _unused(workspace: Workspace, parent: Path) -> list[Path]:
    """Return the folders in `parent`, which any command may read; none while one runs."""
    folders = folders_in(parent)
    if not folders or show_status(workspace).activities:
        return []
    # A sweep between two trials holds no lock.
    drivers = map(_has_driver, workspace.sweeps.glob(f"*/{RAY_FOLDER}-*"))
    return [] if any(drivers) else folders


def _is_in_use(run: Path) -> bool:
    return any(map(is_locked, run_locks(run)))
