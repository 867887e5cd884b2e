"""Find and delete what a workspace, and this machine's temporary folder, no longer need.

Finished weights, what evaluations refer to, and what a process holds are never found. Before
something is deleted its lock is taken, and it is looked for again.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.records.training import TrainingJob
from orchestrator.training.checkpoint import check_checkpoint
from orchestrator.training.checkpoint_writer import best_checkpoint
from orchestrator.training.job import finished_outcome
from orchestrator.training.learning_rate import stable_steps
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
from orchestrator.workspace.read_only import read_only
from orchestrator.workspace.status import (
    Note,
    folders_in,
    read_status,
    run_locks,
    size_of,
    training_folders,
)

KINDS: tuple[RemovableKind, ...] = tuple(RemovableKind)
SECONDS_OF_WRITING = 3600.0
"""A file is not written for longer; an older temporary one was left by a killed process."""


_WITHOUT_READERS = (RemovableKind.TEMPORARY, RemovableKind.RAY)
"""Folders of these kinds have no readers."""


@dataclass(frozen=True, kw_only=True)
class Removable:
    """Something that can be deleted."""

    kind: RemovableKind
    path: Path
    num_bytes: int
    """Disk space that it frees: a file that has another link frees none."""
    reason: str
    """Why it can go, and what it costs if it is needed again."""
    locks: tuple[Path, ...] = ()
    """Files to lock while it is deleted."""


def find_removable(
    workspace: Workspace,
    kinds: Sequence[RemovableKind] = KINDS,
    note: Note = lambda _: None,
) -> list[Removable]:
    """Return what can go, by kind and path; nothing is written.

    `note` is called with a sentence for each damaged file for which checkpoints are kept.
    """
    with read_only():
        found = [item for kind in kinds for item in _FINDERS[kind](workspace, note)]
    paths: dict[Path, Removable] = {}
    for item in sorted(found, key=lambda item: (KINDS.index(item.kind), item.path)):
        # A damaged checkpoint may also be one that a finished run no longer needs.
        if not paths.keys() & {item.path, *item.path.parents}:
            paths[item.path] = item
    return list(paths.values())


def delete_removable(workspace: Workspace, items: Sequence[Removable]) -> list[Removable]:
    """Delete what can still go, and return it; what a process has taken meanwhile stays."""
    kinds = tuple(dict.fromkeys(item.kind for item in items))
    still = {item.path for item in find_removable(workspace, kinds)} if items else set()
    return [item for item in items if item.path in still and _delete(item)]


def _delete(item: Removable) -> bool:
    with ExitStack() as stack:
        for path in item.locks:
            if not stack.enter_context(lock_file(path, seconds=0.0)):
                return False
        with suppress(OSError):
            if item.path.is_dir() and item.kind not in _WITHOUT_READERS:
                delete_folder(item.path)  # For readers it is gone at once.
            elif item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink()
            return True
    return False


def _temporary(workspace: Workspace, _: Note) -> Iterator[Removable]:
    for folder in leftovers(workspace.root, below=True):
        yield _item(
            RemovableKind.TEMPORARY, folder, "half-written or half-deleted by a process that ended"
        )
    for file in workspace.root.rglob(".*.tmp"):
        if file.is_file() and time.time() - file.stat().st_mtime > SECONDS_OF_WRITING:
            yield _item(RemovableKind.TEMPORARY, file, "half-written by a process that ended")
    places = ((workspace.tokens, "tokens"), (workspace.teachers, "teacher outputs"))
    for parent, what in places:
        for folder in parent.glob(f"{TEMPORARY_PREFIX}*"):
            key = folder.name.removeprefix(TEMPORARY_PREFIX)
            lock = parent / (".lock" if parent == workspace.tokens else f".{key}.lock")
            if not is_locked(lock):
                reason = f"{what} of an interrupted command, which would resume there"
                yield _item(RemovableKind.TEMPORARY, folder, reason, lock)


def _ray(workspace: Workspace, _: Note) -> Iterator[Removable]:
    for folder in abandoned_folders():
        yield _item(RemovableKind.RAY, folder, "Ray's temporary files of a command that ended")
    for folder in workspace.sweeps.glob(f"*/{RAY_FOLDER}-*"):
        if not _has_driver(folder):
            yield _item(RemovableKind.RAY, folder, "Ray Tune's files of a command that ended")
    for run in training_folders(workspace):
        folder = run / RAY_FOLDER
        if folder.is_dir() and not _is_in_use(run):
            yield _item(
                RemovableKind.RAY,
                folder,
                "Ray Train's files of a command that ended",
                *run_locks(run),
            )


def _teachers(workspace: Workspace, _: Note) -> Iterator[Removable]:
    reason = "teacher outputs for distillation; they are computed again when needed"
    for folder in _unused(workspace, workspace.teachers):
        lock = folder.with_name(f".{folder.name}.lock")
        yield _item(RemovableKind.TEACHERS, folder, reason, lock)


def _first_stages(workspace: Workspace, _: Note) -> Iterator[Removable]:
    reason = "steps that models of one recipe share; another such model trains them again"
    for folder in _unused(workspace, workspace.first_stages):
        yield _item(RemovableKind.FIRST_STAGES, folder, reason)


def _checkpoints(workspace: Workspace, note: Note) -> Iterator[Removable]:
    try:
        needed = _named_checkpoints(workspace)
    except UserError as error:
        note(str(error))
        return
    for folder in training_folders(workspace):
        if _is_in_use(folder) or len(find_checkpoints(folder)) < 2:
            continue
        try:
            kept = _kept_checkpoints(folder)
        except UserError as error:
            note(f"the checkpoints in {folder} are kept: {error}")
            continue
        for checkpoint in find_checkpoints(folder) if kept else ():
            measured = any(checkpoint.glob("influence-*.json"))
            if checkpoint not in kept and checkpoint not in needed and not measured:
                reason = "intermediate checkpoint of a finished training"
                yield _item(RemovableKind.CHECKPOINTS, checkpoint, reason, *run_locks(folder))


def _kept_checkpoints(folder: Path) -> set[Path | None]:
    # Of a finished training: the last, the best, and the one that `--continue` starts from.
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
    return {Path(str(outcome.checkpoint)), best_checkpoint(folder), stable}


def _named_checkpoints(workspace: Workspace) -> set[Path]:
    """Return the checkpoints that a stored plan, training or result names.

    Raises:
        UserError: If one is damaged; it may have named others.
    """
    found: set[Path] = set()
    for name in (JOB_NAME, "result-*.json", PLAN_FILE, RESULTS_FILE):
        for file in workspace.root.glob(f"*/*/{name}"):
            stored = read_json(file, remedy="all checkpoints are kept")
            text = json.dumps(stored, ensure_ascii=False)
            names = re.findall(r'"([^"]+/step_\d{8,})"', text)
            found |= {workspace.root / name for name in names}
    return found


def _damaged(workspace: Workspace, _: Note) -> Iterator[Removable]:
    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder) if not _is_in_use(folder) else ():
            try:
                check_checkpoint(checkpoint)
            except UserError as error:
                reason = str(error).removeprefix(f"the checkpoint {checkpoint} ")
                yield _item(RemovableKind.DAMAGED, checkpoint, reason, *run_locks(folder))
    for parent in (workspace.evaluations, workspace.benchmarks, workspace.measurements):
        for file in sorted(parent.glob("*.json")):
            try:
                read_json(file, remedy="it is measured again")
            except UserError as error:
                yield _item(RemovableKind.DAMAGED, file, str(error).removeprefix(f"{file} "))


_FINDERS: Mapping[RemovableKind, Callable[[Workspace, Note], Iterator[Removable]]] = {
    RemovableKind.TEMPORARY: _temporary,
    RemovableKind.RAY: _ray,
    RemovableKind.TEACHERS: _teachers,
    RemovableKind.FIRST_STAGES: _first_stages,
    RemovableKind.CHECKPOINTS: _checkpoints,
    RemovableKind.DAMAGED: _damaged,
}


def _item(kind: RemovableKind, path: Path, reason: str, *locks: Path) -> Removable:
    freed = size_of(path, links=False)
    return Removable(kind=kind, path=path, num_bytes=freed, reason=reason, locks=locks)


def _has_driver(folder: Path) -> bool:
    """Return whether the command of a sweep's Ray folder may still run."""
    prefix = f"{RAY_FOLDER}-{socket.gethostname()}-"
    process = folder.name.removeprefix(prefix)
    return not process.isdecimal() or psutil.pid_exists(int(process))


def _unused(workspace: Workspace, parent: Path) -> list[Path]:
    """Return the folders in `parent`, which any command may read; none while one runs."""
    folders = folders_in(parent)
    return folders if folders and _is_quiet(workspace) else []


def _is_quiet(workspace: Workspace) -> bool:
    # A sweep between two trials holds no lock.
    drivers = map(_has_driver, workspace.sweeps.glob(f"*/{RAY_FOLDER}-*"))
    return not read_status(workspace).activities and not any(drivers)


def _is_in_use(run: Path) -> bool:
    return any(map(is_locked, run_locks(run)))


def to_json(item: Removable) -> dict[str, Any]:
    """Return the JSON values of `clean --json`."""
    names = {"kind": item.kind, "path": str(item.path)}
    return {**names, "bytes": item.num_bytes, "reason": item.reason}
