"""The context that every pipeline opens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.settings import MLFLOW
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import Workspace, open_workspace

if TYPE_CHECKING:
    from orchestrator.tracking import Tracking


class Context:
    """The workspace, a progress display and MLflow's store, passed from function to function."""

    def __init__(
        self,
        workspace: Workspace,
        progress: Progress | None = None,
        *,
        tracking: Tracking | None = None,
        loggers: Collection[str] = (),
    ) -> None:
        """Name the workspace; the store is opened at first use unless `tracking` is given.

        `loggers` are those of the settings, for pipelines that train.

        Raises:
            UserError: If the package of a logger is missing or broken.
        """
        if others := [name for name in loggers if name != MLFLOW]:
            from orchestrator.tracking.loggers import logger_class  # Imports MLflow.

            for name in others:
                logger_class(name)
        self.workspace, self._loggers = workspace, loggers
        self.progress = progress or Progress()
        self._tracking = tracking

    @property
    def tracking(self) -> Tracking:
        """MLflow's store; opening it takes seconds, so open it after arguments are checked.

        Raises:
            UserError: If MLflow does not know the store's address, or a local store is damaged.
        """
        if self._tracking is None:
            from orchestrator.tracking import open_tracking  # Importing MLflow takes a second.

            self._tracking = open_tracking(
                self.workspace, warn=self.progress.note, loggers=self._loggers
            )
        return self._tracking

    def log_measurement(self, measured: TrackedRun) -> None:
        """Show a measurement in MLflow, if the workspace can be written."""
        if self.workspace.is_writable:
            self.tracking.publish(measured)
            self.tracking.wait()


def open_context(
    workspace: Workspace | Path | str,
    progress: Progress | None = None,
    *,
    loggers: Collection[str] = (),
) -> Context:
    """Open the workspace; its folder is made if it is missing.

    `loggers` as for `Context`.

    Raises:
        UserError: If the folder cannot be used, see `open_workspace`; or as `Context`.
    """
    if not isinstance(workspace, Workspace):
        workspace = open_workspace(Path(workspace))
    return Context(workspace, progress, loggers=loggers)
