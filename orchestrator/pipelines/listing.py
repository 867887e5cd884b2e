"""List what a workspace holds, and show what runs in it: runs, trials, sweeps and models.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run. Anyone may have edited a file, so what is read is
checked here, once: a damaged file is noted, and the rest is listed.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from orchestrator.pipelines.result import Result
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.terminal.render import (
    format_bytes,
    format_count,
    format_duration,
    shortest_schedule,
)
from orchestrator.workspace import layout
from orchestrator.workspace.errors import UserError, first_problem
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import SPEED_METRIC, VALIDATION_METRIC, last_recorded, read_tail
from orchestrator.workspace.layout import KINDS, Kind, Workspace, find_checkpoints
from orchestrator.workspace.locks import is_locked, lock_holder

if TYPE_CHECKING:
    from rich.console import RenderableType

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
        self.outcome = end = _read(folder / layout.DONE_NAME, _Outcome, damage.append)
        if end and not self.job and not damage:
            damage.append(f"{folder / layout.JOB_NAME} is missing")
        for sentence in damage:
            note(sentence)
        self.is_damaged = bool(damage)
        self.lock = next(filter(is_locked, run_locks(folder)), None)
        """The lock that a process holds now; None if none runs here."""
        self.saved = find_checkpoints(folder)
        self.records = read_tail(folder)
        self.metrics: dict[str, float] = {}
        """The last value of each metric in these records."""
        self.step = layout.step_of(self.saved[-1]) if self.saved else 0
        """Last step in its journal, or of its newest checkpoint."""
        for record in self.records:
            if record["kind"] == "metrics":
                self.step = max(self.step, record["step"])
                self.metrics |= record["values"]
            elif record["name"] == "resumed":
                self.metrics.pop(SPEED_METRIC, None)  # That of the process before.
        self.num_steps = self.job.num_steps if self.job else 0
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
            return "imported" if self.saved else "empty"
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


class _Sweep:
    """The plan of a sweep, and which of its trials have ended; none if it cannot be read."""

    def __init__(self, folder: Path, note: Note = lambda _: None) -> None:
        plan = _read(folder / layout.PLAN_FILE, _Plan, note) or _Plan()
        self.folder, self.kind, self.trials = folder, plan.kind, plan.trials
        self.finished: list[_Trial] = []
        self.left: list[_Trial] = []
        for trial in plan.trials:
            names = f"result-{trial.key}.json", layout.STOPPED_NAME
            has_ended = any((self.run_of(trial) / name).exists() for name in names)
            (self.finished if has_ended else self.left).append(trial)

    def run_of(self, trial: _Trial) -> Path:
        """Return the folder of a trial."""
        return self.folder.parents[1] / trial.folder


def _trials_by_folder(workspace: Workspace, note: Note) -> dict[Path, list[tuple[str, _Trial]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    found: dict[Path, list[tuple[str, _Trial]]] = {}
    for sweep in (_Sweep(folder, note) for folder in folders_in(workspace.sweeps)):
        for trial in sweep.trials:
            found.setdefault(sweep.run_of(trial), []).append((sweep.folder.name, trial))
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


def noted_once(note: Note) -> Note:
    """Return a function that passes each sentence on once: a plan is read several times."""
    said: set[str] = set()

    def say(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            note(sentence)

    return say


# What exists


class Entry(Result):
    """One thing in the workspace. What else is known of it are further fields."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Its name, as commands take it."""
    state: str
    """How far it is, such as `finished`, `running` or `stopped at 40/100`."""
    bytes: int
    """Size of its files."""
    changed: float
    """Seconds since 1970 of the last record, or of the folder."""


_COLUMNS = (
    Column("name", is_text=True),
    Column("label", is_text=True),
    Column("state", is_text=True),
    Column("model", priority=2, is_text=True),
    Column("loss", priority=2),
    Column("size"),
    Column("changed", priority=1, is_text=True),
)


class Listing(Result):
    """What a workspace holds."""

    merged = ("entries",)

    workspace: str
    entries: dict[Kind, list[Entry]]
    """The newest first."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each entry."""
        found = self.entries.items()
        return [{"kind": kind, **entry.to_json()} for kind, group in found for entry in group]

    def shown(self) -> Iterator[RenderableType]:
        """Return a table for each kind; a narrow one leaves loss and model out."""
        for kind, entries in self.entries.items():
            size = f", {format_bytes(sum(entry.bytes for entry in entries))}" if entries else ""
            yield f"{'exported models' if kind == 'models' else kind}: {len(entries)}{size}"
            rows = []
            for entry in entries:
                details, state = entry.model_extra or {}, entry.state
                if trials := details.get("trials"):
                    state += f", {details['finished']}/{trials} trials"
                schedule, loss = details.get("schedule"), details.get("validation_loss")
                corrections = shortest_schedule(schedule) if schedule and any(schedule) else ""
                cells = (
                    entry.name,
                    details.get("label", ""),
                    state,
                    f"{details.get('method', '')} {corrections}".strip(),
                    "" if loss is None else f"{loss:.4g}",
                    format_bytes(entry.bytes),
                    f"{datetime.fromtimestamp(entry.changed):%Y-%m-%d %H:%M}",
                )
                rows.append(cells)
            filled = [n for n in range(len(_COLUMNS)) if any(cells[n] for cells in rows)]
            if entries:
                yield Table(
                    [_COLUMNS[n] for n in filled],
                    [TableRow([cells[n] for n in filled]) for cells in rows],
                )
            else:
                yield ""


def list_workspace(
    workspace: Workspace,
    kind: Kind | None = None,
    *,
    with_checkpoints: bool = False,
    note: Note = lambda _: None,
) -> Listing:
    """Return what a workspace holds; `note` is called once with a sentence on each damaged file."""
    kinds = [kind] if kind else [k for k in KINDS if with_checkpoints or k != "checkpoints"]
    note = noted_once(note)
    found: dict[Kind, list[Entry]] = {}
    for each in kinds:
        finder = _FINDERS.get(each) or _trainings
        found[each] = sorted(finder(workspace, each, note), key=lambda e: e.changed, reverse=True)
    return Listing(workspace=str(workspace.root), entries=found)


def _entry(name: str, folder: Path, state: str, **details: Any) -> Entry:
    size, changed = size_of(folder), round(last_recorded(folder), 3)
    return Entry(name=name, state=state, bytes=size, changed=changed, **details)


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
        yield _entry(folder.name, folder, state, **known)


def _sweeps(workspace: Workspace, _: Kind, note: Note) -> Iterator[Entry]:
    for folder in folders_in(workspace.sweeps):
        damage: list[str] = []
        sweep = _Sweep(folder, damage.append)
        for sentence in damage:
            note(sentence)
        if damage or not sweep.trials:
            state = "damaged" if damage else "without a plan"
        elif any(is_locked(lock) for one in sweep.left for lock in run_locks(sweep.run_of(one))):
            state = "running"
        else:
            state = "interrupted" if sweep.left else "finished"
        yield _entry(
            folder.name,
            folder,
            state,
            kind=sweep.kind,
            finished=len(sweep.finished),
            trials=len(sweep.trials),
            has_report=(folder / layout.RESULTS_FILE).is_file(),
        )


def _checkpoints(workspace: Workspace, _: Kind, __: Note) -> Iterator[Entry]:
    for folder in training_folders(workspace):
        for checkpoint in find_checkpoints(folder):
            is_complete = (checkpoint / layout.PROVENANCE).is_file()
            name = str(checkpoint.relative_to(workspace.root))
            yield _entry(name, checkpoint, "complete" if is_complete else "damaged")


def _models(workspace: Workspace, _: Kind, __: Note) -> Iterator[Entry]:
    for config in sorted(workspace.exports.glob("**/config.json")):
        yield _entry(str(config.parent.relative_to(workspace.root)), config.parent, "exported")


_FINDERS = {"sweeps": _sweeps, "checkpoints": _checkpoints, "models": _models}


# What runs


class Activity(Result):
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

    def shown(self) -> Iterator[str]:
        """Return a sentence."""
        sweeps, age = ", ".join(self.sweeps), self.seconds_since_record
        facts = [f"{self.label} in {sweeps}" if sweeps else ""]
        if self.kind in ("queued", "training") and self.steps:
            speed, left = self.tokens_per_second, self.seconds_left
            facts += [
                f"step {self.step or 0:,} of {self.steps:,}",
                f"loss {self.loss:.4g}" if self.loss is not None else "",
                f"{speed:,.0f} tokens/s" if speed else "",
                f"{format_duration(left)} left" if left is not None else "",
            ]
        facts.append(f"last record {format_duration(age)} ago" if age and age >= 60 else "")
        facts.append(f"process {self.process}" if self.process else "")
        yield f"{self.kind} {self.name}: {', '.join(filter(None, facts))}"


class RunningSweep(Result):
    """A sweep with a trial that runs now."""

    name: str
    finished: int
    """Trials that have ended."""
    trials: int
    seconds_left: float | None
    """Estimate: trials that are left, as long as the finished ones took."""

    def shown(self) -> Iterator[str]:
        """Return a sentence."""
        left = self.seconds_left and f", about {format_duration(self.seconds_left)} left"
        done = f"{self.finished} of {format_count(self.trials, 'trial')} finished"
        yield f"sweep {self.name}: {done}{left or ''}"


class WorkspaceStatus(Result):
    """What runs in a workspace now."""

    workspace: str
    activities: tuple[Activity, ...]
    sweeps: tuple[RunningSweep, ...]

    def shown(self) -> Iterator[RenderableType]:
        """Return a sentence for each sweep and each activity."""
        if not self.activities:
            yield f"nothing runs in {self.workspace}"
        for part in (*self.sweeps, *self.activities):
            yield from part.shown()


def show_status(workspace: Workspace, *, note: Note = lambda _: None) -> WorkspaceStatus:
    """Return what runs in a workspace now; `note` as in `list_workspace`."""
    trainings = _running_trainings(workspace, noted_once(note))
    names = dict.fromkeys(name for activity in trainings for name in activity.sweeps)
    return WorkspaceStatus(
        workspace=str(workspace.root),
        activities=(*_running_commands(workspace), *trainings, *_other_work(workspace)),
        sweeps=tuple(_running_sweep(workspace.sweeps / name, trainings) for name in names),
    )


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
    for log in filter(is_locked, sorted(workspace.logs.glob("*.log"))):
        # Such as `DATE-TIME-pretrain-4711.log`.
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
    sweep = _Sweep(folder)  # Its damage is noted already.
    ends = [_Training(sweep.run_of(trial)).outcome for trial in sweep.finished if trial.job]
    seconds = [end.train_seconds for end in ends if end and end.train_seconds]
    at_once = sum(folder.name in activity.sweeps for activity in trainings)
    estimate = len(sweep.left) / max(1, at_once) * sum(seconds) / len(seconds) if seconds else None
    return RunningSweep(
        name=folder.name,
        finished=len(sweep.finished),
        trials=len(sweep.trials),
        seconds_left=estimate,
    )
