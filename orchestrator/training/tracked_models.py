"""Describe trained models for MLflow: one logged model for the same weights and schedule.

So a teacher is one model, whichever runs trained and measured it, and each metric names the data
that it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from iiet.config import ModelConfig
from orchestrator.data.mixture import describe_data
from orchestrator.models.config import model_family
from orchestrator.models.folder import weights_key
from orchestrator.records.tracked_run import TrackedModel
from orchestrator.records.training import TrainingJob, method_parameters
from orchestrator.records.trial import Trial
from orchestrator.terminal.render import format_schedule
from orchestrator.training.job import finished_outcome
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC

Dataset = tuple[str, str]
"""Name and digest."""


def job_model(job: TrainingJob) -> TrackedModel | None:
    """Describe what a finished training made; None if it has not finished, or its folder is gone.

    It is linked with what was measured on the validation data at its last step.
    """
    outcome = finished_outcome(job)
    if outcome is None or outcome.checkpoint is None:
        return None
    data = _prepared_data(job.tokens_folder)
    datasets = dict.fromkeys((VALIDATION_METRIC, ACCURACY_METRIC), data)
    return _tracked_model(outcome.checkpoint, job.model, datasets, seed=job.recipe.seed)


def trial_model(trial: Trial) -> TrackedModel | None:
    """Describe the model of a measured trial, with its costs and qualities; None if its folder is
    gone.
    """
    if trial.checkpoint is None:
        return None
    data, suite = _prepared_data(trial.suite.tokens_folder), trial.suite
    tasks = (", ".join(suite.tasks)[:100] or "held-out tasks", suite.key)
    datasets: dict[str, Dataset | None] = {}
    for name in trial.metrics():
        is_loss = name in ("quality/validation_loss", "quality/perplexity")
        datasets[name] = data if is_loss else tasks if name.startswith("quality/") else None
    seed = trial.job.recipe.seed if trial.job else trial.seed
    return _tracked_model(trial.checkpoint, trial.model, datasets, seed=seed)


def evaluated_model(
    checkpoint: Path, config: ModelConfig, datasets: Mapping[str, Dataset]
) -> TrackedModel | None:
    """Describe a checkpoint that was evaluated; None if its folder is gone.

    Args:
        datasets: What was measured -> the data that it was measured on.
    """
    return _tracked_model(str(checkpoint), config, datasets)


def _tracked_model(
    checkpoint: str,
    config: ModelConfig,
    datasets: Mapping[str, Dataset | None],
    *,
    seed: int | None = None,
) -> TrackedModel | None:
    try:
        weights = weights_key(Path(checkpoint))
    except UserError:
        return None
    params = {**method_parameters(config), "checkpoint": checkpoint}
    name = model_family(config)
    if "schedule" in params:
        name += f" {format_schedule(tuple(config.corrections))}"
    if seed is not None:
        params["seed"] = str(seed)
    key = f"{weights} {params.get('schedule', '')}".strip()
    return TrackedModel(key=key, name=name, params=params, datasets=dict(datasets))


def _prepared_data(folder: str) -> Dataset | None:
    with suppress(UserError):  # The tokens of an old sweep may be gone.
        name, digest, _ = describe_data(folder)
        return name, digest
    return None
