"""What the models of a sweep cost, and when asked how they draft for the full one; measured once.

Milliseconds depend on the shapes of the models only, so the weights are random, and all schedules
of one shape share them. Drafts have an acceptance, and a time per token of the full model's exact
output; sweeps on other data than text have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.cluster.task import trial_device
from orchestrator.data.mixture import open_data
from orchestrator.data.store import TokenStore
from orchestrator.evaluation.decode_timing import (
    SWEEP_NEW_TOKENS,
    SWEEP_PROMPT_TOKENS,
    measure_draft,
    random_decoders,
    time_per_token,
)
from orchestrator.models.open import DTYPES, device_precision, load_model
from orchestrator.records.record import Record
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.findings import draft_targets
from orchestrator.settings import Settings
from orchestrator.sweeping.plan import exact_cost, full_trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.training.world import OnDevice
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key, environment

TIMES_NAME = "times.json"
DRAFTS_NAME = "decoding.json"
NUM_TEXTS = 32
"""Beginnings of held-out text that are continued."""


class Measured(Record):
    """What was measured on one machine, by model, shape or draft."""

    state: str
    """Hash of what else counts: shapes, the kind of device, this machine and its libraries."""
    by_name: dict[str, dict[str, float]]
    """Model, shape or draft -> its numbers."""


def with_costs(
    found: Sequence[Trial], plan: SweepPlan, folder: Path, settings: Settings, progress: Progress
) -> list[Trial]:
    """Add what each model costs: exact counts, and milliseconds."""
    full = full_trial(plan).model
    counted = [t.with_numbers("cost", exact_cost(t.model, full)) for t in found]
    shapes = {trial.key: content_key(trial.model.to_dict()) for trial in counted}
    on_gpu = ["GPU"] if settings.trials_use_gpus else []
    state = content_key(sorted(set(shapes.values())), environment(), SWEEP_NEW_TOKENS, *on_gpu)
    path = folder / TIMES_NAME
    times = Measured.read_measured(path, progress.note)
    if times is None or times.state != state:
        models = {shapes[trial.key]: trial.model for trial in counted}
        progress.start("time per token")  # A GPU may have to be waited for.
        by_shape = trial_device(settings, folder)(partial(_time, models), progress)
        times = Measured(state=state, by_name=by_shape)
        times.write(path)
    return [t.with_numbers("cost", times.by_name[shapes[t.key]]) for t in counted]


def _time(
    models: Mapping[str, ModelConfig], device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    return time_per_token(random_decoders(models, device), progress)


def with_drafts(
    results: Sequence[Trial],
    tokens_folder: Path,
    folder: Path,
    progress: Progress,
    on_device: OnDevice | None = None,
) -> list[Trial]:
    """Add how the models draft for their full models; costs must be known.

    What is not stored in the sweep's folder is measured on a device, if one is given.
    """
    targets = draft_targets(results)
    pairs = {
        f"{one.key} for {targets[one.key].key}": (one, targets[one.key])
        for one in results
        if one.key in targets
    }
    path, state = folder / DRAFTS_NAME, content_key(environment(), SWEEP_NEW_TOKENS)
    stored = Measured.read_measured(path, progress.note)
    known = stored.by_name if stored and stored.state == state else {}
    missing = {name: pair for name, pair in pairs.items() if name not in known}
    if on_device and missing:
        progress.start("drafts", len(missing))
        measure = partial(_measure_drafts, missing, tokens_folder)
        known = {**known, **on_device(measure, progress)}
        Measured(state=state, by_name=known).write(path)
    numbers = {pair[0].key: known[name] for name, pair in pairs.items() if name in known}
    return [result.with_numbers("decoding", numbers.get(result.key, {})) for result in results]


def text_of(tokens_folder: Path) -> TokenStore:
    """Return the text of prepared data, or raise `UserError`."""
    parts = open_data(tokens_folder).parts
    if found := next((part for part in parts if isinstance(part, TokenStore)), None):
        return found
    raise UserError(f"this is measured on text, and the data {tokens_folder.name} has none")


def _measure_drafts(
    pairs: Mapping[str, tuple[Trial, Trial]], tokens_folder: Path, device: str, progress: Progress
) -> dict[str, dict[str, float]]:
    """Measure drafts of full models on held-out text; one that cannot draft is noted."""
    text, found = text_of(tokens_folder), dict[str, dict[str, float]]()
    load = partial(load_model, device=device, dtype=DTYPES[device_precision(device)], frozen=True)
    load_full = lru_cache(maxsize=1)(load)
    for name, (trial, full) in sorted(pairs.items(), key=lambda pair: pair[1][1].key):
        try:
            model = load_full(Path(str(full.checkpoint)), schedule=full.model.corrections)
            length = min(SWEEP_PROMPT_TOKENS + SWEEP_NEW_TOKENS, model.config.context_length)
            (batch,) = text.validation_batches(
                context_length=length, num_tokens=NUM_TEXTS * length, batch_size=NUM_TEXTS
            )
            draft: Decoder | IterationSchedule = trial.model.corrections
            if trial.checkpoint != full.checkpoint:
                draft = load(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
            speed = measure_draft(model, draft, batch.input_ids)
            found[name] = {
                "acceptance": speed.acceptance,
                "exact_ms_per_token": speed.ms_per_token,
                "speed_up": speed.speed_up,
            }
        except UserError as error:
            progress.note(f"{trial.name}: its drafts are not measured: {error}")
        progress.advance(len(found))
    progress.finish(format_count(len(found), "draft"))
    return found
