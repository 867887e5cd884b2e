"""Loggers beside MLflow get the numbers of trainings as they come; TensorBoard's is the example.

Other packages add loggers by entry points of the group `iiet_orch.loggers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from iiet.extensions import ExtensionError
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.settings.cluster import LOGGERS, TENSORBOARD
from orchestrator.tracking.store import CurveReader, Point
from orchestrator.workspace.errors import UserError


class RunLogger:
    """Base of all loggers; one object per run and process, in a thread of the command.

    A new process logs a run from its first step on, so it replaces what an earlier one wrote. An
    error costs one warning. `folder` is `loggers/NAME/SWEEP/RUN` in the workspace, without the
    sweep if the run stands alone; it need not exist yet. `run` has key, kind, name and parameters.
    """

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        self.folder, self.run = folder, run

    def log(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        """Take metrics, each point once; `time` in seconds since 1970, values may be NaN.

        What is measured after the training follows, at its step or at step 0.
        """
        raise NotImplementedError

    def close(self, status: str) -> None:
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


class LoggedRuns:
    """Passes trainings on to one logger, whose files lie in `folder`/SWEEP/RUN."""

    def __init__(self, name: str, root: Path) -> None:
        """Use a logger in a workspace's root; UserError if its package is missing or broken."""
        try:
            self._class = LOGGERS[name]
        except ExtensionError as error:
            raise UserError(f"tracking.loggers: {error}") from None
        self.folder = root / (name if name == TENSORBOARD else f"loggers/{name}")
        self._runs: dict[Path, tuple[RunLogger, CurveReader, set[tuple[Any, ...]]]] = {}

    def log(self, run: TrackedRun) -> None:
        """Pass on what is new of a run, if it is a training."""
        if not run.journal:
            return
        sweep = run.tags.get("iiet.sweep", "") if run.parent else ""
        # Other systems take neither slashes nor colons in names of files.
        place = self.folder.joinpath(*(re.sub(r"[^\w.,=+ -]", "_", n) for n in (sweep, run.name)))
        if place not in self._runs:
            self._runs[place] = self._class(place, run), CurveReader(Path(run.journal)), set()
        logger, reader, logged = self._runs[place]
        new, ended_ms = reader.read(), run.ended_ms or run.started_ms
        results = [point for point in run.points if point[0] not in reader.last]
        new += [Point(*point, ended_ms) for point in results if point not in logged]
        logged.update(results)
        for (step, time), points in groupby(new, lambda point: (point.step, point.time_ms)):
            logger.log(step, {point.name: point.value for point in points}, time=time / 1000)
        if run.status != "RUNNING":
            logger.close(run.status)
