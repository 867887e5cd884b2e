"""Loggers beside MLflow get the numbers of each run as they come; TensorBoard's is the example.

Other packages add loggers by entry points of the group `iiet_orch.loggers`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from iiet.extensions import ExtensionError
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.settings.cluster import LOGGERS, TENSORBOARD
from orchestrator.tracking.store import CurveReader
from orchestrator.workspace.errors import UserError


class RunLogger(ABC):
    """Base of all loggers; one object per run and process, in a thread of the command.

    A new process reports a run from its first step on, so it replaces what an earlier one wrote. An
    error costs one warning. `folder` is `loggers/NAME/SWEEP/RUN` in the workspace, without the
    sweep if the run stands alone; it need not exist yet. `run` has key, kind, name and parameters.
    """

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        self.folder, self.run = folder, run

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        """Take metrics, each point once; `time` in seconds since 1970, values may be NaN."""

    def log_results(self, step: int, values: Mapping[str, float]) -> None:  # noqa: B027
        """Take what was measured after the training; step 0 means none; it may come again."""

    def close(self, status: str) -> None:  # noqa: B027
        """Take the end of the run: FINISHED, FAILED or KILLED; more may come later."""


class TensorBoardLogger(RunLogger):
    """Writes event files of trainings, for `tensorboard --logdir WORKSPACE/tensorboard`."""

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Takes seconds, and few use it.

        super().__init__(folder, run)
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink(missing_ok=True)
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        self._writer.flush()

    def close(self, status: str) -> None:  # noqa: ARG002 - TensorBoard shows no state
        self._writer.close()


def logger_class(name: str) -> type[RunLogger]:
    """Return a logger's class.

    Raises:
        UserError: If its package is missing or broken.
    """
    try:
        found: type[RunLogger] = LOGGERS[name]
        return found
    except ExtensionError as error:
        raise UserError(f"tracking.loggers: {error}") from None


class LoggedRuns:
    """Passes runs on to one logger, whose files lie in `folder`/SWEEP/RUN."""

    def __init__(self, name: str, root: Path) -> None:
        """Use a logger in a workspace's root."""
        self._class = logger_class(name)
        self.folder = root / (name if name == TENSORBOARD else f"loggers/{name}")
        self._runs: dict[Path, tuple[RunLogger, CurveReader | None]] = {}

    def log(self, run: TrackedRun) -> None:
        """Pass on what is new of a run."""
        sweep = run.tags.get("iiet.sweep", "") if run.parent else ""
        # Other systems take neither slashes nor colons in names of files.
        place = self.folder.joinpath(*(re.sub(r"[^\w.,=+ -]", "_", n) for n in (sweep, run.name)))
        if place in self._runs and self._runs[place][0].run.place != run.place:  # Of one name.
            place = place.with_name(f"{place.name} {run.key}")
        if place not in self._runs:
            reader = CurveReader(Path(run.journal)) if run.journal else None
            self._runs[place] = self._class(place, run), reader
        logger, reader = self._runs[place]
        curves = reader.read() if reader else []
        for (step, time), points in groupby(curves, lambda point: (point.step, point.time_ms)):
            logger.log(step, {point.name: point.value for point in points}, time=time / 1000)
        results = sorted(run.points, key=lambda point: point[2])
        for step, of_step in groupby(results, key=lambda point: point[2]):
            logger.log_results(step, {name: value for name, value, _ in of_step})
        if run.status != "RUNNING":
            logger.close(run.status)
