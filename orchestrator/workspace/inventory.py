"""List what a workspace holds: runs, checkpoints, trials, sweeps and exported models.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.workspace.checkpoint_names import checkpoint_name, find_checkpoints, step_of
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json_object
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.journal import (
    SPEED_METRIC,
    VALIDATION_METRIC,
    last_recorded,
    read_tail,
)
from orchestrator.workspace.locks import is_locked
from orchestrator.workspace.names import (
    DONE_NAME,
    JOB_NAME,
    PLAN_FILE,
    PROVENANCE,
    RESULTS_FILE,
    RUN_LOCK_NAME,
    STOPPED_NAME,
    WORKERS_LOCK_NAME,
)

Kind = Literal["runs", "checkpoints", "trials", "sweeps", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class RemovableKind(StrEnum):
    """What `clean` looks for."""

    TEMPORARY = "temporary"
    RAY = "ray"
    TEACHERS = "teachers"
    FIRST_STAGES = "first-stages"
    CHECKPOINTS = "checkpoints"
    DAMAGED = "damaged"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in the workspace."""

    name: str
    """Its name, as commands take it."""
    state: str
    """How far it is, such as `finished`, `running` or `stopped at 40/100`."""
    num_bytes: int
    """Size of its files."""
    changed: float
    """Seconds since 1970 of the last record, or of the folder."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More about it; the names are keys of `--json`."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values of `list --json`."""
        values = {"name": self.name, "state": self.state, "bytes": self.num_bytes}
        return {**values, "changed": round(self.changed, 3), **self.details}


class StoredTraining:
    """What the folder of a run or trial says about its training."""

    def __init__(self, folder: Path) -> None:
        """Read the folder."""
        self.folder = folder
        self.job = _object(folder / JOB_NAME, "job")
        """Its `TrainingJob` as JSON; empty if it has none or the file is damaged."""
        self.outcome = _object(folder / DONE_NAME)
        """Its `TrainingOutcome` as JSON; empty until it has finished."""
        self.records = read_tail(folder)
        """The last records of its journal."""
        self.metrics: dict[str, float] = {}
        """The last value of each of their metrics."""
        saved = find_checkpoints(folder)
        self.step = step_of(saved[-1]) if saved else 0
        """Last step in its journal, or of its newest checkpoint."""
        for record in self.records:
            if record["kind"] == "metrics":
                self.step = max(self.step, record["step"])
                self.metrics |= record["values"]
            elif record["name"] == "resumed":
                self.metrics.pop(SPEED_METRIC, None)  # That of the process before.

    @property
    def model(self) -> Mapping[str, Any]:
        """Configuration of its model."""
        found = self.job.get("model")
        return found if isinstance(found, dict) else {}

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Recipe of its training."""
        found = self.job.get("recipe")
        return found if isinstance(found, dict) else {}

    @property
    def num_steps(self) -> int:
        """Steps of the whole training; 0 if it is not known."""
        return int(self.recipe.get("num_steps") or 0)

    @property
    def is_finished(self) -> bool:
        """Whether the training has finished and its last checkpoint is there."""
        step = self.outcome.get("step")
        name = checkpoint_name(step) if isinstance(step, int) else ""
        return bool(self.outcome.get("finished")) and (self.folder / name).is_dir()

    @property
    def lock(self) -> Path | None:
        """The lock that a process holds now; None if none runs here."""
        return next(filter(is_locked, run_locks(self.folder)), None)

    def state(self) -> str:
        """Return how far the training is."""
        if self.lock:
            return "measuring" if self.is_finished else "running"
        if (self.folder / STOPPED_NAME).is_file():
            return "stopped early"
        if self.is_finished:
            return "finished"
        if not self.job:
            damaged = (self.folder / JOB_NAME).is_file()
            return (
                "damaged" if damaged else "imported" if find_checkpoints(self.folder) else "empty"
            )
        events = [record for record in self.records if record["kind"] == "event"]
        verb = "diverged" if events and events[-1]["name"] == "diverged" else "stopped"
        return f"{verb} at {self.step:,}/{self.num_steps:,}"

    def details(self) -> dict[str, Any]:
        """Return method, schedule, steps and validation loss, the known ones."""
        loss = self.outcome.get("validation_loss", self.metrics.get(VALIDATION_METRIC))
        found = {
            "method": self.model.get("method"),
            "schedule": self.model.get("schedule"),
            "step": self.outcome.get("step") or self.step or None,
            "steps": self.num_steps or None,
            "validation_loss": loss,
        }
        return {name: value for name, value in found.items() if value is not None}


def list_entries(workspace: Workspace, kind: Kind) -> list[Entry]:
    """Return everything of one kind, the newest first."""
    return sorted(_LISTS[kind](workspace), key=lambda entry: entry.changed, reverse=True)


def training_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of all runs and trials."""
    return [*folders_in(workspace.runs), *folders_in(workspace.trials)]


def run_locks(folder: Path) -> tuple[Path, Path]:
    """Return the files that processes lock while they train or measure in a folder."""
    return folder / RUN_LOCK_NAME, folder / WORKERS_LOCK_NAME


def size_of(path: Path, *, links: bool = True) -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
        links: Count also files that have another name elsewhere; deleting those frees nothing.
    """
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):  # Deleted meanwhile.
            found = file.lstat()
            is_counted = stat.S_ISREG(found.st_mode) and (links or found.st_nlink == 1)
            total += found.st_size if is_counted else 0
    return total


def sweep_progress(folder: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the trials in a sweep's stored plan: those that have ended, and the others."""
    root = folder.parents[1]
    finished: list[Mapping[str, Any]] = []
    left: list[Mapping[str, Any]] = []
    for trial in _object(folder / PLAN_FILE).get("trials") or []:
        run = root / trial["folder"]
        ends = (run / f"result-{trial['key']}.json", run / STOPPED_NAME)
        (finished if any(end.is_file() for end in ends) else left).append(trial)
    return finished, left


def _runs(workspace: Workspace) -> Iterator[Entry]:
    for folder in folders_in(workspace.runs):
        yield _training_entry(folder)


def _trials(workspace: Workspace) -> Iterator[Entry]:
    planned = trials_by_folder(workspace)
    for folder in folders_in(workspace.trials):
        entry = _training_entry(folder)
        state = entry.state
        # A folder without a training holds the results of a model that was trained elsewhere.
        if state in ("finished", "empty"):
            state = "finished" if any(folder.glob("result-*.json")) else "to measure"
        own = planned.get(folder, [])
        more = {"label": own[0][1]["label"], "sweeps": [sweep for sweep, _ in own]} if own else {}
        yield replace(entry, state=state, details={**entry.details, **more})


def trials_by_folder(workspace: Workspace) -> dict[Path, list[tuple[str, Mapping[str, Any]]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    found: dict[Path, list[tuple[str, Mapping[str, Any]]]] = {}
    for sweep in folders_in(workspace.sweeps):
        for trials in sweep_progress(sweep):
            for trial in trials:
                found.setdefault(workspace.root / trial["folder"], []).append((sweep.name, trial))
    return found


def _training_entry(folder: Path) -> Entry:
    training = StoredTraining(folder)
    return Entry(
        name=folder.name,
        state=training.state(),
        num_bytes=size_of(folder),
        changed=last_recorded(folder),
        details=training.details(),
    )


def _checkpoints(workspace: Workspace) -> Iterator[Entry]:
    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder):
            yield Entry(
                name=str(checkpoint.relative_to(workspace.root)),
                state="complete" if (checkpoint / PROVENANCE).is_file() else "damaged",
                num_bytes=size_of(checkpoint),
                changed=checkpoint.stat().st_mtime,
            )


def _sweeps(workspace: Workspace) -> Iterator[Entry]:
    for folder in folders_in(workspace.sweeps):
        finished, left = sweep_progress(folder)
        kind = _object(folder / PLAN_FILE).get("kind")
        is_running = any(StoredTraining(workspace.root / trial["folder"]).lock for trial in left)
        total = len(finished) + len(left)
        state = "running" if is_running else "interrupted" if left else "finished"
        yield Entry(
            name=folder.name,
            state=state if total else "without a plan",
            num_bytes=size_of(folder),
            changed=last_recorded(folder),
            details={
                "kind": kind,
                "finished": len(finished),
                "trials": total,
                "has_report": (folder / RESULTS_FILE).is_file(),
            },
        )


def _models(workspace: Workspace) -> Iterator[Entry]:
    for config in sorted(workspace.exports.glob("**/config.json")):
        folder = config.parent
        yield Entry(
            name=str(folder.relative_to(workspace.root)),
            state="exported",
            num_bytes=size_of(folder),
            changed=folder.stat().st_mtime,
        )


_LISTS: Mapping[Kind, Callable[[Workspace], Iterator[Entry]]] = {
    "runs": _runs,
    "checkpoints": _checkpoints,
    "trials": _trials,
    "sweeps": _sweeps,
    "models": _models,
}


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in another one by name, without temporary ones, which begin with a dot."""
    return sorted(p for p in parent.glob("*") if p.is_dir() and not p.name.startswith("."))


def _object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, or one inside it; empty if it is missing or damaged."""
    with suppress(UserError):
        found: Any = read_json_object(path) or {}
        for key in keys:
            found = found.get(key)
        return found if isinstance(found, dict) else {}
    return {}
