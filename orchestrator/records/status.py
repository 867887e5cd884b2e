"""What exists in a workspace, how far it is, and what runs: trainings, sweeps, locks that are held.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run. A damaged file is noted, and as good as missing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.workspace import layout
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import SPEED_METRIC, Record, read_tail
from orchestrator.workspace.layout import Workspace, find_checkpoints
from orchestrator.workspace.locks import is_locked

STARTED_EVENT, FAILED_EVENT = "started", "failed"
"""Events in the journal of a sweep: it began; trials failed in every attempt, which it names."""
Note = Callable[[str], None]
"""Called with a sentence on each damaged file."""


class Training:
    """What the folder of a run or trial says about its training; the journal is read if needed."""

    def __init__(self, folder: Path, note: Note) -> None:
        """Read what was to be done, and how it ended; damaged files are noted."""
        self.folder, self.is_damaged = folder, False
        self.job: TrainingJob | None = None
        self.outcome: TrainingOutcome | None = None
        try:
            self.job = TrainingJob.of_folder(folder)
            self.outcome = TrainingOutcome.read(folder / layout.DONE_NAME)
            if self.outcome and not self.job:
                raise UserError(f"{folder / layout.JOB_NAME} is missing")
        except UserError as error:
            self.is_damaged = True
            note(str(error))
        end = self.outcome
        self.num_steps = self.job.recipe.num_steps if self.job else 0
        self.is_finished = bool(
            end and end.finished and (folder / layout.checkpoint_name(end.step)).is_dir()
        )

    @cached_property
    def lock(self) -> Path | None:
        """The lock that a process holds now; None if none runs here."""
        return next(filter(is_locked, run_locks(self.folder)), None)

    @cached_property
    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return find_checkpoints(self.folder)

    @cached_property
    def records(self) -> list[Record]:
        """The last records of its journal."""
        return read_tail(self.folder)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric in these records."""
        found: dict[str, float] = {}
        for record in self.records:
            if record["kind"] == "metrics":
                found |= record["values"]
            elif record["name"] == "resumed":
                found.pop(SPEED_METRIC, None)  # That of the process before.
        return found

    @property
    def step(self) -> int:
        """Last step in its journal, or of its newest checkpoint."""
        steps = [record["step"] for record in self.records if record["kind"] == "metrics"]
        return max([*steps, *map(layout.step_of, self.saved[-1:])], default=0)

    @property
    def recorded(self) -> float | None:
        """Time of the last record in seconds."""
        return self.records[-1]["time"] / 1000 if self.records else None

    def state(self) -> str:
        """Return how far the training is."""
        if self.lock:
            return "measuring" if self.is_finished else "running"
        if self.is_damaged:
            return "damaged"
        if (self.folder / layout.STOPPED_NAME).is_file():
            return "stopped early"
        if self.is_finished:
            return "finished"
        if not self.job:
            return "imported" if self.saved else "empty"
        events = [record for record in self.records if record["kind"] == "event"]
        verb = "diverged" if events and events[-1]["name"] == "diverged" else "stopped"
        return f"{verb} at {self.step:,}/{self.num_steps:,}"

    @property
    def seconds_left(self) -> float | None:
        """The steps that are left, as fast as the last ones; None before this process's first."""
        if not self.job or not (speed := self.metrics.get(SPEED_METRIC)):
            return None
        return max(0, self.num_steps - self.step) * self.job.recipe.num_tokens_per_step / speed


class Sweep:
    """The plan of a sweep; one that cannot be read has no trials."""

    def __init__(self, folder: Path, note: Note = lambda _: None) -> None:
        """Read the plan; a damaged one is noted."""
        self.folder, self.is_damaged = folder, False
        self.kind: str | None = None
        self.trials: tuple[Trial, ...] = ()
        try:
            if plan := SweepTrials.read(folder / layout.PLAN_FILE):
                self.kind, self.trials = plan.kind, plan.trials
        except UserError as error:
            self.is_damaged = True
            note(str(error))

    @cached_property
    def left(self) -> list[Trial]:
        """The trials that have not ended."""
        return [
            trial
            for trial in self.trials
            if not trial.result_path.exists()
            and not (Path(trial.folder) / layout.STOPPED_NAME).exists()
        ]

    @property
    def has_failed(self) -> bool:
        """Whether trials failed when the sweep ran last."""
        names = [record["name"] for record in read_tail(self.folder) if record["kind"] == "event"]
        last = [name for name in names if name in (STARTED_EVENT, FAILED_EVENT)][-1:]
        return last == [FAILED_EVENT]

    def seconds_left(self, at_once: int) -> float | None:
        """Estimate the time of the trials that are left: as long as the finished ones took."""
        left, seconds = {trial.key for trial in self.left}, list[float]()
        for trial in self.trials:
            with suppress(UserError):
                end = TrainingOutcome.read(Path(trial.folder) / layout.DONE_NAME)
                if trial.job and trial.key not in left and end and end.train_seconds:
                    seconds.append(end.train_seconds)
        mean = sum(seconds) / len(seconds) if seconds else None
        return mean and len(self.left) / max(1, at_once) * mean


def sweeps_of(workspace: Workspace, note: Note) -> list[Sweep]:
    """Return all sweeps of a workspace by name."""
    return [Sweep(folder, note) for folder in folders_in(workspace.sweeps)]


def trials_by_folder(sweeps: Iterable[Sweep]) -> dict[Path, list[tuple[str, Trial]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    found: dict[Path, list[tuple[str, Trial]]] = {}
    for sweep in sweeps:
        for trial in sweep.trials:
            found.setdefault(Path(trial.folder), []).append((sweep.folder.name, trial))
    return found


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in another one by name, without temporary ones, which begin with a dot."""
    return sorted(p for p in parent.glob("*") if p.is_dir() and not p.name.startswith("."))


def training_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of all runs and trials."""
    return [*folders_in(workspace.runs), *folders_in(workspace.trials)]


def run_locks(folder: Path) -> tuple[Path, Path]:
    """Return the files that processes lock while they train or measure in a folder."""
    return folder / layout.RUN_LOCK_NAME, folder / layout.WORKERS_LOCK_NAME


def is_in_use(folder: Path) -> bool:
    """Return whether a process trains or measures in a folder."""
    return any(map(is_locked, run_locks(folder)))


def size_of(path: Path, *, links: bool = True) -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
        links: Count also files that have another name elsewhere; deleting those frees nothing.
    """
    if path.is_file():
        files = iter([str(path)])
    else:
        files = (f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)
    total = 0
    for file in files:
        with suppress(OSError):  # Deleted meanwhile.
            found = os.lstat(file)
            is_counted = stat.S_ISREG(found.st_mode) and (links or found.st_nlink == 1)
            total += found.st_size if is_counted else 0
    return total
