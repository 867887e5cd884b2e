"""What runs have saved so far, in words: told to a user whose Ctrl-C ended them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from orchestrator.training.checkpoint import step_of
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.job import DONE_NAME, TrainingJob
from orchestrator.workspace.errors import UserError


def resume_step(job: TrainingJob) -> int | None:
    """Return the step that a run goes on from; None if it begins anew."""
    if checkpoints := find_checkpoints(job.folder):
        return step_of(checkpoints[-1])
    with suppress(UserError):  # What it is trained on is gone.
        stage = first_stage_of(job)
        if stage and stage.is_there:
            return stage.num_steps
    return None


def describe_saved_state(jobs: Mapping[str, TrainingJob], *, named: bool = False) -> str:
    """Say what each of these runs has saved.

    Args:
        jobs: Name -> job, at least one.
        named: Say the name also of a single one.
    """
    texts = {name: _what_is_saved(job) for name, job in jobs.items()}
    if len(texts) == 1 and not named:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _what_is_saved(job: TrainingJob) -> str:
    if (job.folder / DONE_NAME).is_file():
        return "the training is finished"
    step = resume_step(job)
    return "nothing was saved" if step is None else f"saved at step {step}"
