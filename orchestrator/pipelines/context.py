"""The context that every pipeline runs in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, open_workspace

if TYPE_CHECKING:
    from orchestrator.tracking.tracker import Tracking


class Context:
    """The workspace, a progress display and MLflow's store, passed from function to function."""

    def __init__(
        self,
        workspace: Workspace,
        progress: Progress | None = None,
        *,
        tracking: Tracking | None = None,
    ) -> None:
        """Take the workspace; MLflow's store is opened at first use unless `tracking` is given."""
        self.workspace = workspace
        self.progress = progress or Progress()
        self._tracking = tracking

    @property
    def tracking(self) -> Tracking:
        """MLflow's store; opening it takes seconds, so check arguments first.

        Raises:
            UserError: If MLflow does not know the store's address, or a local store is damaged.
        """
        if self._tracking is None:
            from orchestrator.tracking.tracker import open_tracking

            self._tracking = open_tracking(self.workspace, warn=self.progress.note)
        return self._tracking

    def log_measurement(
        self, measured: TrackedRun, started_ms: int, *, found_again: bool = False
    ) -> None:
        """Show a measurement in MLflow, if the workspace can be written.

        Args:
            started_ms: When it began.
            found_again: Whether it is an earlier measurement, whose times in MLflow are kept.
        """
        if self.workspace.is_writable:
            times: dict[str, int | None] = {"started_ms": started_ms, "ended_ms": now_ms()}
            stored = self.tracking.stored(measured.kind, measured.key)
            if stored and found_again:
                times = {"started_ms": stored.started_ms, "ended_ms": stored.ended_ms}
            elif stored:
                # MLflow cannot change the start of a run, so a new run replaces it.
                self.tracking.withdraw(measured.kind, measured.key)
                self.tracking.wait()
            self.tracking.publish(measured.changed(**times))
            self.tracking.wait()


def open_context(
    workspace: Workspace | Path | str | None, progress: Progress | None = None
) -> Context:
    """Open a workspace, by default that of `find_workspace`; a missing folder is made.

    Raises:
        UserError: If the folder cannot be used, see `open_workspace`.
    """
    if not isinstance(workspace, Workspace):
        workspace = open_workspace(Path(workspace) if workspace else None)
    return Context(workspace, progress)
