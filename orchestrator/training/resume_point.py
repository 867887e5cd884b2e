"""What an interrupted run has saved, as a text for the user."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator.records.training import TrainingJob
from orchestrator.training.first_stage import first_stage_of
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints, step_of


def describe_saved_state(jobs: Mapping[str, TrainingJob], *, named: bool = False) -> str:
    """Say what each run, by its name, has saved; a single run is named only if `named`."""
    texts = {name: _describe(job) for name, job in jobs.items()}
    if len(texts) == 1 and not named:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _describe(job: TrainingJob) -> str:
    if (job.folder / DONE_NAME).is_file():
        return "the training is finished"
    if checkpoints := find_checkpoints(job.folder):
        return f"saved at step {step_of(checkpoints[-1])}"
    if job.continued_from:
        return f"saved at step {step_of(Path(job.continued_from))}"
    with suppress(UserError):  # Its tokens or its teacher were deleted.
        stage = first_stage_of(job)
        if stage and stage.exists:
            return f"saved at step {stage.num_steps}"
    return "nothing was saved"
