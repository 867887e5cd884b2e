"""List what a workspace holds, show what runs in it, and delete what it no longer needs.

PyTorch is imported only to read checkpoints. Finished weights, files of evaluations, and files in
use are never listed for deletion. Before a deletion everything is checked again, and locked.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import cache
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from orchestrator.records.influence import INFLUENCE_PATTERN
from orchestrator.records.status import (
    Note,
    begun_without_trials,
    folders_in,
    has_failed,
    seconds_left,
    size_of,
    sweep_plans,
    training_folders,
    trials_by_folder,
    unfinished_trials,
)
from orchestrator.records.training_state import Training, TrainingState, is_in_use, run_locks
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.output import Result
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.settings import SETTINGS_NAME
from orchestrator.terminal import render
from orchestrator.workspace import files, layout
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.journal import SPEED_METRIC, VALIDATION_METRIC, last_recorded
from orchestrator.workspace.layout import KINDS, Kind, RemovableKind, Workspace, find_checkpoints
from orchestrator.workspace.locks import is_locked, lock_file, lock_holder

if TYPE_CHECKING:
    from rich.console import RenderableType

SECONDS_OF_WRITING = 3600.0
"""Longest time of writing a file; an older temporary file was left by a killed process."""


class Candidate(NamedTuple):
    """Something that can be deleted."""

    path: Path
    reason: str
    locks: tuple[Path, ...] = ()
    """Files to lock while it is deleted."""


# List


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
    """Folder of the workspace."""
    entries: dict[Kind, list[dict[str, Any]]]
    """(optional) The newest first. An entry has `name`, as commands take it (for a checkpoint or
    model the path in the workspace); `state`, such as `finished`, `running`, `damaged` or
    `stopped at STEP/STEPS`, for a sweep also `failed`; `bytes`, the size of its files; `changed`,
    the time of its last record in seconds since 1970. A training has `method`, `schedule`, `step`,
    `steps` and `validation_loss`, if known. A trial has `label`, its name in its first sweep, and
    `sweeps`, all sweeps that plan it. A sweep has `kind`, `finished` and `trials` (numbers of ended
    and of planned trials), `has_report`, and `command`, which resumes it if it was interrupted
    before its trials were known."""

    def shown(self) -> Iterator[RenderableType]:
        for kind, entries in self.entries.items():
            total = render.format_bytes(sum(entry["bytes"] for entry in entries))
            # Exports to folders outside the workspace are not listed.
            title = "models in exports/" if kind == "models" else kind
            yield f"{title}: {len(entries)}" + (f", {total}" if entries else "")
            rows = []
            for entry in entries:
                trials = entry.get("trials")
                schedule = entry.get("schedule") or ()
                num_finished = f", {entry['finished']} of {trials}" if trials else ""
                corrections = render.shortest_schedule(schedule) if schedule else ""
                loss = entry.get("validation_loss")
                when = datetime.fromtimestamp(entry["changed"])
                cells = [
                    entry["name"],
                    entry.get("label", ""),
                    entry["state"] + num_finished,
                    f"{entry.get('method', '')} {corrections}".strip(),
                    "" if loss is None else f"{loss:.4g}",
                    render.format_bytes(entry["bytes"]),
                    f"{when:%Y-%m-%d %H:%M}",
                ]
                rows.append(cells)
            if not entries:
                yield ""
                continue
            columns = list(zip(*rows, strict=True))
            filled = [number for number, cells in enumerate(columns) if any(cells)]
            shown_rows = [TableRow([cells[number] for number in filled]) for cells in rows]
            yield Table([_COLUMNS[number] for number in filled], shown_rows)
            for entry in entries:
                if "command" in entry:
                    yield f"to resume {entry['name']}: {entry['command']}"


def list_workspace(
    workspace: Workspace,
    kind: Kind | None = None,
    *,
    with_checkpoints: bool = False,
    note: Note = lambda _: None,
) -> Listing:
    """Return what a workspace holds; `note` is called once with a sentence on each damaged file."""
    listed_kinds = [kind] if kind else list(KINDS)
    if not (kind or with_checkpoints):
        listed_kinds.remove("checkpoints")
    note = cache(note)
    plans = sweep_plans(workspace, note) if {"sweeps", "trials"} & {*listed_kinds} else {}
    entries_by_kind = dict[Kind, list[dict[str, Any]]]()
    for listed_kind in listed_kinds:
        entries = []
        for entry in _find_entries(workspace, listed_kind, plans, note):
            values: dict[str, Any] = {
                "name": entry.name,
                "state": entry.state,
                "bytes": size_of(entry.folder),
                "changed": round(last_recorded(entry.folder), 3),
            }
            known = {key: value for key, value in entry.details.items() if value is not None}
            entries.append(values | known)
        entries.sort(key=itemgetter("changed"), reverse=True)
        entries_by_kind[listed_kind] = entries
    return Listing(workspace=str(workspace.root), entries=entries_by_kind)


class _Entry(NamedTuple):
    """Something that a workspace holds, as `Listing.entries` describes it."""

    name: str
    folder: Path
    state: str
    details: dict[str, Any]
    """Further fields; None if a value is unknown."""


def _find_entries(
    workspace: Workspace, kind: Kind, plans: Mapping[str, SweepTrials | None], note: Note
) -> Iterator[_Entry]:
    """Yield everything of a kind."""
    if kind == "models":
        for config in sorted(workspace.exports.glob("**/config.json")):
            name = str(config.parent.relative_to(workspace.root))
            yield _Entry(name, config.parent, "exported", {})
    elif kind == "checkpoints":
        for folder in training_folders(workspace):
            for checkpoint in find_checkpoints(folder):
                name = str(checkpoint.relative_to(workspace.root))
                is_complete = (checkpoint / layout.PROVENANCE).is_file()
                yield _Entry(name, checkpoint, "complete" if is_complete else "damaged", {})
    elif kind == "sweeps":
        for name, plan in plans.items():
            yield _sweep_entry(workspace, name, plan)
    else:
        planned = trials_by_folder(plans) if kind == "trials" else {}
        for folder in folders_in(workspace.root / kind):
            training = _readable_training(folder, note)
            if training is None:
                yield _Entry(folder.name, folder, "damaged", {})
                continue
            state = _trial_state_text(training) if kind == "trials" else _state_text(training)
            yield _training_entry(training, state, planned.get(folder, []))


def _sweep_entry(workspace: Workspace, name: str, plan: SweepTrials | None) -> _Entry:
    """Return the entry of a sweep; without an intact plan it has no details."""
    folder = workspace.sweeps / name
    command = None
    trials = plan.trials if plan else ()
    unfinished = unfinished_trials(plan) if plan else []
    if plan is None:
        has_plan = (folder / layout.PLAN_FILE).exists()
        begun = None if has_plan else begun_without_trials(folder)
        state = "damaged" if has_plan else "without a plan"
        if begun is not None:
            state = "interrupted"
            command = _command_of(workspace, folder, begun)
        if not has_plan and is_locked(folder / layout.SWEEP_LOCK_NAME):
            state = "running"
            command = None
    elif any(is_in_use(Path(trial.folder)) for trial in unfinished):
        state = "running"
    elif unfinished:
        state = "failed" if has_failed(folder) else "interrupted"
    else:
        state = "finished"
    details: dict[str, Any] = {
        "kind": plan and plan.kind,
        "finished": len(trials) - len(unfinished),
        "trials": len(trials),
        "has_report": (folder / layout.RESULTS_FILE).is_file(),
        "command": command,
    }
    return _Entry(folder.name, folder, state, details)


def _command_of(workspace: Workspace, folder: Path, begun: Mapping[str, Any]) -> str:
    """Return the command that resumes a sweep that was interrupted before its trials were known."""
    file = str(folder / SETTINGS_NAME)
    words = ["sweep", file]
    if begun["teacher"]:
        teacher = str(workspace.root / begun["teacher"])  # Journals have relative paths.
        options = [word for option in begun["options"].items() for word in option]
        words = ["sweep-threshold", teacher, "--config", file, *options]
    return shlex.join(["iiet-orch", *words, "--workspace", str(workspace.root)])


def _training_entry(
    training: Training, state: str, sweeps_and_trials: Sequence[tuple[str, Trial]]
) -> _Entry:
    """Return the entry of a run, or of a trial with the sweeps that plan it."""
    job = training.job
    outcome = training.outcome
    loss = training.metrics.get(VALIDATION_METRIC)
    details: dict[str, Any] = {
        "method": job and job.model.method,
        "schedule": job and job.schedule and list(job.schedule),
        "step": (outcome.step if outcome else training.step) or None,
        "steps": training.num_steps or None,
        "validation_loss": outcome.validation_loss if outcome else loss,
    }
    if sweeps_and_trials:
        details["label"] = sweeps_and_trials[0][1].label
        details["sweeps"] = [sweep for sweep, _ in sweeps_and_trials]
    return _Entry(training.folder.name, training.folder, state, details)


def _readable_training(folder: Path, note: Note) -> Training | None:
    """Read a training; if it cannot be read, note why."""
    try:
        return Training(folder)
    except UserError as error:
        note(str(error))
        return None


def _state_text(training: Training) -> str:
    """Return the state of a training as text, or that a process works on it."""
    if training.lock:
        return "measuring" if training.outcome else "running"
    if training.state in (TrainingState.STOPPED, TrainingState.DIVERGED):
        return f"{training.state} at {training.step:,}/{training.num_steps:,}"
    return str(training.state)


def _trial_state_text(training: Training) -> str:
    """Return the state of a trial as text: that of its training, then whether it is measured.

    A trial without a training only measures a model that was trained elsewhere.
    """
    is_ready = training.state in (TrainingState.FINISHED, TrainingState.EMPTY)
    if training.lock or not is_ready:
        return _state_text(training)
    return "finished" if any(training.folder.glob("result-*.json")) else "to measure"


# Status


class WorkspaceStatus(Result):
    """What runs in a workspace now."""

    workspace: str
    """Folder of the workspace."""
    activities: list[dict[str, Any]]
    """One entry for each command that runs, and for each training, measurement or preparation:
    `kind` (such as `command`, `training`, or `queued` for one that waits for its turn), `name`,
    `process` (its id, on this machine), `sweeps`, `label`, `step`, `steps`, `loss`,
    `tokens_per_second`, `seconds_left`, `seconds_since_record`, `waits_for` (of a `queued` one)."""
    sweeps: list[dict[str, Any]]
    """Each sweep with a running trial: `name`, `finished`, `trials`, `seconds_left`."""

    def shown(self) -> Iterator[RenderableType]:
        if not self.activities:
            yield f"nothing runs in {self.workspace}"
        for sweep in self.sweeps:
            trials = render.format_count(sweep["trials"], "trial")
            text = f"sweep {sweep['name']}: {sweep['finished']} of {trials} finished"
            if seconds := sweep["seconds_left"]:
                text += f", about {render.format_duration(seconds)} left"
            yield text
        for activity in self.activities:
            sweeps = ", ".join(activity["sweeps"])
            step = activity["step"] or 0
            steps = activity["steps"]
            loss = activity["loss"]
            speed = activity["tokens_per_second"]
            seconds = activity["seconds_left"]
            age = activity["seconds_since_record"] or 0
            facts = [
                f"{activity['label']} in {sweeps}" if sweeps else "",
                f"waits for {activity['waits_for']}" if activity["waits_for"] else "",
                f"step {step:,} of {steps:,}" if steps else "",
                "" if loss is None else f"loss {loss:.4g}",
                f"{speed:,.0f} tokens/s" if speed else "",
                "" if seconds is None else f"{render.format_duration(seconds)} left",
                # A training writes a record every few seconds.
                f"last record {render.format_duration(age)} ago" if age >= 60 else "",
                f"process {activity['process']}" if activity["process"] else "",
            ]
            yield f"{activity['kind']} {activity['name']}: {', '.join(filter(None, facts))}"


def show_status(workspace: Workspace, *, note: Note = lambda _: None) -> WorkspaceStatus:
    """Return what runs in a workspace now; `note` as in `list_workspace`."""
    root = workspace.root
    activities = list[dict[str, Any]]()
    note = cache(note)
    # Fields of a training, empty for other commands.
    progress = ("step", "steps", "loss", "tokens_per_second", "seconds_left")
    unknown = dict.fromkeys(("label", *progress, "seconds_since_record", "waits_for"))
    corpus_locks = workspace.tokens.glob(f"{layout.SOURCES_NAME}/*{layout.CORPUS_LOCK_SUFFIX}")
    locks = [("preparing", "tokens", lock) for lock in sorted(corpus_locks)]
    for log in sorted(workspace.logs.glob("*.log")):  # Such as `DATE-TIME-pretrain-4711.log`.
        locks.append(("command", log.stem.split("-", 2)[-1].rpartition("-")[0], log))
    for kind, name, lock in locks:
        if is_locked(lock):
            known = {"kind": kind, "name": name, "process": lock_holder(lock)}
            activities.append({**known, "sweeps": [], **unknown})

    folders_in_use = filter(is_in_use, training_folders(workspace))
    trainings = [_readable_training(folder, note) for folder in folders_in_use]
    running = [training for training in trainings if training]
    plans = sweep_plans(workspace, note) if running else {}
    planned = trials_by_folder(plans)
    for training in running:
        if not training.lock:  # It ended meanwhile.
            continue
        sweeps_and_trials = planned.get(training.folder, [])
        trial = sweeps_and_trials[0][1] if sweeps_and_trials else None
        is_trained = is_locked(training.folder / layout.WORKERS_LOCK_NAME)
        if is_trained:
            kind = "training"
        elif training.outcome or (trial and not trial.job):
            kind = "measuring"
        else:
            kind = "queued"
        activities.append(
            {
                "kind": kind,
                "name": str(training.folder.relative_to(root)),
                "process": lock_holder(training.lock),
                "sweeps": [sweep for sweep, _ in sweeps_and_trials],
                "label": (trial.label or None) if trial else None,
                "step": training.step,
                "steps": training.num_steps or None,
                "loss": training.metrics.get("train/loss"),
                "tokens_per_second": training.metrics.get(SPEED_METRIC) if is_trained else None,
                "seconds_left": training.seconds_left if is_trained else None,
                "seconds_since_record": time.time() - training.recorded_at
                if training.recorded_at
                else None,
                "waits_for": None,
            }
        )
    for activity in activities:
        if activity["kind"] == "queued":
            # A command trains several models one after another, or as Ray has free slots.
            earlier = [
                other["name"]
                for other in activities
                if other["kind"] == "training" and other["process"] == activity["process"]
            ]
            activity["waits_for"] = ", ".join(earlier) or "Ray to start its workers"

    names = [name for activity in activities for name in activity["sweeps"]]
    sweeps = []
    for name in dict.fromkeys(names):
        plan = plans[name]
        assert plan, "its trials are known"
        num_unfinished = len(unfinished_trials(plan))
        sweeps.append(
            {
                "name": name,
                "finished": len(plan.trials) - num_unfinished,
                "trials": len(plan.trials),
                "seconds_left": seconds_left(plan, names.count(name)),
            }
        )
    return WorkspaceStatus(workspace=str(root), activities=activities, sweeps=sweeps)


# Clean


class Removable(Result):
    """Something that can be deleted."""

    kind: RemovableKind
    """As the command takes it."""
    path: Path
    """Where it is."""
    bytes: int
    """Disk space that its deletion frees; a file with another hard link frees none."""
    reason: str
    """Why it can be deleted, and the cost of making it again."""
    locks: list[Path] = Field(default=[], exclude=True)
    """Files to lock while it is deleted."""


class CleanPlan(Result):
    """What can be deleted, and what was deleted."""

    root: Path = Field(exclude=True)
    found: tuple[Removable, ...]
    """What can be deleted."""
    deleted: tuple[Removable, ...] = ()
    """What was deleted; nothing without `--yes`."""
    is_done: bool = Field(default=False, exclude=True)
    """Whether the deletion was executed, not only planned."""
    refused: str = Field(default="", exclude=True)
    """Why something could not be deleted."""

    @property
    def size(self) -> str:
        """The disk space of everything found, as text."""
        return render.format_bytes(sum(item.bytes for item in self.found))

    def raise_failures(self) -> None:
        if self.refused:
            raise RunFailed(self.refused)

    def shown(self) -> Iterable[str]:
        if self.is_done:
            freed = render.format_bytes(sum(item.bytes for item in self.deleted))
            yield f"deleted {len(self.deleted)} of {len(self.found)}: {freed}"
            return
        if not self.found:
            yield f"nothing to delete in {self.root}"
        for kind, items in groupby(self.found, key=lambda item: item.kind):
            group = list(items)
            size = render.format_bytes(sum(item.bytes for item in group))
            yield f"{kind}: {render.format_count(len(group), 'item')}, {size}"
            for item in group:
                name = str(item.path).removeprefix(f"{self.root}/")
                yield f"  {name}, {render.format_bytes(item.bytes)}: {item.reason}"


def plan_clean(
    workspace: Workspace,
    kinds: Sequence[RemovableKind] = (),
    *,
    note: Note = lambda _: None,
) -> CleanPlan:
    """Return what can be deleted, by kind (default: all kinds) and path; nothing is written.

    `note` is called with a sentence for each damaged file for which checkpoints are kept.
    """
    note = cache(note)
    order = tuple(RemovableKind)
    items: dict[Path, Removable] = {}
    for kind in sorted(kinds or order, key=order.index):
        candidates = sorted(_FINDERS[kind](workspace, note), key=attrgetter("path"))
        for path, reason, locks in candidates:
            # A damaged checkpoint may also be one that a finished run no longer needs.
            if not items.keys() & {path, *path.parents}:
                size = size_of(path, links=False)
                items[path] = Removable(
                    kind=kind, path=path, bytes=size, reason=reason, locks=list(locks)
                )
    return CleanPlan(root=workspace.root, found=tuple(items.values()))


def run_clean(plan: CleanPlan, workspace: Workspace) -> CleanPlan:
    """Delete what can still be deleted; files that a process uses meanwhile stay.

    Everything is searched for again before locks are taken, because held locks look like those of a
    running training.
    """
    kinds = tuple(dict.fromkeys(item.kind for item in plan.found))
    still_removable = {item.path for item in plan_clean(workspace, kinds).found} if kinds else set()
    deleted: list[Removable] = []
    refused = ""
    for item in plan.found:
        try:
            with ExitStack() as stack:
                is_free = all(
                    stack.enter_context(lock_file(path, seconds=0.0)) for path in item.locks
                )
                if item.path not in still_removable or not is_free:
                    continue  # A process has started to use it.
                if not item.path.is_dir():
                    item.path.unlink()
                elif item.kind in (RemovableKind.TEMPORARY, RemovableKind.RAY):
                    shutil.rmtree(item.path)
                else:
                    files.delete_folder(item.path)  # It vanishes for readers at once.
                deleted.append(item)
        except OSError as error:
            if item.path.exists():
                refused = f"{item.path} cannot be deleted ({error.strerror})"
    outcome = {"deleted": tuple(deleted), "refused": refused, "is_done": True}
    return plan.model_copy(update=outcome)


# Candidates of each kind; `note` is called with a sentence on each damaged file.


def _temporary(workspace: Workspace, _: Note) -> Iterator[Candidate]:
    for folder in files.leftovers(workspace.root, below=True):
        yield Candidate(folder, "half-written or half-deleted by a process that ended")
    for file in workspace.root.rglob(".*.tmp"):
        if file.is_file() and time.time() - file.stat().st_mtime > SECONDS_OF_WRITING:
            yield Candidate(file, "half-written by a process that ended")
    for folder in workspace.tokens.glob(f"{layout.TEMPORARY_PREFIX}*"):
        key = folder.name.removeprefix(layout.TEMPORARY_PREFIX)
        lock = workspace.tokens / layout.SOURCES_NAME / f"{key}{layout.CORPUS_LOCK_SUFFIX}"
        if not is_locked(lock):
            reason = "of an interrupted command, which would resume there"
            yield Candidate(folder, reason, (lock,))


def _ray_folders(workspace: Workspace, _: Note) -> Iterator[Candidate]:
    for folder in files.abandoned_folders():
        yield Candidate(folder, "Ray's temporary files of a command that ended")
    for folder in workspace.sweeps.glob(f"*/{layout.RAY_FOLDER}"):
        lock = folder.with_name(layout.SWEEP_LOCK_NAME)
        if not is_locked(lock):
            yield Candidate(folder, "Ray Tune's files of a command that ended", (lock,))
    for run in training_folders(workspace):
        folder = run / layout.RAY_FOLDER
        if folder.is_dir() and not is_in_use(run):
            yield Candidate(folder, "Ray Train's files of a command that ended", run_locks(run))


def _intermediate_checkpoints(workspace: Workspace, note: Note) -> Iterator[Candidate]:
    needed: set[Path] = set()
    for pattern in (layout.JOB_NAME, "result-*.json", layout.PLAN_FILE, layout.RESULTS_FILE):
        for file in workspace.root.glob(f"*/*/{pattern}"):
            try:
                stored = files.read_json(file)
            except UserError as error:  # The damaged file may refer to any checkpoint.
                note(f"{error}; all checkpoints are kept")
                return
            text = json.dumps(stored, ensure_ascii=False)
            names = re.findall(r'"([^"]+/step_\d{8,})"', text)
            needed |= {workspace.root / name for name in names}
    for folder in training_folders(workspace):
        checkpoints = find_checkpoints(folder)
        if is_in_use(folder) or len(checkpoints) < 2:
            continue
        try:
            kept = _kept_checkpoints(folder)
        except UserError as error:
            note(f"the checkpoints in {folder} are kept: {error}")
            continue
        if not kept:  # The training is not finished.
            continue
        for checkpoint in checkpoints:
            is_measured = any(checkpoint.glob(INFLUENCE_PATTERN))
            if checkpoint not in kept | needed and not is_measured:
                reason = "intermediate checkpoint of a finished training"
                yield Candidate(checkpoint, reason, run_locks(folder))


def _kept_checkpoints(folder: Path) -> set[Path]:
    """Return the checkpoints that a finished training keeps: the last one, and the one from which
    it can be continued. Empty for an unfinished training, which keeps all.

    Raises:
        UserError: If the training cannot be read.
    """
    from orchestrator.models.folder import check_checkpoint
    from orchestrator.training.schedules import stable_steps

    training = Training(folder, check_checkpoint)
    if training.job is None or training.outcome is None:
        return set()
    stable = folder / layout.checkpoint_name(stable_steps(training.job.recipe))
    return {Path(str(training.outcome.checkpoint)), stable}


def _damaged(workspace: Workspace, _: Note) -> Iterator[Candidate]:
    from orchestrator.models.folder import check_checkpoint

    for folder in training_folders(workspace):
        if is_in_use(folder):
            continue
        for checkpoint in find_checkpoints(folder):
            try:
                check_checkpoint(checkpoint)
            except UserError as error:
                reason = str(error).removeprefix(f"the checkpoint {checkpoint} ")
                yield Candidate(checkpoint, reason, run_locks(folder))


_FINDERS = {
    RemovableKind.TEMPORARY: _temporary,
    RemovableKind.RAY: _ray_folders,
    RemovableKind.CHECKPOINTS: _intermediate_checkpoints,
    RemovableKind.DAMAGED: _damaged,
}
