"""The workspace: one folder with tokens, runs, trials, sweeps, the MLflow store and the logs.

No other module invents paths in it. A workspace that was copied from another one, or was written by
another version of the program, is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, resolve_path, write_json
from orchestrator.workspace.provenance import RECIPE_VERSION
from orchestrator.workspace.read_only import is_read_only

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
WORKSPACE_FILE_NAME = "workspace.json"
"""Holds the workspace's path, and the other workspaces that its records refer to."""
_WORKSPACE_MARKS = ("mlflow.db", "runs", "trials", "sweeps", "tokens", WORKSPACE_FILE_NAME)
"""One of these makes a folder a workspace; MLflow recreates `artifacts` anywhere."""
MAX_NAME_BYTES = 200
"""File systems allow 255; temporary names are a little longer than the name."""


class Workspace:
    """Absolute paths of the folders in a workspace."""

    def __init__(self, root: Path) -> None:
        self.root = root
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
        self.artifacts = root / "artifacts"  # MLflow's
        self.logs = root / "logs"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: `MLFLOW_TRACKING_URI`, or a sqlite file in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"


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


def open_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace (default: `IIET_WORKSPACE`, else `./iiet-workspace`); made if missing.

    A `read_only` block makes nothing.

    Raises:
        UserError: If the folder cannot be made or written, holds trainings of another version, or
            is a copy whose records refer to files of the original.
    """
    workspace = locate_workspace(path)
    root = workspace.root
    probe = root / f".write-test-{os.getpid()}"
    if is_read_only():
        if not root.is_dir() and root.exists():
            raise UserError(f"the workspace {root} is no folder; choose another with --workspace")
        _refuse_another_version(root, _training_records(root))
        return workspace
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        try:
            _refuse_a_copy_or_another_version(root, probe.name)
        finally:
            probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workspace {root} ({error.strerror}); "
            "choose another with --workspace"
        ) from None
    return workspace


def _refuse_a_copy_or_another_version(root: Path, probe: str) -> None:
    """Refuse a workspace whose records refer to another one, or are from another version.

    In a copy, MLflow's database and the results' absolute paths still point into the original. If
    the original no longer exists, the workspace was moved, and work continues. `probe` names a file
    in the workspace; a folder that has it, too, is the same folder under another path.
    """
    stored = read_json(root / WORKSPACE_FILE_NAME)
    own = {"root": str(root), "recipe_version": RECIPE_VERSION}
    is_known = isinstance(stored, dict) and own.items() <= stored.items()
    named = stored.get("records_name") if is_known else None
    if not isinstance(named, list):
        # Only once per location: a large workspace has thousands of records.
        records = _training_records(root)
        _refuse_another_version(root, records)
        named = _workspaces_in_records(root, records)
    for other in map(Path, named):
        is_workspace = any((other / name).exists() for name in _WORKSPACE_MARKS)
        if other != root and is_workspace and not (other / probe).exists():
            raise UserError(
                f"the workspace {root} was copied or moved from {other}, which is a workspace as "
                f"well. The records of {root} refer to files in {other}, so commands would write "
                f"there. Use {other}; or rename it, then {root} can be used; or start a new "
                "workspace, and copy only the folder `tokens` into it"
            )
    location = {**own, "records_name": named}
    if stored != location:
        write_json(root / WORKSPACE_FILE_NAME, location)


def _training_records(root: Path) -> list[dict[str, Any]]:
    found = []
    for path in (*root.glob("runs/*/job.json"), *root.glob("trials/*/job.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue  # Damaged; reported when it is needed.
        if isinstance(record, dict):
            found.append(record)
    return found


def _refuse_another_version(root: Path, records: Iterable[Mapping[str, Any]]) -> None:
    versions = {record.get("recipe_version", 1) for record in records if "key" in record}
    if versions - {RECIPE_VERSION}:
        raise UserError(
            f"the workspace {root} holds trainings of another version of this program, which this "
            "version can neither find nor resume; nothing was changed. Choose a new workspace with "
            "--workspace, and bring models along with `iiet-orch import OLD_CHECKPOINT`, where "
            f"OLD_CHECKPOINT is a folder such as {root}/runs/NAME"
        )


def _workspaces_in_records(root: Path, records: Iterable[Mapping[str, Any]]) -> list[str]:
    # The other workspaces that the paths in the records lead to.
    parent = _parent_of_artifacts(root / "mlflow.db")
    found = {parent} if parent else set()
    for record in records:
        with suppress(KeyError, TypeError):
            found.add(str(Path(record["job"]["run_folder"]).parent.parent))
    return sorted(found - {str(root)})


def _parent_of_artifacts(database: Path) -> str | None:
    import sqlite3

    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    except sqlite3.Error:
        return None  # Missing or damaged; reported when it is opened.
    paths = [Path(unquote(urlsplit(str(row[0])).path)) for row in rows]
    return next((str(path.parent) for path in paths if path.name == "artifacts"), None)


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace like `open_workspace`, but read and write nothing."""
    root = path or Path(os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME)
    return Workspace(resolve_path(root))
