"""What the models of a sweep cost: exact counts, and milliseconds per token, measured once.

Only the shapes of the models count, not the values of their weights, so the weights are random.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iiet.decoder import Decoder
from orchestrator.evaluation.decode_timing import SWEEP_NEW_TOKENS, time_per_token
from orchestrator.records.record import Record
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial
from orchestrator.sweeping.trials import exact_cost, full_config
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.provenance import content_key, environment

TIMES_NAME = "times.json"


class _DecodeTime(Record):
    decode_ms_per_token: float
    decode_ms_spread: float


class _StoredTimes(Record):
    """Times of the shapes of a sweep's models."""

    state: str
    """Hash of the shapes, this machine and its libraries."""
    by_shape: dict[str, _DecodeTime]


def with_costs(
    found: Sequence[Trial], plan: SweepPlan, folder: Path, progress: Progress
) -> list[Trial]:
    """Add what each model costs: exact counts, and measured milliseconds."""
    full = full_config(plan)
    times = _decode_times(found, folder, progress)
    costs = [exact_cost(t.model, full).model_copy(update=vars(times[t.key])) for t in found]
    return [
        trial.model_copy(update={"cost": cost}) for trial, cost in zip(found, costs, strict=True)
    ]


def _decode_times(
    trials: Sequence[Trial], folder: Path, progress: Progress
) -> dict[str, _DecodeTime]:
    """Measure decoding once per sweep and machine; only shapes count, not the weights' values."""
    shapes = {trial.key: content_key(trial.model.to_dict()) for trial in trials}
    state = content_key(sorted(set(shapes.values())), environment(), SWEEP_NEW_TOKENS)
    path = folder / TIMES_NAME
    times = _StoredTimes.read_measured(path, progress.note)
    if times is None or times.state != state:
        decoders = {shapes[trial.key]: Decoder(trial.model) for trial in trials}
        by_shape = {
            shape: _DecodeTime(decode_ms_per_token=t.median, decode_ms_spread=t.spread)
            for shape, t in time_per_token(decoders, progress).items()
        }
        times = _StoredTimes(state=state, by_shape=by_shape)
        times.write(path)
    return {trial.key: times.by_shape[shapes[trial.key]] for trial in trials}
