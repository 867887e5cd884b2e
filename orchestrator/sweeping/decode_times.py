"""What the models of a sweep cost: exact counts, and milliseconds per token, measured once.

They are measured on a device like the trials'. Only the shapes of the models count, not the values
of their weights, so the weights are random, and all schedules of one shape share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from orchestrator.cluster.launch import trial_device
from orchestrator.evaluation.decode_timing import SWEEP_NEW_TOKENS, time_per_token
from orchestrator.records.record import Record
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.pareto import shown_trials
from orchestrator.settings import Settings
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
    """Hash of the shapes, the kind of device, this machine and its libraries."""
    by_shape: dict[str, _DecodeTime]


def with_costs(
    found: Sequence[Trial], plan: SweepPlan, folder: Path, settings: Settings, progress: Progress
) -> list[Trial]:
    """Add what each model costs: exact counts, and measured milliseconds.

    Of many models, those are measured that tables show.
    """
    full = full_config(plan)
    counted = [t.with_numbers("cost", exact_cost(t.model, full)) for t in found]
    times = _decode_times(shown_trials(counted), folder, settings, progress)
    return [t.with_numbers("cost", vars(times[t.key])) if t.key in times else t for t in counted]


def _decode_times(
    trials: Sequence[Trial], folder: Path, settings: Settings, progress: Progress
) -> dict[str, _DecodeTime]:
    """Measure decoding once per sweep and machine; only shapes count, not the weights' values."""
    shapes = {trial.key: content_key(trial.model.to_dict()) for trial in trials}
    on_gpu = ["GPU"] if settings.trials_use_gpus else []
    state = content_key(sorted(set(shapes.values())), environment(), SWEEP_NEW_TOKENS, *on_gpu)
    path = folder / TIMES_NAME
    times = _StoredTimes.read_measured(path, progress.note)
    if times is None or times.state != state:
        models = {shapes[trial.key]: trial.model for trial in trials}
        progress.start("time per token")  # A GPU may have to be waited for.
        measured = trial_device(settings, folder)(partial(time_per_token, models), progress)
        by_shape = {
            shape: _DecodeTime(decode_ms_per_token=t.median, decode_ms_spread=t.spread)
            for shape, t in measured.items()
        }
        times = _StoredTimes(state=state, by_shape=by_shape)
        times.write(path)
    return {trial.key: times.by_shape[shapes[trial.key]] for trial in trials}
