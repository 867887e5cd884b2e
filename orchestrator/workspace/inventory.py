"""List what a workspace holds: runs, checkpoints, trials, sweeps and exported models.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run. Anyone may have edited a file, so what is read is
checked here, once: a damaged file is noted, and the rest is listed.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from orchestrator.workspace.checkpoint_names import checkpoint_name, find_checkpoints, step_of
from orchestrator.workspace.errors import UserError, first_problem
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
    Kind,
)

Note = Callable[[str], None]
"""Called with a sentence on each damaged file."""


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


T = TypeVar("T", bound="_Part")
_PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class _Part(BaseModel):
    """The fields of a stored record that a listing shows."""

    model_config = ConfigDict(frozen=True, strict=True)


class StoredModel(_Part):
    """Of a model's configuration."""

    method: str
    schedule: list[NonNegativeInt]
    num_layers: PositiveInt


class StoredRecipe(_Part):
    """Of the settings of a training."""

    num_steps: PositiveInt
    num_tokens_per_step: PositiveInt
    iterate_from_fraction: float = 0.0


class StoredJob(_Part):
    """Of a `TrainingJob`."""

    model: StoredModel
    recipe: StoredRecipe


class StoredOutcome(_Part):
    """Of a `TrainingOutcome`."""

    step: NonNegativeInt
    finished: bool
    validation_loss: float = nan
    train_seconds: float = 0.0


class StoredTrial(_Part):
    """Of a `Trial` in a plan."""

    key: _PathText
    folder: _PathText
    label: str = ""
    job: dict[str, Any] | None = None


class _JobFile(_Part):
    job: StoredJob


class _PlanFile(_Part):
    kind: str | None = None
    trials: list[StoredTrial]


class StoredTraining:
    """What the folder of a run or trial says about its training."""

    def __init__(self, folder: Path, note: Note = lambda _: None) -> None:
        """Read the folder; damaged files are noted, and as good as missing."""
        self.folder = folder
        damage: list[str] = []
        record = _read(folder / JOB_NAME, _JobFile, damage.append)
        self.job = record and record.job
        """Its job, if it has one."""
        self.outcome = _read(folder / DONE_NAME, StoredOutcome, damage.append)
        """How it ended; None until it has finished."""
        if self.outcome and not self.job and not damage:
            damage.append(f"{folder / JOB_NAME} is missing")
        self.is_damaged = bool(damage)
        """Whether one of these files cannot be read, or a finished training has no job."""
        for sentence in damage:
            note(sentence)
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
    def num_steps(self) -> int:
        """Steps of the whole training; 0 if it is not known."""
        return self.job.recipe.num_steps if self.job else 0

    @property
    def is_finished(self) -> bool:
        """Whether the training has finished and its last checkpoint is there."""
        end = self.outcome
        if end is None or not end.finished:
            return False
        return (self.folder / checkpoint_name(end.step)).is_dir()

    @property
    def lock(self) -> Path | None:
        """The lock that a process holds now; None if none runs here."""
        return next(filter(is_locked, run_locks(self.folder)), None)

    def state(self) -> str:
        """Return how far the training is."""
        if self.lock:
            return "measuring" if self.is_finished else "running"
        if self.is_damaged:
            return "damaged"
        if (self.folder / STOPPED_NAME).is_file():
            return "stopped early"
        if self.is_finished:
            return "finished"
        if not self.job:
            return "imported" if find_checkpoints(self.folder) else "empty"
        events = [record for record in self.records if record["kind"] == "event"]
        verb = "diverged" if events and events[-1]["name"] == "diverged" else "stopped"
        return f"{verb} at {self.step:,}/{self.num_steps:,}"

    def details(self) -> dict[str, Any]:
        """Return method, schedule, steps and validation loss, the known ones."""
        model, end = self.job and self.job.model, self.outcome
        found = {
            "method": model and model.method,
            "schedule": model and model.schedule,
            "step": (end and end.step) or self.step or None,
            "steps": self.num_steps or None,
            "validation_loss": end.validation_loss if end else self.metrics.get(VALIDATION_METRIC),
        }
        return {name: value for name, value in found.items() if value is not None}


def list_entries(workspace: Workspace, kind: Kind, note: Note) -> list[Entry]:
    """Return everything of one kind, the newest first."""
    return sorted(_LISTS[kind](workspace, note), key=lambda entry: entry.changed, reverse=True)


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


@dataclass(frozen=True)
class SweepProgress:
    """The trials in a sweep's stored plan."""

    kind: str | None
    """`threshold`, `iterations` or `search`; None without a readable plan."""
    finished: list[StoredTrial]
    """Those that have ended."""
    left: list[StoredTrial]


def sweep_progress(folder: Path, note: Note) -> SweepProgress:
    """Return how far the sweep in a folder is; it has no trials if its plan cannot be read."""
    plan = _read(folder / PLAN_FILE, _PlanFile, note) or _PlanFile(trials=[])
    progress = SweepProgress(plan.kind, [], [])
    for trial in plan.trials:
        run = folder.parents[1] / trial.folder
        ends = (run / f"result-{trial.key}.json", run / STOPPED_NAME)
        has_ended = any(end.exists() for end in ends)
        (progress.finished if has_ended else progress.left).append(trial)
    return progress


def _runs(workspace: Workspace, note: Note) -> Iterator[Entry]:
    for folder in folders_in(workspace.runs):
        yield _training_entry(folder, note)


def _trials(workspace: Workspace, note: Note) -> Iterator[Entry]:
    planned = trials_by_folder(workspace, note)
    for folder in folders_in(workspace.trials):
        entry = _training_entry(folder, note)
        state = entry.state
        # A folder without a training holds the results of a model that was trained elsewhere.
        if state in ("finished", "empty"):
            state = "finished" if any(folder.glob("result-*.json")) else "to measure"
        own = planned.get(folder, [])
        more = {"label": own[0][1].label, "sweeps": [sweep for sweep, _ in own]} if own else {}
        yield replace(entry, state=state, details={**entry.details, **more})


def trials_by_folder(workspace: Workspace, note: Note) -> dict[Path, list[tuple[str, StoredTrial]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    found: dict[Path, list[tuple[str, StoredTrial]]] = {}
    for sweep in folders_in(workspace.sweeps):
        progress = sweep_progress(sweep, note)
        for trial in (*progress.finished, *progress.left):
            found.setdefault(workspace.root / trial.folder, []).append((sweep.name, trial))
    return found


def _training_entry(folder: Path, note: Note) -> Entry:
    training = StoredTraining(folder, note)
    return Entry(
        name=folder.name,
        state=training.state(),
        num_bytes=size_of(folder),
        changed=last_recorded(folder),
        details=training.details(),
    )


def _checkpoints(workspace: Workspace, _: Note) -> Iterator[Entry]:
    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder):
            yield Entry(
                name=str(checkpoint.relative_to(workspace.root)),
                state="complete" if (checkpoint / PROVENANCE).is_file() else "damaged",
                num_bytes=size_of(checkpoint),
                changed=checkpoint.stat().st_mtime,
            )


def _sweeps(workspace: Workspace, note: Note) -> Iterator[Entry]:
    for folder in folders_in(workspace.sweeps):
        damage: list[str] = []
        progress = sweep_progress(folder, damage.append)
        for sentence in damage:
            note(sentence)
        finished, left = progress.finished, progress.left
        is_running = any(StoredTraining(workspace.root / trial.folder).lock for trial in left)
        total = len(finished) + len(left)
        state = "running" if is_running else "interrupted" if left else "finished"
        yield Entry(
            name=folder.name,
            state="damaged" if damage else state if total else "without a plan",
            num_bytes=size_of(folder),
            changed=last_recorded(folder),
            details={
                "kind": progress.kind,
                "finished": len(finished),
                "trials": total,
                "has_report": (folder / RESULTS_FILE).is_file(),
            },
        )


def _models(workspace: Workspace, _: Note) -> Iterator[Entry]:
    for config in sorted(workspace.exports.glob("**/config.json")):
        folder = config.parent
        yield Entry(
            name=str(folder.relative_to(workspace.root)),
            state="exported",
            num_bytes=size_of(folder),
            changed=folder.stat().st_mtime,
        )


_LISTS: Mapping[Kind, Callable[[Workspace, Note], Iterator[Entry]]] = {
    "runs": _runs,
    "checkpoints": _checkpoints,
    "trials": _trials,
    "sweeps": _sweeps,
    "models": _models,
}


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in another one by name, without temporary ones, which begin with a dot."""
    return sorted(p for p in parent.glob("*") if p.is_dir() and not p.name.startswith("."))


def _read(path: Path, kind: type[T], note: Note) -> T | None:
    """Return the checked fields of a file; None if it is missing, or damaged, which is noted."""
    try:
        found = read_json_object(path)
        return None if found is None else kind.model_validate(found)
    except UserError as error:
        note(str(error))
    except ValidationError as error:
        note(f"{path} is damaged ({first_problem(error)})")
    return None
