"""What a logger beside MLflow is: it receives the numbers of each run as they come.

Other packages add loggers by entry points of the group `iiet_orch.loggers`; `LogMirror` calls them.
"""

# ruff: noqa: B027 - what a logger does not need stays empty

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """A run, as loggers know it."""

    key: str
    """Hash of all that determines the run; the same after a restart."""
    kind: str
    """Such as `pretrain`, `sweep` or `trial`."""
    name: str
    """Name for people; two runs may share it."""
    sweep: str | None
    """Name of the sweep that it is a trial of; None if it stands alone."""


class RunLogger(ABC):
    """Base of all loggers; one object per run and process, in the process of the command.

    A new process reports a run from its first step on, so what an earlier one has written is to be
    replaced, or the same points are to be ignored. An error costs one warning, not the training.

    Args:
        folder: The run's folder in the workspace, `loggers/NAME/SWEEP/RUN`, without the sweep if it
            stands alone; it need not exist yet.
        run: The run.
    """

    def __init__(self, folder: Path, run: LoggedRun) -> None:
        self.folder, self.run = folder, run

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        """Take the metrics of a training step, such as `train/loss`; each point comes once.

        Args:
            step: Optimizer steps done.
            values: Metric by name; may be NaN or infinite.
            time: When it was measured, in seconds since 1970.
        """

    def log_parameters(self, values: Mapping[str, str]) -> None:
        """Take parameters of the run, such as `method`; the same may come again."""

    def log_results(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was measured after the training, such as `quality/accuracy`, at step 0 if it
        belongs to no step; the same may come again.
        """

    def flush(self) -> None:
        """Write what is held in memory; called after every few seconds of a training."""

    def close(self, status: str) -> None:
        """Take the end of the run: FINISHED, FAILED or KILLED; more may come later."""
