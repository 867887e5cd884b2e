"""Key of a training, and its outcome when it has finished.

The key is the hash of everything that determines the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from iiet.methods import METHODS
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import check_checkpoint, weights_key
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import TrainingSettings
from orchestrator.training.schedules import DRAWS_VERSION
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import DONE_NAME, checkpoint_name
from orchestrator.workspace.provenance import content_key

PROFILE_NAME = "profile"
"""Folder of the profiler's files in a run's folder."""

JOURNAL_ONLY_FIELDS = (
    "num_sequences_per_pass",
    "activation_checkpointing",
    "compile",
    "skip_bad_steps",
    "validate_every_steps",
    "num_validation_tokens",
)
"""Fields of a recipe that change the journal or the rounding of a run, but not its result.
`skip_bad_steps` decides only whether a run gets to its end."""

NON_KEY_FIELDS = {
    *JOURNAL_ONLY_FIELDS,
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "num_checkpoints_kept",
    "keep_best",
    "profile_steps",
}
"""Fields of a recipe that are not part of the key."""


def job_key(job: TrainingJob) -> str:
    """Return the hash of everything that determines a job's result.

    Raises:
        UserError: If the tokens, the teacher or the initial weights are missing or damaged.
    """
    return content_key(key_fields(job))


def key_fields(job: TrainingJob) -> dict[str, Any]:
    """Return everything that determines a job's result, as JSON-able values."""
    distills = job.objective == "distill"
    teacher = job.teacher_folder if distills else None
    # Absent where all layers are kept, so that keys of such jobs are those of earlier versions.
    dropping = {} if job.kept_layers is None else {"kept_layers": list(job.kept_layers)}
    recipe = job.recipe.model_dump(mode="json", exclude=NON_KEY_FIELDS)
    if job.recipe.elastic is None:  # Likewise.
        del recipe["elastic"]
    else:
        recipe["elastic"]["draws"] = DRAWS_VERSION
    version = METHODS[job.model.method].version
    return {
        **dropping,
        **({"method_version": version} if version > 1 else {}),  # Likewise.
        "model": job.model.to_dict(),
        "recipe": recipe,
        # A dry run plans jobs whose tokens are not prepared; no stored job has their key.
        "tokens": open_data(job.tokens_folder).fingerprint if job.tokens_folder else "",
        "teacher": weights_key(Path(teacher)) if teacher else None,
        "initial": weights_key(Path(job.initial_folder)) if job.initial_folder else None,
        "distillation": asdict(job.distillation or DistillationConfig()) if distills else None,
    }


def sequences_per_step(
    recipe: TrainingSettings, config: ModelConfig, *, section: str = "training"
) -> int:
    """Return the number of sequences in the global batch.

    Raises:
        UserError: If the tokens per step are not a multiple of the context length.
    """
    sequences, rest = divmod(recipe.num_tokens_per_step, config.context_length)
    if rest or not sequences:
        raise UserError(
            f"{section}.num_tokens_per_step must be a multiple of the context length "
            f"{config.context_length}, such as {max(1, sequences) * config.context_length}; got "
            f"{recipe.num_tokens_per_step}"
        )
    return sequences


def finished_outcome(
    job: TrainingJob, warn: Callable[[str], None] | None = None
) -> TrainingOutcome | None:
    """Return the outcome of a finished job with an intact last checkpoint, else None.

    `warn` is called with a sentence if the last checkpoint of a finished job is damaged.
    """
    if not job.tokens_folder:
        return None
    path = job.folder / DONE_NAME
    outcome = TrainingOutcome.read(path)
    if not outcome:
        return None
    folder = job.folder / checkpoint_name(outcome.step)  # The workspace may have been moved.
    try:
        check_checkpoint(folder)
    except UserError as error:
        if warn:
            warn(f"{error}; the end of this training is lost and is trained again")
        return None
    return outcome.model_copy(update={"checkpoint": str(folder)})
