"""Find models in a workspace: folders by name, finished runs, the last pick, stored influence.

`models.open` opens the model that a command names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from iiet.hf.weights import CONFIG
from iiet.iiad.pruning import InfluenceTable
from orchestrator.models.folder import (
    is_checkpoint,
    is_export,
    load_config,
    load_provenance,
    weights_key,
)
from orchestrator.models.hub import HUB_PREFIX
from orchestrator.records.influence import INFLUENCE_PATTERN, StoredInfluence
from orchestrator.records.record import Record, WorkspacePath
from orchestrator.settings import SETTINGS_NAME
from orchestrator.settings.evaluation import usual_metric
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import expand_user, resolve_path
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, Workspace, find_checkpoints

AcceptedFolders = Literal["any", "exports", "none"]
"""Which model folders a command takes besides checkpoints: any, exports of this program, or
none."""


class Picked(Record):
    """The model that `pick` chose last."""

    sweep: str
    checkpoint: WorkspacePath
    schedule: str | None
    """Iteration schedule of the picked model; None if it is the checkpoint's own."""
    time: float
    """When the model was picked, in seconds since 1970."""


def picked_model(workspace: Workspace, sweep: str | None = None) -> Picked | None:
    """Return the last pick if its checkpoint exists, and it is of `sweep` if that is not None.

    Raises:
        UserError: If the file of the pick is damaged.
    """
    pick = Picked.read(workspace.picked)
    if pick is None or not Path(pick.checkpoint).is_dir():
        return None
    is_wanted = sweep is None or sweep == pick.sweep
    return pick if is_wanted else None


def finished_runs(workspace: Workspace) -> list[Path]:
    """Return the runs with a checkpoint that are finished or imported."""
    return [
        run
        for run in _run_folders(workspace)
        # An imported run has no training.
        if find_checkpoints(run) and ((run / DONE_NAME).is_file() or not (run / JOB_NAME).is_file())
    ]


def find_folder(workspace: Workspace | None, path: Path, folders: AcceptedFolders) -> Path:
    """Return the folder that a user names by a path, or by a name that is looked up in the
    workspace.

    Such a name is `NAME` of a run or trial, `runs/NAME` or `runs/NAME/step_00000100`.

    Raises:
        UserError: If there is no such folder; names the runs of the workspace.
    """
    path = expand_user(path)
    candidates = [path]
    if workspace is not None:
        for parent in (workspace.root, workspace.runs, workspace.trials):
            candidates.append(parent / path)
    existing = [candidate for candidate in candidates if candidate.exists()]
    for folder in existing:
        # An unusable folder must not hide a run: an import has the name of its folder.
        if is_checkpoint(folder) or find_checkpoints(folder) or is_accepted(folder, folders):
            return resolve_path(folder)
    if existing and existing[0].is_file():
        raise UserError(
            f"{path} is a file; if it is a GGUF file, `iiet-orch import {path}` makes a "
            "checkpoint of it"
        )
    if existing:  # The caller reports what is wrong with the folder.
        return resolve_path(existing[0])
    if workspace is None:
        raise UserError(f"there is no folder {path}; a model is a checkpoint, a run or its folder")
    names = shortened(", ".join(sorted(run.name for run in _run_folders(workspace))))
    runs = f"its runs are {names}" if names else "it has no runs yet"
    raise UserError(
        f"there is no folder {path}, and nothing of that name in the workspace {workspace.root}; "
        f"{runs}{hub_hint(path)}"
    )


def is_accepted(folder: Path, folders: AcceptedFolders) -> bool:
    """Return whether a folder is a model folder that is accepted besides checkpoints."""
    if folders == "none" or is_checkpoint(folder) or not (folder / CONFIG).is_file():
        return False
    return folders == "any" or is_export(folder)


def _run_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of the workspace's runs, by name."""
    return sorted(path for path in workspace.runs.glob("*") if path.is_dir())


def hub_hint(path: Path) -> str:
    """Return the end of a sentence about a missing folder that may be a model of the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path), flags=re.ASCII):
        return ""
    return f". For a model of the Hugging Face hub write {HUB_PREFIX}{path}"


# Runs and influence


def find_pretraining(workspace: Workspace, name: Path) -> Path:
    """Return the folder of the pretraining that a user names, also by a checkpoint, to continue it.

    Raises:
        UserError: If there is no such folder, or `pretrain` did not make it.
    """
    folder = find_folder(workspace, name, "none")
    if is_checkpoint(folder):
        folder = folder.parent
    if (folder / JOB_NAME).is_file() and (folder / SETTINGS_NAME).is_file():
        return folder
    saved = find_checkpoints(folder)
    if saved and "imported" in load_provenance(saved[-1]):
        raise UserError(
            f"{folder} was imported, so there is no training to continue; `iiet-orch distill` "
            "with --control cross_entropy trains an imported model"
        )
    raise UserError(f"{folder} was not made by `iiet-orch pretrain`, so it cannot be continued")


def find_checkpoints_by_weights(workspace: Workspace, key: str) -> list[Path]:
    """Return the checkpoints of the workspace's runs with this weights key, by name."""
    if not key:
        return []
    checkpoints = []
    for run in _run_folders(workspace):
        for checkpoint in find_checkpoints(run):
            with suppress(UserError):  # Skip checkpoints with a damaged provenance.
                if weights_key(checkpoint) == key:
                    checkpoints.append(checkpoint)
    return checkpoints


def load_influence_table(checkpoint: Path, metric: str | None = None) -> InfluenceTable | None:
    """Return the stored influence table of a checkpoint under its own schedule.

    Args:
        metric: Metric of the table (default: the model's usual one). Without such a table, the only
            table of another metric is returned.

    Returns:
        The table; None if there is none, or several of other metrics.

    Raises:
        DamagedFile: If one of the tables is damaged.
    """
    own_schedule = load_config(checkpoint).corrections
    wanted_metric = metric or usual_metric(of_whole_layers=not own_schedule.num_corrections)
    tables: dict[str, InfluenceTable] = {}
    for path in sorted(checkpoint.glob(INFLUENCE_PATTERN)):
        stored = StoredInfluence.read(path)
        if stored and stored.table.schedule == own_schedule:
            tables[stored.table.metric] = stored.table
    if table := tables.get(wanted_metric):
        return table
    return next(iter(tables.values())) if len(tables) == 1 else None


def find_influence_table(
    checkpoints: Iterable[Path], metric: str | None = None
) -> InfluenceTable | None:
    """Return the first table of a metric of several checkpoints; without one, the first table that
    `load_influence_table` returns.

    Args:
        metric: As in `load_influence_table`.

    Raises:
        DamagedFile: If one of the tables is damaged.
    """
    tables = [load_influence_table(checkpoint, metric) for checkpoint in checkpoints]
    known_tables = [table for table in tables if table is not None]
    for table in known_tables:
        of_whole_layers = not table.schedule.num_corrections
        if table.metric == (metric or usual_metric(of_whole_layers=of_whole_layers)):
            return table
    return known_tables[0] if known_tables else None
