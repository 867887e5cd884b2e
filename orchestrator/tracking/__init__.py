"""The only package that imports MLflow: runs are found by their key, and training never waits.

If a server does not respond, one warning is printed, operations go to an outbox, and the work
continues; `Tracking.sync` delivers them later. MLflow's fluent API and Ray's callback would raise
errors into training, block for minutes, and create a second run for every resumed trial.
"""

from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import tag_filter
from orchestrator.tracking.tracker import (
    VIEW_TAG,
    TrackedRun,
    Tracking,
    open_tracking,
    status_after,
)

__all__ = [
    "VIEW_TAG",
    "ChartView",
    "TrackedRun",
    "Tracking",
    "open_tracking",
    "status_after",
    "tag_filter",
]
