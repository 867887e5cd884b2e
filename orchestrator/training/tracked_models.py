"""Describe trained models for MLflow: one logged model for the same weights and schedule.

So a teacher is one model, whichever runs trained and measured it, and each metric names the data
that it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from iiet.config import ModelConfig
from iiet.methods import METHODS
from orchestrator.data.sources import describe_data
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings.model import model_family
from orchestrator.terminal.formatting import format_schedule
from orchestrator.tracking import TrackedModel
from orchestrator.training.checkpoint import weights_key
from orchestrator.workspace.errors import UserError

Dataset = tuple[str, str]
"""Name and digest."""


def tracked_model(
    checkpoint: Path,
    config: ModelConfig,
    datasets: Mapping[str, Dataset | None],
    *,
    seed: int | None = None,
) -> TrackedModel | None:
    """Describe a checkpoint under the schedule of a config; None if its folder is gone.

    Args:
        datasets: As in `TrackedModel`.
        seed: Of its training, if it is one of several.
    """
    try:
        weights = weights_key(checkpoint)
    except UserError:
        return None
    schedule = config.schedule if METHODS[config.method].has_corrections else None
    params = {"method": config.method, "checkpoint": str(checkpoint)}
    parts = [model_family(config)]
    if schedule is not None:
        params["schedule"] = str(schedule)
        parts.append(format_schedule(tuple(schedule)))
    if seed is not None:
        params["seed"] = str(seed)
        parts.append(f"seed {seed}")
    return TrackedModel(
        key=f"{weights} {params.get('schedule', '')}".strip(),
        name=" ".join(parts),
        params=params,
        datasets=datasets,
    )


def trial_model(trial: Trial) -> TrackedModel | None:
    """Describe the model of a measured trial, with its costs and qualities; as `tracked_model`."""
    if trial.checkpoint is None:
        return None
    datasets = {name: _dataset(name, trial.suite) for name in trial.metrics()}
    return tracked_model(Path(trial.checkpoint), trial.model, datasets, seed=trial.seed)


def _dataset(metric: str, suite: TrialSuite) -> Dataset | None:
    if not metric.startswith("quality/"):
        return None
    if metric in ("quality/validation_loss", "quality/perplexity"):
        with suppress(UserError):  # The tokens of an old sweep may be gone.
            name, digest, _ = describe_data(suite.tokens_folder)
            return name, digest
        return None
    return ", ".join(suite.tasks)[:100] or "held-out tasks", suite.key
