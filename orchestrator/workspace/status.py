"""What a workspace holds and what runs in it: runs, trials, sweeps and models; locks and progress.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run. Anyone may have edited a file, so what is read is
checked here, once: a damaged file is noted, and the rest is listed.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasPath, BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from orchestrator.workspace import layout
from orchestrator.workspace.errors import UserError, first_problem
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import SPEED_METRIC, VALIDATION_METRIC, last_recorded, read_tail
from orchestrator.workspace.layout import Kind, Workspace, find_checkpoints
from orchestrator.workspace.locks import is_locked, lock_holder

SECONDS_OF_ANSWERS = 120.0
"""An evaluation holds no lock; one that stored answers in this time counts as running."""

Note = Callable[[str], None]
"""Called with a sentence on each damaged file."""


# What is read of stored records


class _Stored(BaseModel, strict=True):
    pass


T = TypeVar("T", bound=_Stored)
_PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


def _of_job(*names: str, **options: Any) -> Any:
    return Field(validation_alias=AliasPath("job", *names), **options)


class _Job(_Stored):
    method: str = _of_job("model", "method")
    schedule: list[NonNegativeInt] = _of_job("model", "schedule")
    num_layers: PositiveInt = _of_job("model", "num_layers")
    num_steps: PositiveInt = _of_job("recipe", "num_steps")
    num_tokens_per_step: PositiveInt = _of_job("recipe", "num_tokens_per_step")
    iterate_from_fraction: float = _of_job("recipe", "iterate_from_fraction", default=0.0)


class _Outcome(_Stored):
    step: NonNegativeInt
    finished: bool
    validation_loss: float = nan
    train_seconds: float = 0.0


class _Trial(_Stored):
    key: _PathText
    folder: _PathText
    label: str = ""
    job: dict[str, Any] | None = None


class _Plan(_Stored):
    kind: str | None = None
    trials: list[_Trial] = []


def _read(path: Path, kind: type[T], note: Note) -> T | None:
    """Return the checked fields of a file; None if it is missing, or damaged, which is noted."""
    try:
        found = read_json(path)
        return None if found is None else kind.model_validate(found)
    except UserError as error:
        note(str(error))
    except ValidationError as error:
        note(f"{path} is damaged ({first_problem(error)})")
    return None


class _Training:
    """What the folder of a run or trial says about its training."""

    def __init__(self, folder: Path, note: Note = lambda _: None) -> None:
        """Read the folder; damaged files are noted, and as good as missing."""
        self.folder = folder
        damage: list[str] = []
        self.job = _read(folder / layout.JOB_NAME, _Job, damage.append)
        self.outcome = _read(folder / layout.DONE_NAME, _Outcome, damage.append)
        if self.outcome and not self.job and not damage:
            damage.append(f"{folder / layout.JOB_NAME} is missing")
        for sentence in damage:
            note(sentence)
        self.is_damaged = bool(damage)
        self.lock = next(filter(is_locked, run_locks(folder)), None)
        """The lock that a process holds now; None if none runs here."""
        self.records = read_tail(folder)
        self.metrics: dict[str, float] = {}
        """The last value of each metric in these records."""
        saved = find_checkpoints(folder)
        self.step = layout.step_of(saved[-1]) if saved else 0
        """Last step in its journal, or of its newest checkpoint."""
        for record in self.records:
            if record["kind"] == "metrics":
                self.step = max(self.step, record["step"])
                self.metrics |= record["values"]
            elif record["name"] == "resumed":
                self.metrics.pop(SPEED_METRIC, None)  # That of the process before.
        self.num_steps = self.job.num_steps if self.job else 0
        end = self.outcome
        self.is_finished = bool(
            end and end.finished and (folder / layout.checkpoint_name(end.step)).is_dir()
        )

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
            return "imported" if find_checkpoints(self.folder) else "empty"
        events = [record for record in self.records if record["kind"] == "event"]
        verb = "diverged" if events and events[-1]["name"] == "diverged" else "stopped"
        return f"{verb} at {self.step:,}/{self.num_steps:,}"

    def seconds_left(self) -> float | None:
        """Estimate the time to the last step; None before the first steps of this process.

        A step counts as its field evaluations: corrections that are still off will make it slower.
        """
        speed, job = self.metrics.get(SPEED_METRIC), self.job
        if not speed or not job:
            return None
        first_corrected = round(job.num_steps * job.iterate_from_fraction)
        full = (job.num_layers + sum(job.schedule)) / job.num_layers
        left = max(0, job.num_steps - self.step)
        plain = max(0, min(left, first_corrected - self.step))
        now = 1.0 if self.step <= first_corrected and first_corrected else full
        return (plain + (left - plain) * full) / now * job.num_tokens_per_step / speed


@dataclass(frozen=True)
class _SweepProgress:
    kind: str | None
    finished: list[_Trial]
    left: list[_Trial]


def _sweep_progress(folder: Path, note: Note) -> _SweepProgress:
    """Return which trials of a sweep's plan have ended; there are none if it cannot be read."""
    plan = _read(folder / layout.PLAN_FILE, _Plan, note) or _Plan()
    progress = _SweepProgress(plan.kind, [], [])
    for trial in plan.trials:
        run = folder.parents[1] / trial.folder
        has_ended = any(
            (run / n).exists() for n in (f"result-{trial.key}.json", layout.STOPPED_NAME)
        )
        (progress.finished if has_ended else progress.left).append(trial)
    return progress


def _trials_by_folder(workspace: Workspace, note: Note) -> dict[Path, list[tuple[str, _Trial]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    found: dict[Path, list[tuple[str, _Trial]]] = {}
    for sweep in folders_in(workspace.sweeps):
        progress = _sweep_progress(sweep, note)
        for trial in (*progress.finished, *progress.left):
            found.setdefault(workspace.root / trial.folder, []).append((sweep.name, trial))
    return found


# What exists


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


def list_entries(workspace: Workspace, kind: Kind, note: Note) -> list[Entry]:
    """Return everything of one kind, the newest first."""
    finders = {"sweeps": _sweeps, "checkpoints": _checkpoints, "models": _models}
    found = finders[kind](workspace, note) if kind in finders else _trainings(workspace, kind, note)
    return sorted(found, key=lambda entry: entry.changed, reverse=True)


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in another one by name, without temporary ones, which begin with a dot."""
    return sorted(p for p in parent.glob("*") if p.is_dir() and not p.name.startswith("."))


def training_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of all runs and trials."""
    return [*folders_in(workspace.runs), *folders_in(workspace.trials)]


def run_locks(folder: Path) -> tuple[Path, Path]:
    """Return the files that processes lock while they train or measure in a folder."""
    return folder / layout.RUN_LOCK_NAME, folder / layout.WORKERS_LOCK_NAME


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


def _entry(name: str, folder: Path, state: str, details: Mapping[str, Any] = {}) -> Entry:
    size, changed = size_of(folder), last_recorded(folder)
    return Entry(name=name, state=state, num_bytes=size, changed=changed, details=details)


def _trainings(workspace: Workspace, kind: Kind, note: Note) -> Iterator[Entry]:
    planned = _trials_by_folder(workspace, note) if kind == "trials" else {}
    for folder in folders_in(workspace.root / kind):
        training = _Training(folder, note)
        job, end, state = training.job, training.outcome, training.state()
        # A trial without a training holds the results of a model that was trained elsewhere.
        if kind == "trials" and state in ("finished", "empty"):
            state = "finished" if any(folder.glob("result-*.json")) else "to measure"
        loss = end.validation_loss if end else training.metrics.get(VALIDATION_METRIC)
        details: dict[str, Any] = {
            "method": job and job.method,
            "schedule": job and job.schedule,
            "step": (end and end.step) or training.step or None,
            "steps": training.num_steps or None,
            "validation_loss": loss,
        }
        if own := planned.get(folder):
            details |= {"label": own[0][1].label, "sweeps": [sweep for sweep, _ in own]}
        known = {name: value for name, value in details.items() if value is not None}
        yield _entry(folder.name, folder, state, known)


def _sweeps(workspace: Workspace, note: Note) -> Iterator[Entry]:
    for folder in folders_in(workspace.sweeps):
        damage: list[str] = []
        progress = _sweep_progress(folder, damage.append)
        for sentence in damage:
            note(sentence)
        runs = [workspace.root / trial.folder for trial in progress.left]
        total = len(progress.finished) + len(runs)
        if damage or not total:
            state = "damaged" if damage else "without a plan"
        elif any(is_locked(lock) for run in runs for lock in run_locks(run)):
            state = "running"
        else:
            state = "interrupted" if runs else "finished"
        details = {
            "kind": progress.kind,
            "finished": len(progress.finished),
            "trials": total,
            "has_report": (folder / layout.RESULTS_FILE).is_file(),
        }
        yield _entry(folder.name, folder, state, details)


def _checkpoints(workspace: Workspace, _: Note) -> Iterator[Entry]:
    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder):
            is_complete = (checkpoint / layout.PROVENANCE).is_file()
            name = str(checkpoint.relative_to(workspace.root))
            yield _entry(name, checkpoint, "complete" if is_complete else "damaged")


def _models(workspace: Workspace, _: Note) -> Iterator[Entry]:
    for config in sorted(workspace.exports.glob("**/config.json")):
        name = str(config.parent.relative_to(workspace.root))
        yield _entry(name, config.parent, "exported")


# What runs


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


def read_status(workspace: Workspace, note: Note = lambda _: None) -> Status:
    """Return what runs in a workspace now."""
    trainings = _running_trainings(workspace, note)
    names = dict.fromkeys(name for activity in trainings for name in activity.sweeps)
    return Status(
        activities=(*_running_commands(workspace), *trainings, *_other_work(workspace)),
        sweeps=tuple(_running_sweep(workspace.sweeps / name, trainings) for name in names),
        pending_records=pending_records(workspace),
    )


def pending_records(workspace: Workspace) -> int:
    """Return the number of records that wait for MLflow."""
    with suppress(OSError):
        return (workspace.root / layout.OUTBOX_NAME).read_bytes().count(b"\n")
    return 0


def _running_trainings(workspace: Workspace, note: Note) -> list[Activity]:
    stored = [_Training(folder, note) for folder in training_folders(workspace)]
    running = [(training, training.lock) for training in stored if training.lock]
    planned = _trials_by_folder(workspace, note) if running else {}
    found = []
    for training, lock in running:
        own, records = planned.get(training.folder, []), training.records
        kind: Literal["queued", "training", "measuring"] = "queued"
        if is_trained := is_locked(training.folder / layout.WORKERS_LOCK_NAME):
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
                tokens_per_second=training.metrics.get(SPEED_METRIC) if is_trained else None,
                seconds_left=training.seconds_left() if is_trained else None,
                seconds_since_record=time.time() - records[-1]["time"] / 1000 if records else None,
            )
        )
    return found


def _running_commands(workspace: Workspace) -> Iterator[Activity]:
    for log in sorted(workspace.logs.glob("*.log")):  # Such as `DATE-TIME-pretrain-4711.log`.
        if is_locked(log):
            name = log.stem.split("-", 2)[-1].rpartition("-")[0]
            yield Activity(kind="command", name=name, process=lock_holder(log))


def _other_work(workspace: Workspace) -> Iterator[Activity]:
    if is_locked(lock := workspace.tokens / ".lock"):
        yield Activity(kind="preparing", name="tokens", process=lock_holder(lock))
    for lock in filter(is_locked, sorted(workspace.teachers.glob(".*.lock"))):
        name = f"teachers/{lock.name.removeprefix('.').removesuffix('.lock')}"
        yield Activity(kind="teacher outputs", name=name, process=lock_holder(lock))
    for path in sorted(workspace.evaluations.glob("*.answers")):
        if (age := time.time() - path.stat().st_mtime) < SECONDS_OF_ANSWERS:
            name = str(path.relative_to(workspace.root))
            yield Activity(kind="evaluating", name=name, seconds_since_record=age)


def _running_sweep(folder: Path, trainings: list[Activity]) -> RunningSweep:
    progress = _sweep_progress(folder, lambda _: None)  # Noted already.
    finished, left = progress.finished, progress.left
    ends = [_Training(folder.parents[1] / trial.folder).outcome for trial in finished if trial.job]
    seconds = [end.train_seconds for end in ends if end and end.train_seconds]
    at_once = sum(folder.name in activity.sweeps for activity in trainings)
    estimate = len(left) / max(1, at_once) * sum(seconds) / len(seconds) if seconds else None
    return RunningSweep(
        name=folder.name,
        finished=len(finished),
        trials=len(finished) + len(left),
        seconds_left=estimate,
    )
