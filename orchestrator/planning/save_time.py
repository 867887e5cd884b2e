"""How long runs need to save their state after a request to stop.

The request is seen between two steps. So a step and a validation may come first, and a checkpoint
may be being written; then the state is written. All of it is an upper limit for the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from iiet.cost import num_parameters
from orchestrator.planning.planned_training import CHECKPOINT_BYTES_PER_PARAMETER
from orchestrator.records.training import TrainingJob
from orchestrator.terminal.formatting import format_bytes, format_duration
from orchestrator.workspace.journal import SPEED_METRIC, read_tail
from orchestrator.workspace.names import DONE_NAME

LEAST_SECONDS = 4.0
"""Enough for small models, with a message to the workers and the end of their processes."""
WRITE_BYTES_PER_SECOND = 300e6
"""Assumed speed of a checkpoint that is gathered, hashed and flushed to a shared disk."""
NUM_WRITES = 2
"""The checkpoint that may be being written, and the one of the state."""


def seconds_to_save(
    jobs: Collection[TrainingJob], note: Callable[[str], None] | None = None
) -> float:
    """Return the longest time from a request until jobs on one disk have saved their state.

    Args:
        jobs: Those that were started; finished ones need nothing.
        note: Called with a sentence that announces the wait.
    """
    seconds, step, num_bytes = LEAST_SECONDS, 0.0, 0
    for job in jobs:
        if not (job.folder / DONE_NAME).is_file():
            records = read_tail(job.folder)
            size = CHECKPOINT_BYTES_PER_PARAMETER * num_parameters(job.model)
            num_bytes += size
            seconds += NUM_WRITES * _write_seconds(records, size)
            step = max(step, _step_seconds(records, job))
    seconds += step
    if note and num_bytes:
        note(f"saving {format_bytes(num_bytes)}, at most {format_duration(seconds)}")
    return seconds


def _write_seconds(records: Sequence[dict[str, Any]], num_bytes: int) -> float:
    # Of the newest checkpoint of this run, if there is one; versions before did not record it.
    measured = [record.get("seconds") for record in records if record.get("name") == "checkpoint"]
    seconds = measured[-1] if measured else None
    return seconds if isinstance(seconds, float) else num_bytes / WRITE_BYTES_PER_SECOND


def _step_seconds(records: Sequence[dict[str, Any]], job: TrainingJob) -> float:
    metrics = [record["values"] for record in records if record["kind"] == "metrics"]
    known = [values[SPEED_METRIC] for values in metrics if values.get(SPEED_METRIC)]
    recipe = job.recipe
    num_tokens = recipe.num_tokens_per_step + recipe.num_validation_tokens
    return num_tokens / known[-1] if known else 0.0
