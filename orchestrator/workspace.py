"""Where things live: one folder that holds tokens, runs, trials, sweeps, the MLflow store and the
logs.

Stages never invent paths; they ask here. Files that others read are written to a temporary name and
renamed, so that a reader finds the old content or the new one and nothing between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, shortened

ENVIRONMENT_NAME = "IIET_WORKSPACE"
DEFAULT_NAME = "iiet-workspace"
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


def is_name(text: Any) -> bool:
    """Tell whether a value can be the name of a folder, and leads nowhere else as a path."""
    is_plain = isinstance(text, str) and re.fullmatch(r"\w[\w .,+=-]*", text) is not None
    return is_plain and len(text.encode()) <= MAX_NAME_BYTES


def check_name(name: str | None) -> str | None:
    """Return the value of an option `--name`; None stays None.

    Raises:
        UserError: If it is none; see `checked_name`.
    """
    return None if name is None else checked_name(name, "--name")


def checked_name(name: Any, what: str) -> str:
    """Return the name of a run or sweep, which is that of its folder.

    Args:
        name: As it was typed, or as a file has it.
        what: Where it is from, for the error.

    Raises:
        UserError: If it could lead elsewhere, or is none.
    """
    if not is_name(name):
        raise UserError(
            f"{what} {name!r}: a name has letters, digits, spaces and . , + = - _, begins with a "
            f"letter or a digit, and takes at most {MAX_NAME_BYTES} bytes"
        )
    return str(name)


def expanded(path: Path | str) -> Path:
    """Return a path that a user typed, `~` written out.

    Raises:
        UserError: If it names a user whom this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def is_folder(path: Path | str) -> bool:
    """Tell whether a path that a user typed is a folder; also of a text that can be no path."""
    try:
        return expanded(path).is_dir()
    except (OSError, ValueError):
        return False


def open_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace, made if it is missing.

    Args:
        path: The folder; `IIET_WORKSPACE`, or `./iiet-workspace`, when unset.

    Raises:
        UserError: If the folder cannot be made or written.
    """
    workspace = locate_workspace(path)
    root = workspace.root
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workspace {root} ({error.strerror}); "
            "choose another with --workspace"
        ) from None
    return workspace


def locate_workspace(path: Path | None = None) -> Workspace:
    """Return the workspace without making or touching it; see `open_workspace`."""
    root = path or Path(os.environ.get(ENVIRONMENT_NAME) or DEFAULT_NAME)
    return Workspace(expanded(root).resolve())


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def delete_folder(folder: Path) -> None:
    """Delete a folder, at once for those that come to read it; a deletion that is cut off leaves
    `NAME.PID.tmp`.

    Raises:
        OSError: If it is not there, or may not be renamed.
    """
    doomed = folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}.tmp"))
    shutil.rmtree(doomed, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole file; see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; None if the file is missing.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and run the command again"
        ) from None
