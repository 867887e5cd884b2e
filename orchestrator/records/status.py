"""What exists in a workspace: folders of trainings, states of sweeps, sizes.

Everything is read from small files, without PyTorch, so that it is quick also while trainings run.
A damaged file is noted and counts as missing. `training_state.py` reads the state of a training.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.records.training_state import Training
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.workspace import layout
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_tail
from orchestrator.workspace.layout import Workspace

STARTED_EVENT = "started"
"""Event in the journal of a sweep: it began. Before its trials are known, the event has `teacher`,
an empty text if none was given, and `options` of `sweep-threshold` for a given teacher."""
FAILED_EVENT = "failed"
"""Event in the journal of a sweep: trials failed in every attempt; their labels are `trials`."""
Note = Callable[[str], None]
"""Called with a sentence on each damaged file."""


def sweep_plans(workspace: Workspace, note: Note) -> dict[str, SweepTrials | None]:
    """Return name of each sweep -> its plan; None without an intact plan; damage is noted."""
    plans: dict[str, SweepTrials | None] = {}
    for folder in folders_in(workspace.sweeps):
        try:
            plans[folder.name] = SweepTrials.read(folder / layout.PLAN_FILE)
        except UserError as error:
            plans[folder.name] = None
            note(str(error))
    return plans


def unfinished_trials(plan: SweepTrials) -> list[Trial]:
    """Return the trials of a plan that have not ended."""
    return [
        trial
        for trial in plan.trials
        if not trial.result_path.exists()
        and not (Path(trial.folder) / layout.STOPPED_NAME).exists()
    ]


def has_failed(sweep_folder: Path) -> bool:
    """Return whether trials failed in the last run of a sweep."""
    records = read_tail(sweep_folder)
    events = [record["name"] for record in records if record["kind"] == "event"]
    ends = [event for event in events if event in (STARTED_EVENT, FAILED_EVENT)]
    return bool(ends) and ends[-1] == FAILED_EVENT


def begun_without_trials(sweep_folder: Path) -> dict[str, Any] | None:
    """Return the last event of a sweep that began and whose trials are not known yet; None of any
    other."""
    records = [record for record in read_tail(sweep_folder) if record["kind"] == "event"]
    is_begun = records and "options" in records[-1]
    return records[-1] if is_begun else None


def seconds_left(plan: SweepTrials, at_once: int) -> float | None:
    """Estimate the remaining seconds of a sweep from the times of its finished trials.

    Args:
        at_once: Number of trials that run at the same time.
    """
    unfinished = unfinished_trials(plan)
    unfinished_keys = {trial.key for trial in unfinished}
    seconds: list[float] = []
    for trial in plan.trials:
        if trial.job is None or trial.key in unfinished_keys:
            continue
        with suppress(UserError):  # A training may be unreadable.
            outcome = Training(Path(trial.folder)).outcome
            if outcome and outcome.train_seconds:
                seconds.append(outcome.train_seconds)
    if not seconds:
        return None
    mean = sum(seconds) / len(seconds)
    return len(unfinished) / max(1, at_once) * mean


def trials_by_folder(
    plans: Mapping[str, SweepTrials | None],
) -> dict[Path, list[tuple[str, Trial]]]:
    """Return folder -> sweeps that plan a trial there, with the trial."""
    trials: dict[Path, list[tuple[str, Trial]]] = {}
    for name, plan in plans.items():
        if plan is None:
            continue
        for trial in plan.trials:
            trials.setdefault(Path(trial.folder), []).append((name, trial))
    return trials


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in another one by name, without temporary ones, which begin with a dot."""
    return sorted(p for p in parent.glob("*") if p.is_dir() and not p.name.startswith("."))


def training_folders(workspace: Workspace) -> list[Path]:
    """Return the folders of all runs and trials."""
    return [*folders_in(workspace.runs), *folders_in(workspace.trials)]


def size_of(path: Path, *, links: bool = True) -> int:
    """Return the bytes of a file, or of all files in a folder.

    Args:
        links: Also count files with another hard link, whose deletion frees nothing.
    """
    if path.is_file():
        files = [str(path)]
    else:
        files = [f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        with suppress(OSError):  # Deleted meanwhile.
            entry = os.lstat(file)
            if stat.S_ISREG(entry.st_mode) and (links or entry.st_nlink == 1):
                total += entry.st_size
    return total
