"""Find the model that a command names: a run or a folder, or the newest of finished runs and picks.

A model that nobody named is announced, and it is never replaced by another one: damage is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from iiet.pruning import InfluenceTable
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG
from orchestrator.models.folder import (
    is_checkpoint,
    load_config,
    load_provenance,
    read_config,
    resolve_checkpoint,
    weights_key,
)
from orchestrator.models.hub import HUB_PREFIX, download, is_hub_name
from orchestrator.records.influence import INFLUENCE_PATTERN, StoredInfluence
from orchestrator.records.record import Record, WorkspacePath
from orchestrator.records.trial import Trial
from orchestrator.settings import DEFAULT_METHOD, SETTINGS_NAME, InfluenceSettings
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, Workspace, find_checkpoints

Note = Callable[[str], None]


class Picked(Record):
    """The model that `pick` chose last."""

    sweep: str
    checkpoint: WorkspacePath
    schedule: tuple[int, ...] | None
    """Iteration schedule; None for a method without corrections."""
    time: float
    """When the model was picked, in seconds since 1970."""

    @property
    def model(self) -> tuple[Path, IterationSchedule | None]:
        """The checkpoint and its schedule."""
        schedule = None if self.schedule is None else IterationSchedule(self.schedule)
        return Path(self.checkpoint), schedule


def picked_model(workspace: Workspace, sweep: str | None = None) -> Picked | None:
    """Return the last pick if its checkpoint exists, and it is of `sweep` if that is not None.

    Raises:
        UserError: If the file of the pick is damaged.
    """
    pick = Picked.read(workspace.picked)
    if pick is None or not Path(pick.checkpoint).is_dir():
        return None
    return pick if sweep in (None, pick.sweep) else None


def resolve_model(
    workspace: Workspace,
    path: Path | str | None = None,
    note: Note | None = None,
    *,
    with_corrections: bool = False,
) -> tuple[Path, IterationSchedule | None]:
    """Return the checkpoint that the user means, and the schedule of a pick or trial; None for the
    checkpoint's own.

    Args:
        path: A checkpoint, or a run: its newest checkpoint is used; see `find_model_folder`. Or a
            trial. If None, the newest of the finished runs and the last pick.
        note: Called with a sentence that says which checkpoint is used if none is named.
        with_corrections: If none is named, only runs of an IIET with corrections count.

    Raises:
        UserError: If there is no checkpoint, it is damaged, or it is a model of the hub, which is
            imported first.
    """
    if path is not None:
        if is_hub_name(path):
            raise UserError(
                f"{path} becomes a run of the workspace at first use, and a dry run writes nothing;"
                f" `iiet-orch import {path}` imports it"
            )
        if trial := find_trial(workspace, Path(path)):
            return trial
        return resolve_checkpoint(find_model_folder(workspace, Path(path))), None

    # Nobody named a model: it is that of the newest finished run, or of a later pick.
    runs = sorted(_finished_runs(workspace), key=last_recorded, reverse=True)
    picked = None if with_corrections else picked_model(workspace)
    skipped_runs: list[str] = []
    if with_corrections:
        # Newer runs of other models are skipped; the error names them if there is no other run.
        while runs:
            config = load_config(find_checkpoints(runs[0])[-1])
            if config.method == DEFAULT_METHOD and config.corrections.num_corrections:
                break
            skipped_runs.append(f"{runs.pop(0).name} ({config.method})")

    schedule = None
    if picked and (not runs or picked.time > last_recorded(runs[0])):
        folder, schedule = picked.model
        origin = f"that `pick` chose from the sweep {picked.sweep}"
    elif runs:
        folder = runs[0]
        origin = "of the newest run with corrections" if with_corrections else "of the newest run"
    else:
        missing = "no IIET checkpoint with corrections" if with_corrections else "no finished run"
        only = f", only {', '.join(skipped_runs)}" if skipped_runs else ""
        raise UserError(
            f"{workspace.root} has {missing}{only}; `iiet-orch pretrain` makes one, `iiet-orch "
            "quickstart` does the whole job, or give a path or the name of a run as argument"
        )
    checkpoint = resolve_checkpoint(folder)
    if note:
        note(f"the model is {checkpoint}, {origin}")
    return checkpoint, schedule


def _finished_runs(workspace: Workspace) -> list[Path]:
    """Return the runs with a checkpoint whose training, if they have one, is finished."""
    return [
        run
        for run in run_folders(workspace)
        # An imported run has no training.
        if find_checkpoints(run) and ((run / DONE_NAME).is_file() or not (run / JOB_NAME).is_file())
    ]


def resolve_teacher(workspace: Workspace, path: Path | str | None, note: Note | None) -> Path:
    """Return the checkpoint that the user means, or that of the newest IIET with corrections."""
    return resolve_model(workspace, path, note, with_corrections=True)[0]


def find_trial(workspace: Workspace, path: Path) -> tuple[Path, IterationSchedule | None] | None:
    """Return checkpoint and schedule of a measured trial that a user names as `list` shows it.

    The checkpoint may lie elsewhere, such as that of a teacher that a trial measures under a
    schedule. None for any other name, and for a trial that is not measured: its folder is that of a
    training.

    Raises:
        UserError: If its result is damaged.
    """
    trials: list[Trial] = []
    for folder in (workspace.trials / path, workspace.root / path):
        if folder.parent == workspace.trials and folder.is_dir():
            results = [Trial.read(file) for file in sorted(folder.glob("result-*.json"))]
            trials = [trial for trial in results if trial and trial.checkpoint and trial.config]
            break
    if not trials:
        return None
    checkpoint = resolve_checkpoint(Path(str(trials[0].checkpoint)))
    schedules = {trial.schedule for trial in trials}
    # Elastic weights are measured under several schedules: then the checkpoint's own is used.
    schedule = schedules.pop() if len(schedules) == 1 else None
    return checkpoint, None if schedule is None else IterationSchedule(schedule)


def find_model_folder(
    workspace: Workspace, path: Path, *, model_types: Container[Any] | None = ()
) -> Path:
    """Return the folder that a user names.

    Args:
        workspace: Where relative paths are looked up after the working folder.
        path: As typed: a path, or a name in the workspace such as `NAME` of a run or trial,
            `runs/NAME` or `runs/NAME/step_00000100`; or `hub:OWNER/NAME`, which is downloaded.
        model_types: Types of the model folders that are accepted beside checkpoints; None: all.

    Raises:
        UserError: If there is no such folder; names the runs of the workspace. Or if the hub does
            not give the model.
    """
    if is_hub_name(path):
        return download(path)
    path = expand_user(path)
    parents = (workspace.root, workspace.runs, workspace.trials)
    candidates = (path, *(parent / path for parent in parents))
    places = [place for place in candidates if place.exists()]
    for place in places:
        # A folder of no use must not hide a run: an imported run has the name of its source.
        if is_checkpoint(place) or find_checkpoints(place):
            return place.resolve()
        if (place / CONFIG).is_file() and (
            model_types is None or read_config(place).get("model_type") in model_types
        ):
            return place.resolve()
    if places:
        if places[0].is_file():
            raise UserError(
                f"{path} is a file; if it is a GGUF file, `iiet-orch import {path}` makes a "
                "checkpoint of it"
            )
        return places[0].resolve()
    names = shortened(", ".join(sorted(run.name for run in run_folders(workspace))))
    runs = f"its runs are {names}" if names else "it has no runs yet"
    raise UserError(
        f"there is no folder {path}, and nothing of that name in the workspace {workspace.root}; "
        f"{runs}{hub_hint(path)}"
    )


def hub_hint(path: Path) -> str:
    """Return the end of a sentence about a missing folder that may be a model of the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path), flags=re.ASCII):
        return ""
    return f". For a model of the Hugging Face hub write {HUB_PREFIX}{path}"


def find_run_folder(workspace: Workspace, path: Path) -> Path:
    """Return the folder of the run that a user names, also by one of its checkpoints.

    Raises:
        UserError: If there is no such folder; names the runs of the workspace.
    """
    folder = find_model_folder(workspace, path)
    return folder.parent if is_checkpoint(folder) else folder


def find_pretraining(workspace: Workspace, path: Path) -> Path:
    """Return the folder of the pretraining that a user names to continue it.

    Raises:
        UserError: If there is no such folder, or `pretrain` did not make it.
    """
    folder = find_run_folder(workspace, path)
    if (folder / JOB_NAME).is_file() and (folder / SETTINGS_NAME).is_file():
        return folder
    saved = find_checkpoints(folder)
    if saved and "imported" in load_provenance(saved[-1]):
        raise UserError(
            f"{folder} was imported, so there is no training to continue; `iiet-orch distill` "
            "with --control cross_entropy trains an imported model"
        )
    raise UserError(f"{folder} was not made by `iiet-orch pretrain`, so it cannot be continued")


def run_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of the workspace's runs."""
    return [path for path in workspace.runs.glob("*") if path.is_dir()]


def find_checkpoint_by_weights(workspace: Workspace, key: str) -> Path | None:
    """Return the checkpoint of the workspace's runs with this weights key, if any."""
    for run in run_folders(workspace):
        for checkpoint in find_checkpoints(run):
            with suppress(UserError):  # Skip checkpoints with a damaged provenance.
                if key and weights_key(checkpoint) == key:
                    return checkpoint
    return None


def load_influence_table(checkpoint: Path, metric: str | None = None) -> InfluenceTable | None:
    """Return the influence table stored beside a checkpoint for its own schedule.

    Args:
        metric: Metric of the table (default: that of the settings). If the checkpoint has no such
            table, but one of another metric, that one is returned.

    Returns:
        The table; None if there is none, or several of other metrics.

    Raises:
        DamagedFile: If one of the tables is damaged.
    """
    own_schedule = load_config(checkpoint).corrections
    tables: dict[str, InfluenceTable] = {}
    for path in sorted(checkpoint.glob(INFLUENCE_PATTERN)):
        stored = StoredInfluence.read(path)
        if stored and stored.table.schedule == own_schedule:
            tables[stored.table.metric] = stored.table
    if table := tables.get(metric or InfluenceSettings().metric):
        return table
    return next(iter(tables.values())) if len(tables) == 1 else None


def parse_schedule(
    text: str | None, folder: Path, option: str = "--schedule"
) -> IterationSchedule | None:
    """Parse the value of an option for a checkpoint or an export; None stays None.

    Raises:
        UserError: If it is not valid for the model's method and number of layers.
    """
    if text is None:
        return None
    config = load_config(folder)
    try:
        schedule = IterationSchedule.parse(text, num_layers=config.num_layers)
        config.evaluations_per_layer(schedule)  # Raises where the method makes no corrections.
    except ValueError as error:
        problem = str(error).removeprefix("invalid model config: ")
        raise UserError(f"{option}: {problem}") from None
    return schedule
