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
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.workspace.errors import UserError, quoted
from orchestrator.workspace.files import read_json, resolve_path, write_json
from orchestrator.workspace.provenance import RECIPE_VERSION
from orchestrator.workspace.read_only import is_read_only

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
WORKSPACE_FILE_NAME = "workspace.json"
"""The file in the root of every workspace; it holds the version that wrote the workspace."""
MAX_NAME_BYTES = 200
"""File systems allow 255; temporary names are a little longer than the name."""

JOB_NAME = "job.json"
"""What a training in this folder is."""
DONE_NAME = "done.json"
"""How a training ended that is finished."""
RUN_LOCK_NAME = "trial.lock"
"""Locked by the command that trains or measures in a folder; trials that measure other tasks on the
same weights share it."""
WORKERS_LOCK_NAME = "lock"
"""Locked by the process that trains in a folder; workers outlive a killed command by seconds."""
BEST = "best.json"
"""Names the checkpoint with the lowest validation loss."""
PROVENANCE = "provenance.json"
"""Origin and checksums of a checkpoint."""
RAY_FOLDER = "ray"
"""Ray Train's own files of a run; deleted at its end."""
STOPPED_NAME = "stopped-early.json"
"""Why a trial was stopped early."""
PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"
"""Plan and results of a sweep."""
OUTBOX_NAME = "tracking-outbox.jsonl"
"""Records that MLflow has not received."""
TEMPORARY_PREFIX = ".writing-"
"""Begins the name of a folder of tokens or teacher outputs that is not complete yet."""
CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")

Kind = Literal["runs", "checkpoints", "trials", "sweeps", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What `list` lists."""


class RemovableKind(StrEnum):
    """What `clean` looks for."""

    TEMPORARY = "temporary"
    RAY = "ray"
    TEACHERS = "teachers"
    FIRST_STAGES = "first-stages"
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
        # One folder per content key: trials, first stages that trainings share, teacher caches.
        self.trials = root / "trials"
        self.first_stages = root / "first_stages"
        self.teachers = root / "teachers"
        # One folder per set of sweeps: reports on one front.
        self.overlays = root / "overlays"
        # One file per content key: task results; costs of models under given conditions.
        self.evaluations = root / "evaluations"
        self.benchmarks = root / "benchmarks"
        # One file per run of an evaluation, benchmark or influence: what MLflow shows of it.
        self.measurements = root / "measurements"
        # The model that `pick` chose last.
        self.picked = root / "picked.json"
        # MLflow's.
        self.database = root / "mlflow.db"
        self.artifacts = root / "artifacts"
        self.logs = root / "logs"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: `MLFLOW_TRACKING_URI`, or a sqlite file in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.database}"


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace (default: `IIET_WORKSPACE`, else `./iiet-workspace`), not opened yet."""
    return Workspace(resolve_path(path or os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME))


def open_workspace(path: Path | None = None, *, must_write: bool = True) -> Workspace:
    """Return the workspace like `locate_workspace`; made if missing, not in a `read_only` block.

    Unless the caller must write, a workspace that this user may only read is opened, too; its
    `is_writable` is then False.

    Raises:
        UserError: If the folder cannot be made or written, or is of another version.
    """
    workspace = locate_workspace(path)
    root, remedy = workspace.root, "choose another with --workspace"
    file, probe = root / WORKSPACE_FILE_NAME, root / f".write-test-{os.getpid()}"
    own_version = {"recipe_version": RECIPE_VERSION}
    try:
        if root.exists() and not root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        version = read_json(file, remedy=remedy)
        if version not in (None, own_version):
            raise UserError(
                f"the workspace {root} is of another version of this program, which this version "
                f"cannot read; nothing was changed; {remedy}"
            )
        if is_read_only():
            return workspace
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if version is None:
            write_json(file, own_version)
    except OSError as error:
        may_only_read = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not must_write and root.is_dir() and may_only_read:
            return Workspace(root, is_writable=False)
        raise UserError(f"cannot use the workspace {root} ({error.strerror}); {remedy}") from None
    return workspace


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
    found = run_folder.glob("step_*")
    return sorted(filter(lambda path: CHECKPOINT_NAME.fullmatch(path.name), found), key=step_of)


# Paths in stored files are relative to the workspace's root, those outside of it as they are. In
# memory all are absolute.


def workspace_root(path: Path) -> Path | None:
    """Return the root of the workspace that a path lies in; None if it lies in none."""
    folders = (path, *path.parents)
    return next((f for f in folders if (f / WORKSPACE_FILE_NAME).is_file()), None)


def portable_path(path: str, root: Path | None) -> str:
    """Return the form in which a path is stored: relative if it is absolute and below the root."""
    prefix = f"{root}/"
    return path.removeprefix(prefix) if root and path != prefix else path


def absolute_path(path: str, root: Path | None) -> str:
    """Return the absolute form of a stored path; an empty one stays empty."""
    return str(root / path) if root and path else path


# The address of the Ray cluster that a command uses

LOCAL = "local"
"""Address of a Ray that the command starts for itself."""
AUTO = "auto"
"""Address of a cluster that this machine is part of."""
ADDRESS_VARIABLE = "RAY_ADDRESS"


def chosen_address(setting: str | None) -> str:
    """Return the setting, else `RAY_ADDRESS`, else `local`.

    Raises:
        UserError: If `RAY_ADDRESS` is not an address of a cluster.
    """
    if setting is not None:
        return setting
    found = os.environ.get(ADDRESS_VARIABLE) or LOCAL
    if problem := address_problem(found):
        raise UserError(f"{ADDRESS_VARIABLE}: {problem}; got {quoted(found)}")
    return found


def address_problem(address: str) -> str | None:
    """Return why an address cannot be joined, or None."""
    found = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", address, flags=re.ASCII)
    if address in (LOCAL, AUTO) or (found and 0 < int(found[1]) < 2**16):
        return None
    return (
        f"an address is HOST:PORT of a cluster's head node (usually port 6379), {AUTO} or {LOCAL}; "
        "Ray Client's ray:// is not made for Ray Train and Ray Tune"
    )
