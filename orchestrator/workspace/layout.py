"""The workspace: one folder with tokens, runs, trials, sweeps, the MLflow store and the logs.

All names of folders and files that several packages read are here, so that a listing of the
workspace imports no PyTorch and a help text nothing; no other module invents paths in it. A
workspace can be moved and copied: what lies in it is stored relative to its root. One that was
written by another version of the program is refused.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, resolve_path, write_json
from orchestrator.workspace.provenance import RECIPE_VERSION

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
WORKSPACE_FILE_NAME = "workspace.json"
"""The file in the root of every workspace; it holds the version that wrote the workspace."""
RECORD_VERSION = 5
"""Raise it when stored records get other fields, or weights other names; the recipe's version would
change what is trained, because data and seeds depend on it."""
OWN_VERSION = {"recipe_version": RECIPE_VERSION, "record_version": RECORD_VERSION}
MAX_NAME_BYTES = 200
"""File systems allow 255; temporary names are a little longer than the name."""

JOB_NAME = "job.json"
"""What a training in this folder is."""
DONE_NAME = "done.json"
"""How a training ended that is finished."""
RUN_LOCK_NAME = "trial.lock"
"""Locked by the command that trains or measures in a folder; trials that measure other tasks on the
same weights share it."""
SWEEP_LOCK_NAME = "sweep.lock"
"""Locked by the command that runs the sweep of this folder."""
WORKERS_LOCK_NAME = "lock"
"""Locked by the process that trains in a folder; workers outlive a killed command by seconds."""
PROVENANCE = "provenance.json"
"""Origin and checksums of a checkpoint."""
RAY_FOLDER = "ray"
"""Ray Train's own files of a run; deleted at its end."""
PROFILE_NAME = "profile"
"""Folder of the profiler's files in a run's folder."""
STOPPED_NAME = "stopped-early.json"
"""Why a trial was stopped early."""
PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"
"""Plan and results of a sweep."""
SOURCES_NAME = "sources"
"""Folder in `tokens/` with two files for each source's key: the name of its data, and a lock."""
CORPUS_LOCK_SUFFIX = ".lock"
"""Ends the name of a source's lock, which a process holds while it prepares the data."""
TEMPORARY_PREFIX = ".writing-"
"""Begins the name of a folder of tokens that is not complete yet."""
CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")

Kind = Literal["runs", "checkpoints", "trials", "sweeps", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What `list` lists."""


class RemovableKind(StrEnum):
    """What `clean` looks for."""

    TEMPORARY = "temporary"
    RAY = "ray"
    CHECKPOINTS = "checkpoints"
    DAMAGED = "damaged"


class Workspace:
    """Absolute paths of the folders in a workspace."""

    def __init__(self, root: Path, *, is_writable: bool = True) -> None:
        self.root = root
        self.is_writable = is_writable
        # One folder per fingerprint of the data.
        self.tokens = root / "tokens"
        # One folder per name.
        self.runs = root / "runs"
        self.sweeps = root / "sweeps"
        self.exports = root / "exports"
        # One folder per content key.
        self.trials = root / "trials"
        # One folder per set of sweeps: reports on one front.
        self.overlays = root / "overlays"
        # One file per content key: task results; costs of models under given conditions.
        self.evaluations = root / "evaluations"
        self.benchmarks = root / "benchmarks"
        # One file per run: what MLflow shows of it; those of trials in a folder per sweep.
        self.tracked = root / "tracked"
        # The model that `pick` chose last.
        self.picked = root / "picked.json"
        # MLflow's.
        self.database = root / "mlflow.db"
        self.artifacts = root / "artifacts"
        self.logs = root / "logs"

    @property
    def is_made(self) -> bool:
        """Whether a command has made the workspace, whose own file may be lost."""
        marks = (self.root / WORKSPACE_FILE_NAME, self.tokens, self.runs, self.trials)
        return any(path.exists() for path in marks)

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: `MLFLOW_TRACKING_URI`, or a sqlite file in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.database}"


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace (default: `IIET_WORKSPACE`, else `./iiet-workspace`), not opened yet."""
    return Workspace(resolve_path(path or os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME))


def find_workspace(path: Workspace | Path | str | None = None) -> Workspace:
    """Return the workspace like `locate_workspace`, to plan in it; a missing one is not made.

    Raises:
        UserError: If it is of another version, or no folder.
    """
    if isinstance(path, Workspace):
        return path
    workspace = locate_workspace(Path(path) if path else None)
    root = workspace.root
    remedy = "choose another with --workspace"
    if root.exists() and not root.is_dir():
        problem = os.strerror(errno.ENOTDIR)
        raise UserError(f"cannot use the workspace {root} ({problem}); {remedy}")
    if read_json(root / WORKSPACE_FILE_NAME) not in (None, OWN_VERSION):
        raise UserError(
            f"the workspace {root} is of another version of this program, which this version "
            f"cannot read; nothing was changed; {remedy}"
        )
    return workspace


def open_workspace(path: Path | None = None, *, must_write: bool = True) -> Workspace:
    """Return the workspace like `find_workspace`, made if it is missing.

    Unless the caller must write, a workspace that this user may only read is opened, too; its
    `is_writable` is then False.

    Raises:
        UserError: If the folder cannot be made or written, or is of another version.
    """
    try:
        workspace = find_workspace(path)
        root = workspace.root
        root.mkdir(parents=True, exist_ok=True)
        # The folder's mode would not tell: access lists, and a read-only mount, decide, too.
        probe = root / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
        if not (root / WORKSPACE_FILE_NAME).exists():
            write_json(root / WORKSPACE_FILE_NAME, OWN_VERSION)
    except OSError as error:
        root = locate_workspace(path).root
        may_only_read = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not must_write and root.is_dir() and may_only_read:
            return Workspace(root, is_writable=False)
        raise UserError(
            f"cannot use the workspace {root} ({error.strerror}); choose another with --workspace"
        ) from None
    return workspace


@contextmanager
def unmade_by_mistakes(workspace: Workspace) -> Iterator[bool]:
    """Delete the file and the logs of a new workspace if the block raises a `UserError`.

    So a mistyped path makes no workspace. If the block stored results, the workspace stays.
    Yields whether the folder holds other files, but no workspace.
    """
    root = workspace.root
    was_folder = root.is_dir()
    paths_before = {*root.iterdir()} if was_folder else set()
    try:
        yield bool(paths_before) and not workspace.is_made
    except UserError:
        new_paths = {*root.iterdir()} - paths_before if root.is_dir() else set()
        marker = root / WORKSPACE_FILE_NAME
        if marker in new_paths and new_paths <= {marker, root / "logs"}:
            for path in new_paths:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            if not was_folder:
                root.rmdir()
        raise


# Names that a user chooses


def is_valid_name(text: Any) -> bool:
    """Return whether a value can be the name of a folder, and no path to another place."""
    is_plain = isinstance(text, str) and re.fullmatch(r"\w[\w .,+=-]*", text) is not None
    return is_plain and len(text.encode()) <= MAX_NAME_BYTES


def check_name(name: Any, source: str) -> str:
    """Return the name of a run or sweep, which is also the name of its folder.

    Raises:
        UserError: If it is not a valid name; begins with `source`, such as an option.
    """
    if not is_valid_name(name):
        raise UserError(
            f"{source} {name!r}: a name has letters, digits, spaces and . , + = - _, begins with a "
            f"letter or a digit, and takes at most {MAX_NAME_BYTES} bytes"
        )
    return str(name)


def check_name_option(name: str | None) -> str | None:
    """Check the value of an option `--name` like `check_name`; None stays None."""
    return None if name is None else check_name(name, "--name")


# Checkpoints of a run


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("_")[2])


def find_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, unchecked."""
    folders = run_folder.glob("step_*")
    checkpoints = [folder for folder in folders if CHECKPOINT_NAME.fullmatch(folder.name)]
    return sorted(checkpoints, key=step_of)


# Paths in stored files are relative to the workspace's root, those outside of it as they are. In
# memory all are absolute.


def workspace_root(path: Path) -> Path | None:
    """Return the root of the workspace that a path lies in; None if it lies in none."""
    folders = (path, *path.parents)
    return next((folder for folder in folders if (folder / WORKSPACE_FILE_NAME).is_file()), None)


def portable_path(path: str, root: Path | None) -> str:
    """Return the form in which a path is stored: relative if it is absolute and below the root."""
    prefix = f"{root}/"
    return path.removeprefix(prefix) if root and path != prefix else path


def absolute_path(path: str, root: Path | None) -> str:
    """Return the absolute form of a stored path; an empty one stays empty."""
    # Without `Path`: a listing of thousands of trials asks for tens of thousands.
    return f"{root}/{path}" if root and path and not path.startswith("/") else path
