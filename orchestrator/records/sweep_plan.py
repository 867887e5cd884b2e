"""The plan of a sweep: all of its trials, each once."""

from __future__ import annotations

from pydantic import Field

from orchestrator.records.record import Record, WorkspacePath
from orchestrator.records.trial import Trial


class SweepPlan(Record):
    """All trials of a sweep."""

    key: str
    """Hash of the trials' keys: the same sweep has the same key."""
    name: str
    """Name of its folder and of its run in MLflow."""
    kind: str
    """`threshold`, `iterations` or `search`."""
    tokens_folder: WorkspacePath
    """Folder of prepared tokens."""
    teacher: WorkspacePath | None
    """Checkpoint of the teacher; None for `iterations`."""
    num_requested: int
    """Thresholds, budgets, schedules or models asked for, before those that coincide were merged;
    seeds do not count."""
    trials: tuple[Trial, ...]
    """Trials, teacher and baselines, each once."""
    num_distinct: int = 0
    """Different schedules or models among them; those that a search adds do not count."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Run and reason of models that cannot be baselines; not part of the key."""
