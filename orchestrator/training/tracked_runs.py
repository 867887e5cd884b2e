"""What MLflow shows of trainings, and of the models that were trained or measured.

Weights and schedule together are one logged model, whichever runs trained and measured it. Each
metric names the data that it was measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from iiet.model.config import ModelConfig
from orchestrator.data.mixture import describe_data
from orchestrator.models.folder import JOB_KEY, load_provenance, weights_key
from orchestrator.models.labels import model_name
from orchestrator.records.metrics import PERPLEXITY, QUALITY, VALIDATION_LOSS
from orchestrator.records.tracked_run import (
    PRETRAIN_OF_SWEEP,
    RunStatus,
    TrackedModel,
    TrackedRun,
    reason_tags,
)
from orchestrator.records.training import (
    TrainingJob,
    job_parameters,
    method_parameters,
    model_family,
)
from orchestrator.records.trial import Trial
from orchestrator.settings import SETTINGS_NAME
from orchestrator.training.job import finished_outcome, job_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import (
    ACCURACY_METRIC,
    VALIDATION_METRIC,
    now_ms,
    recorded_times,
)

Dataset = tuple[str, str]
"""Name and digest."""


def training_run(
    job: TrainingJob, kind: str, label: str, settings: str, *, status: RunStatus, reason: str = ""
) -> TrackedRun:
    """Return what MLflow shows of a training; start and end are those of its journal.

    Args:
        label: Name of the job among those that are trained together.
        settings: The `settings.yaml` of its run.
        status: With FINISHED, MLflow also shows the model.
        reason: Why the run has failed.
    """
    outcome = finished_outcome(job) if status == "FINISHED" else None
    tags = {"iiet.method": job.model.method}
    if outcome and kind != "distill":
        tags["iiet.checkpoint"] = str(outcome.checkpoint)
        if job.continued_from:
            tags["iiet.continued_from"] = job.continued_from
    started_ms, ended_ms = recorded_times(job.folder) or (now_ms(), None)
    teacher = None
    if job.objective != "pretrain":  # The folder of a student is named by its key.
        teacher = job.teacher_folder or job.initial_folder
    elif job.initial_folder and (source_key := _key_of_training(Path(job.initial_folder))):
        tags["iiet.source_key"] = source_key
    return TrackedRun(
        key=job_key(job),
        kind=kind,
        name=f"{label} of {model_name(Path(teacher))}" if teacher else job.folder.name,
        folder=str(job.folder),
        journal=str(job.folder),
        params=job_parameters(job),
        tags={**tags, **reason_tags(status, reason if status == "FAILED" else "")},
        dataset=describe_data(job.tokens_folder),
        texts={SETTINGS_NAME: settings},
        model=job_model(job) if outcome and kind != PRETRAIN_OF_SWEEP else None,
        status=status,
        started_ms=started_ms,
        ended_ms=ended_ms,
    )


def _key_of_training(checkpoint: Path) -> str | None:
    """Return the tag `iiet.key` of the run that trained a checkpoint; None if it is unknown."""
    with suppress(UserError):  # The checkpoint may have been deleted.
        return load_provenance(checkpoint).get(JOB_KEY)
    return None


def job_model(job: TrainingJob) -> TrackedModel | None:
    """Describe the model of a finished training; None if it is unfinished or its folder is gone.

    The model is linked with the validation metrics of the last step.
    """
    outcome = finished_outcome(job)
    if outcome is None:
        return None
    datasets = dict.fromkeys((VALIDATION_METRIC, ACCURACY_METRIC), _dataset(job.tokens_folder))
    return tracked_model(outcome.checkpoint, job.model, datasets, seed=job.recipe.seed)


def trial_model(trial: Trial) -> TrackedModel | None:
    """Describe the model of a measured trial, with costs and qualities; None if its folder is gone.

    The name tells a student, a baseline and a teacher of the same schedule apart.
    """
    data = _dataset(trial.suite.tokens_folder)
    suite = trial.suite
    tasks = (", ".join(suite.tasks)[:100] or "held-out tasks", suite.key)
    datasets: dict[str, Dataset | None] = {}
    for name in trial.metrics():
        datasets[name] = None
        if name in (VALIDATION_LOSS, PERPLEXITY):
            datasets[name] = data
        elif name.startswith(QUALITY):
            datasets[name] = tasks
    seed = trial.job.recipe.seed if trial.job else trial.seed
    model = tracked_model(trial.checkpoint, trial.model, datasets, seed=seed)
    if model is None or trial.role == "trial" or trial.label.startswith(trial.method):
        return model
    names = (model.name, trial.label)
    return model.model_copy(update={"name": ", ".join(name for name in names if name)})


def tracked_model(
    checkpoint: str | None,
    config: ModelConfig,
    datasets: Mapping[str, Dataset | None],
    *,
    seed: int | None = None,
) -> TrackedModel | None:
    """Describe a measured checkpoint; None if there is none, or its folder is gone.

    Args:
        checkpoint: Its folder.
        config: The model, with the measured iteration schedule.
        datasets: Name of a metric -> the data that it was measured on.
        seed: Seed of its training, if known.
    """
    if checkpoint is None:
        return None
    try:
        weights = weights_key(Path(checkpoint))
    except UserError:
        return None
    params = {**method_parameters(config), "checkpoint": checkpoint}
    name = model_family(config)
    if "schedule" in params:
        name += f" {config.corrections}"
    if seed is not None:
        params["seed"] = str(seed)
    # In a key every layer has its number; text for people shortens equal ones.
    numbers = ",".join(map(str, config.corrections)) if "schedule" in params else ""
    key = f"{weights} {numbers}".strip()
    return TrackedModel(key=key, name=name, params=params, datasets=dict(datasets))


def _dataset(tokens_folder: str) -> Dataset | None:
    with suppress(UserError):  # The tokens of an old sweep may be gone.
        return describe_data(tokens_folder)[:2]
    return None
