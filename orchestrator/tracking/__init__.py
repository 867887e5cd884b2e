"""The only package that imports MLflow: runs are found by their key, and training never waits.

Losses go to a journal on disk first (`workspace.journal`). `TrackedRun.log_journal` copies the new
records to MLflow; the run itself stores how far, so an empty store is simply filled again. If a
server does not respond, one warning is printed, the operation goes to the outbox, and the work
continues; `Tracking.sync` delivers it later.

MLflow's fluent API and Ray's callback are not used: they raise errors into training, block for
minutes on a dead server, and create a second run for every resumed trial.
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
