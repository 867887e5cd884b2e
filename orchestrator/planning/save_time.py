"""How long runs need to save their state after a request to stop.

The request is seen between two steps. So a step and a validation may come first, and a checkpoint
may be being written; then the state is written. Each is uploaded, too, if the run has a storage.
All of it is an upper limit for the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from iiet.cost import num_parameters
from orchestrator.planning.planned_training import CHECKPOINT_BYTES_PER_PARAMETER
from orchestrator.records.training import TrainingJob
from orchestrator.terminal.render import format_bytes, format_duration
from orchestrator.workspace.journal import SPEED_METRIC, read_tail
from orchestrator.workspace.layout import DONE_NAME

LEAST_SECONDS = 4.0
"""Enough for small models, with a message to the workers and the end of their processes."""
WRITE_BYTES_PER_SECOND = 300e6
"""Assumed speed of a checkpoint that is gathered, hashed and flushed to a shared disk."""
UPLOAD_BYTES_PER_SECOND = 100e6
"""Assumed speed of a copy to the run's storage."""
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
            seconds += NUM_WRITES * _write_seconds(size, job.storage, records)
            step = max(step, _step_seconds(records, job))
    seconds += step
    if note and num_bytes:
        note(f"saving {format_bytes(num_bytes)}, at most {format_duration(seconds)}")
    return seconds


def planned_seconds_to_save(checkpoint_bytes: int, storage: str | None) -> float:
    """Return the longest time, without a step, until a run that is only planned has saved."""
    return LEAST_SECONDS + NUM_WRITES * _write_seconds(checkpoint_bytes, storage)


def _write_seconds(
    num_bytes: int, storage: str | None, records: Sequence[dict[str, Any]] = ()
) -> float:
    # As the newest checkpoint of this run took, if there is one; versions before did not record it.
    speeds = {"checkpoint": WRITE_BYTES_PER_SECOND}
    if storage:
        speeds["uploaded"] = UPLOAD_BYTES_PER_SECOND
    seconds = {name: num_bytes / speed for name, speed in speeds.items()}
    for record in records:
        if record.get("name") in seconds and isinstance(record.get("seconds"), float):
            seconds[record["name"]] = record["seconds"]
    return sum(seconds.values())


def _step_seconds(records: Sequence[dict[str, Any]], job: TrainingJob) -> float:
    metrics = [record["values"] for record in records if record["kind"] == "metrics"]
    known = [values[SPEED_METRIC] for values in metrics if values.get(SPEED_METRIC)]
    recipe = job.recipe
    num_tokens = recipe.num_tokens_per_step + recipe.num_validation_tokens
    return num_tokens / known[-1] if known else 0.0
