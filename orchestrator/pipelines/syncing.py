"""Deliver to MLflow what it missed while it did not answer."""

from __future__ import annotations

from pathlib import Path

from orchestrator.pipelines.context import open_context
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.folders import Workspace


def sync(*, workspace: Workspace | Path | str, progress: Progress | None = None) -> int:
    """Return the number of delivered records.

    Raises:
        UserError: If MLflow does not know the store's address, or a local store is damaged.
    """
    return open_context(workspace, progress).tracking.sync()
