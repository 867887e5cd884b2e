"""Where things live: one folder that holds tokens, runs, trials, sweeps, the MLflow store and the
logs.

Stages never invent paths; they ask here. Files that others read are written to a temporary name and
renamed, so that a reader finds the old content or the new one and nothing between.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, resolve_path, write_json
from orchestrator.workspace.provenance import RECIPE_VERSION

T = TypeVar("T")

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
WORKSPACE_FILE_NAME = "workspace.json"
"""Where the workspace lies, and the other workspaces that its records name files in."""
_PARTS = ("mlflow.db", "runs", "trials", "sweeps", "tokens", WORKSPACE_FILE_NAME)
"""What tells a workspace from a folder that only has artifacts, as MLflow makes one anew."""
MAX_NAME_BYTES = 200
"""File systems take 255; a temporary name is a little longer than the name."""


@dataclass(frozen=True)
class Workspace:
    """The folder and the names in it. All paths are absolute."""

    root: Path

    @property
    def tokens(self) -> Path:
        """Prepared data, one folder for each fingerprint."""
        return self.root / "tokens"

    @property
    def runs(self) -> Path:
        """Pretraining and distillation runs, one folder for each name."""
        return self.root / "runs"

    @property
    def trials(self) -> Path:
        """Finished and unfinished trials, one folder for each content key."""
        return self.root / "trials"

    @property
    def first_stages(self) -> Path:
        """What models have in common that are trained in stages, one folder for each content
        key."""
        return self.root / "first_stages"

    @property
    def teachers(self) -> Path:
        """What teachers say about the tokens of a distillation, one folder for each content key."""
        return self.root / "teachers"

    @property
    def sweeps(self) -> Path:
        """Sweeps: plan, front and report, one folder for each name."""
        return self.root / "sweeps"

    @property
    def overlays(self) -> Path:
        """Reports of several sweeps on one front, one folder for each set of sweeps."""
        return self.root / "overlays"

    @property
    def evaluations(self) -> Path:
        """Cached evaluation results, one file for each content key."""
        return self.root / "evaluations"

    @property
    def benchmarks(self) -> Path:
        """Measured costs, one file for each set of models and conditions."""
        return self.root / "benchmarks"

    @property
    def exports(self) -> Path:
        """Models as others load them, one folder for each name."""
        return self.root / "exports"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts."""
        return self.root / "artifacts"

    @property
    def logs(self) -> Path:
        """Log files of the libraries."""
        return self.root / "logs"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: `MLFLOW_TRACKING_URI`, or a sqlite file in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"


def is_valid_name(text: Any) -> bool:
    """Tell whether a value can be the name of a folder, and leads nowhere else as a path."""
    is_plain = isinstance(text, str) and re.fullmatch(r"\w[\w .,+=-]*", text) is not None
    return is_plain and len(text.encode()) <= MAX_NAME_BYTES


def check_name_option(name: str | None) -> str | None:
    """Return the value of an option `--name`; None stays None.

    Raises:
        UserError: If it is none; see `check_name`.
    """
    return None if name is None else check_name(name, "--name")


def check_name(name: Any, what: str) -> str:
    """Return the name of a run or sweep, which is that of its folder.

    Args:
        name: As it was typed, or as a file has it.
        what: Where it is from, for the error.

    Raises:
        UserError: If it could lead elsewhere, or is none.
    """
    if not is_valid_name(name):
        raise UserError(
            f"{what} {name!r}: a name has letters, digits, spaces and . , + = - _, begins with a "
            f"letter or a digit, and takes at most {MAX_NAME_BYTES} bytes"
        )
    return str(name)


def open_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace, made if it is missing.

    Args:
        path: The folder; `IIET_WORKSPACE`, or `./iiet-workspace`, when unset.

    Raises:
        UserError: If the folder cannot be made or written, holds trainings of another version, or
            is a copy whose records name files of the original.
    """
    workspace = locate_workspace(path)
    root = workspace.root
    probe = root / f".write-test-{os.getpid()}"
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
    """Refuse a workspace whose records name files in another one, or were made by another version.

    No key of another version is found again, and no training can go on from it. As for a copy:
    MLflow writes where its database says, and results name their checkpoints by absolute paths, so
    both lead into the original. Where the original is gone, the workspace was moved, and the work
    goes on.

    Args:
        root: The workspace.
        probe: Name of a file that lies in it at this moment: what holds it too is the same folder
            under another path, such as a second mount.

    Raises:
        UserError: If it does.
    """
    stored = read_json(root / WORKSPACE_FILE_NAME)
    own = {"root": str(root), "recipe_version": RECIPE_VERSION}
    is_known = isinstance(stored, dict) and own.items() <= stored.items()
    named = stored.get("records_name") if is_known else None
    if not isinstance(named, list):
        # Only once in each place: a large workspace has thousands of records.
        records = _records(root)
        _refuse_another_version(root, records)
        named = _places_in_records(root, records)
    for other in map(Path, named):
        is_workspace = any((other / part).exists() for part in _PARTS)
        if other != root and is_workspace and not (other / probe).exists():
            raise UserError(
                f"the workspace {root} was copied or moved from {other}, which is a workspace as "
                f"well. The records of {root} name files in {other}, so commands would write "
                f"there. Use {other}; or rename it, and {root} can be used; or start a new "
                "workspace, and copy only the folder `tokens` into it"
            )
    place = {**own, "records_name": named}
    if stored != place:
        write_json(root / WORKSPACE_FILE_NAME, place)


def _records(root: Path) -> list[dict[str, Any]]:
    """Return what trainings of a workspace wrote down when they began, damaged records apart."""
    found = []
    for path in (*root.glob("runs/*/job.json"), *root.glob("trials/*/job.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue  # damaged: said where it is needed
        if isinstance(record, dict):
            found.append(record)
    return found


def _refuse_another_version(root: Path, records: Iterable[Mapping[str, Any]]) -> None:
    versions = {record.get("recipe_version", 1) for record in records if "key" in record}
    if versions - {RECIPE_VERSION}:
        raise UserError(
            f"the workspace {root} holds trainings of another version of this program, which this "
            "one can neither find nor go on with, and was left as it is; choose a new one with "
            "--workspace, and take models along with `iiet-orch import OLD_CHECKPOINT`, where "
            f"OLD_CHECKPOINT is a folder such as {root}/runs/NAME"
        )


def _places_in_records(root: Path, records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the workspaces that the paths in a workspace's records lead to, itself apart."""
    found = {parent for parent in (_place_of_artifacts(root / "mlflow.db"),) if parent}
    for record in records:
        with suppress(KeyError, TypeError):
            found.add(str(Path(record["job"]["run_folder"]).parent.parent))
    return sorted(found - {str(root)})


def _place_of_artifacts(database: Path) -> str | None:
    """Return the folder that MLflow's folder of artifacts lies in; None if that is not known."""
    import sqlite3

    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    except sqlite3.Error:
        return None  # none yet, or damaged: said where it is opened
    paths = [Path(unquote(urlsplit(str(row[0])).path)) for row in rows]
    return next((str(path.parent) for path in paths if path.name == "artifacts"), None)


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace without making or touching it; see `open_workspace`."""
    root = path or Path(os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME)
    return Workspace(resolve_path(root))
