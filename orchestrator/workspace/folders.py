"""The workspace: one folder with tokens, runs, trials, sweeps, the MLflow store and the logs.

No other module invents paths in it. It can be moved and copied: see `workspace/paths.py`. One that
was written by another version of the program is refused.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, resolve_path, write_json
from orchestrator.workspace.paths import WORKSPACE_FILE_NAME
from orchestrator.workspace.provenance import RECIPE_VERSION
from orchestrator.workspace.read_only import is_read_only

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
OWN_VERSION = {"recipe_version": RECIPE_VERSION}
"""Content of `workspace.json`."""
_ONLY_READ_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)
MAX_NAME_BYTES = 200
"""File systems allow 255; temporary names are a little longer than the name."""


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


def is_valid_name(text: Any) -> bool:
    """Return whether a value can be the name of a folder, and no path to another place."""
    is_plain = isinstance(text, str) and re.fullmatch(r"\w[\w .,+=-]*", text) is not None
    return is_plain and len(text.encode()) <= MAX_NAME_BYTES


def check_name_option(name: str | None) -> str | None:
    """Check the value of an option `--name` like `check_name`; None stays None."""
    return None if name is None else check_name(name, "--name")


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


def open_workspace(path: Path | None = None, *, must_write: bool = True) -> Workspace:
    """Return the workspace (default: `IIET_WORKSPACE`, else `./iiet-workspace`); made if missing.

    A `read_only` block makes nothing. Unless the caller must write, a workspace that this user may
    only read is opened, too; its `is_writable` is then False.

    Raises:
        UserError: If the folder cannot be made or written, or is of another version.
    """
    workspace = locate_workspace(path)
    root = workspace.root
    file, probe = root / WORKSPACE_FILE_NAME, root / f".write-test-{os.getpid()}"
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"the workspace {root} is no folder; choose another with --workspace")
        version = read_json(file)
        if version not in (None, OWN_VERSION):
            raise UserError(
                f"the workspace {root} is of another version of this program, which this version "
                "cannot read; nothing was changed. Choose a new workspace with --workspace"
            )
        if is_read_only():
            return workspace
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if version is None:
            write_json(file, OWN_VERSION)
    except OSError as error:
        if not must_write and root.is_dir() and error.errno in _ONLY_READ_ERRORS:
            return Workspace(root, is_writable=False)
        raise UserError(
            f"cannot use the workspace {root} ({error.strerror}); choose another with --workspace"
        ) from None
    return workspace


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace like `open_workspace`, but read and write nothing."""
    root = path or Path(os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME)
    return Workspace(resolve_path(root))
