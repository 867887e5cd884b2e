"""The only door to MLflow: runs found again by their key, written to in batches, never in
training's way.

Losses go to a journal on disk first (`workspace.journal`); `TrackedRun.log_journal` copies what is
new into MLflow, from an offset that is stored in the run itself, so that a lost store is simply
filled again. When a server does not answer, the caller is told once, the operation goes to the
outbox and the work goes on; `Tracking.sync` delivers it later. `store.py` alone imports MLflow.

Own client calls instead of MLflow's fluent API or Ray's callback: those raise into training, block
for minutes on a dead server, and make a second run of every trial that is resumed.
"""

from orchestrator.tracking.identity import RunIdentity
from orchestrator.tracking.links import ChartView, Links, tag_filter
from orchestrator.tracking.tracker import (
    VIEW_TAG,
    TrackedRun,
    TrackedSweep,
    Tracking,
    open_tracking,
    status_after,
)

__all__ = [
    "VIEW_TAG",
    "ChartView",
    "Links",
    "RunIdentity",
    "TrackedRun",
    "TrackedSweep",
    "Tracking",
    "tag_filter",
    "open_tracking",
    "status_after",
]
