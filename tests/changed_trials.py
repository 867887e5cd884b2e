"""Planned trials with another recipe or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.records.trial import AshaRule, EarlyStop, Trial
from orchestrator.settings import SweepSettings
from orchestrator.workspace.layout import STOPPED_NAME


def with_job(trial: Trial, recipe: dict[str, Any], **changes: Any) -> Trial:
    """Return a trial whose job has other settings in its recipe, and other fields."""
    changed = trial.job.recipe.model_copy(update=recipe)
    job = trial.job.model_copy(update={"recipe": changed, **changes})
    return trial.model_copy(update={"job": job})


def in_folder(trial: Trial, folder: Path, **changes: Any) -> Trial:
    """Return a trial that is trained and stored in another folder."""
    moved = with_job(trial, {}, run_folder=str(folder))
    return moved.model_copy(update={"folder": str(folder), **changes})


def stop_early(trial: Trial, rival: Trial, sweep: SweepSettings, step: int) -> EarlyStop:
    """Store that ASHA has stopped a trial at a step, because of another one."""
    stop = EarlyStop(
        rule=AshaRule.of(sweep),
        step=step,
        num_steps=trial.job.recipe.num_steps,
        competitor=rival.label,
        reason=f"its validation loss is 5.000, {rival.label} had 1.000",
    )
    stop.write(Path(trial.folder) / STOPPED_NAME)
    return stop
