"""What procedures work with: the workspace, MLflow's store, and the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from orchestrator.console import Progress
from orchestrator.tracking import Tracking
from orchestrator.workspace import Workspace


@dataclass(frozen=True)
class Desk:
    """What every procedure works with."""

    workspace: Workspace
    """Where everything lives."""
    tracking: Tracking
    """Where runs are shown."""
    progress: Progress
    """Told what is going on."""
    console: Console
    """Where tables are printed."""
