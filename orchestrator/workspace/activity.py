"""Say what runs in a workspace now: locks that are held, and progress from journals.

Like a listing, this only reads small files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.inventory import (
    Note,
    StoredTraining,
    StoredTrial,
    sweep_progress,
    training_folders,
    trials_by_folder,
)
from orchestrator.workspace.journal import SPEED_METRIC
from orchestrator.workspace.locks import is_locked, lock_holder
from orchestrator.workspace.names import OUTBOX_NAME, WORKERS_LOCK_NAME

SECONDS_OF_ANSWERS = 120.0
"""An evaluation holds no lock; one that stored answers in this time counts as running."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Something that a process does now."""

    kind: Literal[
        "command", "queued", "training", "measuring", "preparing", "teacher outputs", "evaluating"
    ]
    """What it does; a `queued` training waits for its turn, `measuring` is the end of a trial."""
    name: str
    """The command, or run or trial, relative to the workspace."""
    process: int | None = None
    """Id of the process, if it is known: it runs on this machine."""
    sweeps: tuple[str, ...] = ()
    """Sweeps that the trial is part of."""
    label: str | None = None
    """Name of the trial in its sweep."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    """Latest training loss."""
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """Estimate of the time to the last step."""
    seconds_since_record: float | None = None
    """Time since the last line of its journal; long if it hangs."""


@dataclass(frozen=True, kw_only=True)
class RunningSweep:
    """A sweep with a trial that runs now."""

    name: str
    finished: int
    """Trials that have ended."""
    trials: int
    seconds_left: float | None
    """Estimate: trials that are left, as long as the finished ones took."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What runs in a workspace now."""

    activities: tuple[Activity, ...]
    sweeps: tuple[RunningSweep, ...]
    pending_records: int
    """Records that wait for MLflow; `iiet-orch sync` delivers them."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values of `status --json`."""
        return asdict(self)


def read_status(
    workspace: Workspace, note: Note = lambda _: None, now: float | None = None
) -> Status:
    """Return what runs in a workspace at a time, in seconds since 1970 (default: now)."""
    now = time.time() if now is None else now
    trainings = _trainings(workspace, now, note)
    others = (*_other_locks(workspace), *_evaluations(workspace, now))
    commands = _commands(workspace)
    names = dict.fromkeys(name for activity in trainings for name in activity.sweeps)
    return Status(
        activities=(*commands, *trainings, *others),
        sweeps=tuple(_running_sweep(workspace.sweeps / name, trainings) for name in names),
        pending_records=pending_records(workspace),
    )


def pending_records(workspace: Workspace) -> int:
    """Return the number of records that wait for MLflow."""
    with suppress(OSError):
        return (workspace.root / OUTBOX_NAME).read_bytes().count(b"\n")
    return 0


def is_idle(workspace: Workspace) -> bool:
    """Return whether no process is known to work in a workspace."""
    return not read_status(workspace).activities


def seconds_left(training: StoredTraining) -> float | None:
    """Estimate the time to the last step of a running training; None before its first steps.

    A step counts as its field evaluations: corrections that are still off will make it slower.
    """
    speed = training.metrics.get(SPEED_METRIC)
    if not speed or not training.job:
        return None
    model, recipe = training.job.model, training.job.recipe
    first_corrected = round(training.num_steps * recipe.iterate_from_fraction)
    full = (model.num_layers + sum(model.schedule)) / model.num_layers
    left = max(0, training.num_steps - training.step)
    plain = max(0, min(left, first_corrected - training.step))
    now = 1.0 if training.step <= first_corrected and first_corrected else full
    work = (plain + (left - plain) * full) / now
    return work * recipe.num_tokens_per_step / speed


def _trainings(workspace: Workspace, now: float, note: Note) -> list[Activity]:
    stored = [StoredTraining(folder, note) for folder in training_folders(workspace)]
    running = [(training, lock) for training in stored if (lock := training.lock)]
    planned = trials_by_folder(workspace, note) if running else {}
    found = []
    for training, lock in running:
        own, records = planned.get(training.folder, []), training.records
        kind: Literal["queued", "training", "measuring"] = "queued"
        if is_locked(training.folder / WORKERS_LOCK_NAME):
            kind = "training"
        elif training.is_finished or (own and not own[0][1].job):
            kind = "measuring"
        found.append(
            Activity(
                kind=kind,
                name=str(training.folder.relative_to(workspace.root)),
                process=lock_holder(lock),
                sweeps=tuple(sweep for sweep, _ in own),
                label=own[0][1].label or None if own else None,
                step=training.step,
                steps=training.num_steps or None,
                loss=training.metrics.get("train/loss"),
                tokens_per_second=(
                    training.metrics.get(SPEED_METRIC) if kind == "training" else None
                ),
                seconds_left=seconds_left(training) if kind == "training" else None,
                seconds_since_record=now - records[-1]["time"] / 1000 if records else None,
            )
        )
    return found


def _commands(workspace: Workspace) -> Iterator[Activity]:
    for log in sorted(workspace.logs.glob("*.log")):  # Such as `DATE-TIME-pretrain-4711.log`.
        if is_locked(log):
            name = log.stem.split("-", 2)[-1].rpartition("-")[0]
            yield Activity(kind="command", name=name, process=lock_holder(log))


def _other_locks(workspace: Workspace) -> Iterator[Activity]:
    if is_locked(lock := workspace.tokens / ".lock"):
        yield Activity(kind="preparing", name="tokens", process=lock_holder(lock))
    for lock in sorted(workspace.teachers.glob(".*.lock")):
        if is_locked(lock):
            key = lock.name.removeprefix(".").removesuffix(".lock")
            name = f"teachers/{key}"
            yield Activity(kind="teacher outputs", name=name, process=lock_holder(lock))


def _evaluations(workspace: Workspace, now: float) -> Iterator[Activity]:
    for path in sorted(workspace.evaluations.glob("*.answers")):
        age = now - path.stat().st_mtime
        if age < SECONDS_OF_ANSWERS:
            name = str(path.relative_to(workspace.root))
            yield Activity(kind="evaluating", name=name, seconds_since_record=age)


def _running_sweep(folder: Path, trainings: list[Activity]) -> RunningSweep:
    progress = sweep_progress(folder, lambda _: None)  # Noted already.
    finished, left = progress.finished, progress.left
    seconds = [s for trial in finished if (s := _train_seconds(folder, trial))]
    at_once = sum(folder.name in activity.sweeps for activity in trainings)
    estimate = len(left) / max(1, at_once) * sum(seconds) / len(seconds) if seconds else None
    return RunningSweep(
        name=folder.name,
        finished=len(finished),
        trials=len(finished) + len(left),
        seconds_left=estimate,
    )


def _train_seconds(sweep: Path, trial: StoredTrial) -> float | None:
    outcome = StoredTraining(sweep.parents[1] / trial.folder).outcome
    return outcome.train_seconds if trial.job and outcome else None
