"""What exists in a workspace: folders of trainings, sweeps and how far they are, sizes.

Everything is read from small files, nothing is written, and PyTorch is not imported, so that an
answer takes a moment also while trainings run. A damaged file is noted, and as good as missing.
How far one training is, says `training_state.py`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from orchestrator.records.training_state import Training
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.workspace import layout
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_tail
from orchestrator.workspace.layout import Workspace

STARTED_EVENT, FAILED_EVENT = "started", "failed"
"""Events in the journal of a sweep: it began; trials failed in every attempt, which it names."""
Note = Callable[[str], None]
"""Called with a sentence on each damaged file."""


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
        keys_left = {trial.key for trial in self.left}
        seconds: list[float] = []
        for trial in self.trials:
            if trial.job is None or trial.key in keys_left:
                continue
            outcome = Training(Path(trial.folder)).outcome
            if outcome and outcome.train_seconds:
                seconds.append(outcome.train_seconds)
        if not seconds:
            return None
        mean = sum(seconds) / len(seconds)
        return len(self.left) / max(1, at_once) * mean


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
            entry = os.lstat(file)
            if stat.S_ISREG(entry.st_mode) and (links or entry.st_nlink == 1):
                total += entry.st_size
    return total
