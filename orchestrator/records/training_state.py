"""The state of a training: an enumeration, and a class that reads it from the training's folder.

Lists, plans, estimates and sweeps use the class. Everything is read from small files, without
PyTorch, so that it is quick also while trainings run.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import SPEED_METRIC, JournalRecord, read_tail
from orchestrator.workspace.layout import (
    DONE_NAME,
    JOB_NAME,
    RUN_LOCK_NAME,
    STOPPED_NAME,
    WORKERS_LOCK_NAME,
    checkpoint_name,
    find_checkpoints,
    step_of,
)
from orchestrator.workspace.locks import is_locked

DIVERGED_EVENT = "diverged"
"""Event in the journal of a training, with the reason as `text`."""


class TrainingState(StrEnum):
    """State of a training, whether or not a process works on it now."""

    EMPTY = "empty"
    """Nothing has been trained."""
    IMPORTED = "imported"
    """A model from elsewhere: weights without a training."""
    STOPPED = "stopped"
    """Started and not finished, or its end is lost; the same job resumes it."""
    DIVERGED = "diverged"
    """Started, and ended by a bad loss or gradient."""
    STOPPED_EARLY = "stopped early"
    """Started, and ended by ASHA because another trial of its sweep was better."""
    FINISHED = "finished"
    """At its last step, with the checkpoint."""


def checkpoint_is_there(checkpoint: Path) -> None:
    """Raise `UserError` if a checkpoint is missing; its files are not read."""
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint folder {checkpoint}")


class Training:
    """The training in the folder of a run or trial."""

    def __init__(
        self, folder: Path, check_checkpoint: Callable[[Path], None] = checkpoint_is_there
    ) -> None:
        """Read the job and the outcome.

        Args:
            folder: It need not exist.
            check_checkpoint: Called with the last checkpoint of a finished training; if it raises
                `UserError`, the training has lost its end.

        Raises:
            DamagedFile: If one of these files cannot be read.
            UserError: If the folder has an outcome but no job.
        """
        self.folder = folder
        self.job = TrainingJob.of_folder(folder)
        """The job; None if the folder has none."""
        self.outcome: TrainingOutcome | None = None
        """The outcome, with its checkpoint in this folder; None if it is not finished."""
        self.lost_end: UserError | None = None
        """Why the last checkpoint of a finished training cannot be used."""
        stored_outcome = TrainingOutcome.read(folder / DONE_NAME)
        if stored_outcome is None:
            return
        if self.job is None:
            raise UserError(
                f"{folder / JOB_NAME} is missing; restore it from a backup, or delete {folder}"
            )
        # The stored path may be that of the workspace before it was moved.
        last_checkpoint = folder / checkpoint_name(stored_outcome.step)
        try:
            check_checkpoint(last_checkpoint)
        except UserError as error:
            self.lost_end = error
        else:
            changes = {"checkpoint": str(last_checkpoint)}
            self.outcome = stored_outcome.model_copy(update=changes)

    @cached_property
    def state(self) -> TrainingState:
        """How far the training is."""
        if self.outcome:  # Also if it was stopped early once, and later resumed.
            return TrainingState.FINISHED
        if (self.folder / STOPPED_NAME).is_file():
            return TrainingState.STOPPED_EARLY
        if self.job is None:
            return TrainingState.IMPORTED if self.checkpoints else TrainingState.EMPTY
        return TrainingState.DIVERGED if self._has_diverged else TrainingState.STOPPED

    @property
    def _has_diverged(self) -> bool:
        """Whether the last process that trained here diverged.

        Other events may follow: a missing profile, a finished upload.
        """
        has_diverged = False
        for record in self.records:
            if record["kind"] == "event":
                if record["name"] == DIVERGED_EVENT:
                    has_diverged = True
                elif record["name"] in ("started", "resumed"):
                    has_diverged = False
        return has_diverged

    @property
    def num_steps(self) -> int:
        """Steps that were to be done; 0 if unknown."""
        return self.job.recipe.num_steps if self.job else 0

    @property
    def step(self) -> int:
        """Last step in the training's journal, or of its newest checkpoint."""
        recorded: list[int] = [
            record["step"] for record in self.records if record["kind"] == "metrics"
        ]
        return max([*recorded, self.saved_step])

    @property
    def saved_step(self) -> int:
        """Step of the training's newest checkpoint, intact or not; 0 without one."""
        return step_of(self.checkpoints[-1]) if self.checkpoints else 0

    @cached_property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return find_checkpoints(self.folder)

    # Its journal

    @cached_property
    def records(self) -> list[JournalRecord]:
        """The last records of the journal."""
        return read_tail(self.folder)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric in these records."""
        values: dict[str, float] = {}
        for record in self.records:
            if record["kind"] == "metrics":
                values |= record["values"]
            elif record["name"] == "resumed":
                values.pop(SPEED_METRIC, None)  # Of an earlier process.
        return values

    @property
    def recorded_at(self) -> float | None:
        """Time of the last record in seconds."""
        return self.records[-1]["time"] / 1000 if self.records else None

    @property
    def seconds_left(self) -> float | None:
        """Time of the remaining steps at the last speed; None before this process's first
        record."""
        speed = self.metrics.get(SPEED_METRIC)
        if not self.job or not speed:
            return None
        return max(0, self.num_steps - self.step) * self.job.recipe.num_tokens_per_step / speed

    # Who works on it

    @cached_property
    def lock(self) -> Path | None:
        """The lock that a process holds now; None if no process works here."""
        return next(filter(is_locked, run_locks(self.folder)), None)


def run_locks(folder: Path) -> tuple[Path, Path]:
    """Return the files that processes lock while they train or measure in a folder."""
    return folder / RUN_LOCK_NAME, folder / WORKERS_LOCK_NAME


def is_in_use(folder: Path) -> bool:
    """Return whether a process trains or measures in a folder."""
    return any(map(is_locked, run_locks(folder)))
