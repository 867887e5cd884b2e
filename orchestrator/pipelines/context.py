"""What procedures work with: the workspace, MLflow's store, and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich.console import Console

from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking, open_tracking
from orchestrator.workspace.folders import Workspace


@dataclass(frozen=True)
class Desk:
    """What every procedure works with."""

    workspace: Workspace
    """Where everything lives."""
    progress: Progress
    """Told what is going on."""
    console: Console
    """Where tables are printed."""

    @cached_property
    def tracking(self) -> Tracking:
        """Where runs are shown; opened at first use, so that a mistake is answered before a
        database is made, which takes seconds.

        Raises:
            UserError: From its first use: MLflow does not know the store's address, or a local
                store is damaged.
        """
        return open_tracking(self.workspace, warn=self.progress.note)
