"""The job that pretrains the model of some settings."""

from __future__ import annotations

from pathlib import Path

from iiet.methods import METHODS
from orchestrator.data.preparation import check_context_length, expected_tokens
from orchestrator.models.config import build_model_config
from orchestrator.records.training import TrainingJob
from orchestrator.settings import Settings
from orchestrator.training.finished_weights import folder_of_weights
from orchestrator.training.job import job_key
from orchestrator.training.schedules import checked_family
from orchestrator.workspace.layout import Workspace

KEY_CHARACTERS = 8


def pretraining_job(
    settings: Settings, workspace: Workspace, tokens: Path | None, name: str | None = None
) -> TrainingJob:
    """Return the job that pretrains the model of these settings; its sizes are checked.

    Args:
        tokens: Folder of prepared tokens. Without it the job has the expected vocabulary and can be
            planned, but not run.
        name: Name of the run's folder; when unset, that of a finished run of this model, or else
            made from method, schedule and content.

    Raises:
        UserError: If the settings do not go together.
    """
    expected = expected_tokens(settings.data, tokens)
    config = build_model_config(
        settings.model, vocab_size=expected.vocab_size, context_length=expected.context_length
    )
    check_context_length(settings.data, config.context_length)
    job = TrainingJob(
        run_folder="",
        tokens_folder=str(tokens or ""),
        model=config,
        recipe=checked_family(settings.training, config),
        first_stages=str(workspace.first_stages),
        storage=settings.cluster.storage,
    )
    folder = workspace.runs / (name or "")
    if name is None:
        key = job_key(job)
        counts = sorted(set(config.corrections))
        schedule = f"-r{counts[0]}" if len(counts) == 1 else "-ragged"
        middle = schedule if METHODS[config.method].has_corrections else ""
        usual = workspace.runs / f"{config.method}{middle}-{key[:KEY_CHARACTERS]}"
        folder = folder_of_weights(workspace, key, usual)
    return job.model_copy(update={"run_folder": str(folder)})
