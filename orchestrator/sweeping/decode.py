"""What the models of a sweep cost, and if asked how they draft for the full one; measured once.

Costs are exact counts, and milliseconds per token. For these only the shapes of the models count,
not the values of their weights, so the weights are random, and all schedules of one shape share
them. Of each schedule's drafts: the acceptance, and the time per token of the full model's exact
output. Only text is generated, so sweeps on other data have no such numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.cluster.task import trial_device
from orchestrator.data.mixture import open_data
from orchestrator.data.store import PreparedData, TokenStore
from orchestrator.evaluation.decode_timing import (
    SWEEP_NEW_TOKENS,
    SWEEP_PROMPT_TOKENS,
    measure_draft,
    time_per_token,
)
from orchestrator.models.folder import DTYPES
from orchestrator.models.open import load_model
from orchestrator.records.record import Record
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.front import shown_trials
from orchestrator.reporting.pick_rules import draft_targets
from orchestrator.settings import Settings
from orchestrator.sweeping.plan import exact_cost, full_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.devices import device_precision
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key, environment

TIMES_NAME = "times.json"
DECODING_NAME = "decoding.json"
NUM_TEXTS = 32
"""Beginnings of held-out text that are continued."""


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
    full = full_trial(plan).model
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


class _StoredDecoding(Record):
    """What was measured on one machine."""

    state: str
    """Hash of the kind of device, this machine and its libraries."""
    by_name: dict[str, dict[str, float]]
    """Name of a measurement -> its numbers."""


def with_decoding(
    results: Sequence[Trial], plan: SweepPlan, folder: Path, settings: Settings, progress: Progress
) -> list[Trial]:
    """Add how the models that tables show draft for their full models, if the settings ask for it;
    costs must be known. What is stored is not measured again."""
    targets = draft_targets(results) if settings.sweep.measure_drafts else {}
    pairs = {
        f"{one.key} for {targets[one.key].key}": (one, targets[one.key])
        for one in shown_trials(results)
        if one.key in targets
    }
    if not pairs or _text_of(open_data(plan.tokens_folder)) is None:
        return list(results)
    path, on_gpu = folder / DECODING_NAME, ["GPU"] if settings.trials_use_gpus else []
    state = content_key(environment(), SWEEP_NEW_TOKENS, *on_gpu)
    stored = _StoredDecoding.read_measured(path, progress.note)
    known = stored.by_name if stored and stored.state == state else {}
    if missing := {name: pair for name, pair in pairs.items() if name not in known}:
        progress.start("decoding", len(missing))
        measure = partial(_measure_drafts, missing, Path(plan.tokens_folder))
        known = {**known, **trial_device(settings, folder)(measure, progress)}
        _StoredDecoding(state=state, by_name=known).write(path)
    numbers = {pair[0].key: known[name] for name, pair in pairs.items() if name in known}
    return [result.with_numbers("decoding", numbers.get(result.key, {})) for result in results]


def _text_of(data: PreparedData) -> TokenStore | None:
    return next((part for part in data.parts if isinstance(part, TokenStore)), None)


def _measure_drafts(
    pairs: Mapping[str, tuple[Trial, Trial]], tokens_folder: Path, device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    """Measure drafts of full models on held-out text; one that cannot draft is noted."""
    text = _text_of(open_data(tokens_folder))
    assert text is not None
    load = partial(load_model, device=device, dtype=DTYPES[device_precision(device)], frozen=True)
    found: dict[str, dict[str, float]] = {}
    loaded: tuple[str, Decoder] | None = None
    for name, (trial, full) in sorted(pairs.items(), key=lambda pair: pair[1][1].key):
        try:
            if loaded is None or loaded[0] != full.key:
                schedule = full.model.corrections
                loaded = full.key, load(Path(str(full.checkpoint)), schedule=schedule)
            length = SWEEP_PROMPT_TOKENS + SWEEP_NEW_TOKENS
            length = min(length, loaded[1].config.context_length)
            (batch,) = text.validation_batches(
                context_length=length, num_tokens=NUM_TEXTS * length, batch_size=NUM_TEXTS
            )
            draft: Decoder | IterationSchedule = trial.model.corrections
            if trial.checkpoint != full.checkpoint:
                draft = load(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
            speed = measure_draft(loaded[1], draft, batch.input_ids)
            found[name] = {
                "acceptance": speed.acceptance,
                "exact_ms_per_token": speed.ms_per_token,
                "speed_up": speed.speed_up,
            }
        except UserError as error:
            progress.note(f"{trial.name}: decoding is not measured: {error}")
        progress.advance(len(found))
    best = max((numbers["speed_up"] for numbers in found.values()), default=0.0)
    text_of_best = f", the best draft makes exact output {best:.2f} times as fast" if best else ""
    progress.finish(f"{format_count(len(found), 'measurement')}{text_of_best}")
    return found
