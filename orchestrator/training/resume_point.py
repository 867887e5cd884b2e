"""The step that a run resumes from, and the text that tells an interrupted user what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from orchestrator.training.checkpoint import step_of
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.job import DONE_NAME, TrainingJob
from orchestrator.workspace.errors import UserError


def resume_step(job: TrainingJob) -> int | None:
    """Return the step that a run resumes from; None if it starts anew."""
    if checkpoints := find_checkpoints(job.folder):
        return step_of(checkpoints[-1])
    with suppress(UserError):  # Its tokens or its teacher were deleted.
        stage = first_stage_of(job)
        if stage and stage.exists:
            return stage.num_steps
    return None


def describe_saved_state(jobs: Mapping[str, TrainingJob], *, named: bool = False) -> str:
    """Say what each run has saved.

    Args:
        jobs: Name -> job, at least one.
        named: Write the name even for a single job.
    """
    texts = {name: _describe(job) for name, job in jobs.items()}
    if len(texts) == 1 and not named:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _describe(job: TrainingJob) -> str:
    if (job.folder / DONE_NAME).is_file():
        return "the training is finished"
    step = resume_step(job)
    return "nothing was saved" if step is None else f"saved at step {step}"
