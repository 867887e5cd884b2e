"""The only package that imports MLflow: runs are found by their key, and training never waits.

A background thread talks to the store. If a server does not respond, one warning is printed,
operations go to an outbox, and the work continues; `Tracking.sync` delivers them later. MLflow's
fluent API and Ray's callback would raise errors into training, block for minutes, and create a
second run for every resumed trial.
"""

from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.journal_copies import JournalCopies
from orchestrator.tracking.store import NOTE_TAG, REASON_TAG, tag_filter
from orchestrator.tracking.tracked_run import (
    TrackedRun,
    reason_tags,
    status_after,
)
from orchestrator.tracking.tracker import (
    REPORT_TAG,
    VIEW_TAG,
    NestedRun,
    Tracking,
    open_tracking,
)

__all__ = [
    "NOTE_TAG",
    "REASON_TAG",
    "REPORT_TAG",
    "VIEW_TAG",
    "ChartView",
    "JournalCopies",
    "NestedRun",
    "TrackedRun",
    "Tracking",
    "open_tracking",
    "reason_tags",
    "status_after",
    "tag_filter",
]
