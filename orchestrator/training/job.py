"""Description of a training: folders, model, recipe and objective. `run.py` executes it.

The same job runs in this process, in a Ray Train worker or in a Ray Tune trial. Its key is the hash
of everything that determines the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from orchestrator.data.token_store import open_tokens
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import check_checkpoint, checkpoint_name, weights_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damage_as_user_error, read_json_object
from orchestrator.workspace.provenance import content_key

STOP_NAME = "stop"
DONE_NAME = "done.json"

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
}
"""Fields of a recipe that are not part of the key."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that determines one training. Paths and `section` are not part of the key."""

    run_folder: str
    """Folder of journal, checkpoints and result; every worker must see it."""
    tokens_folder: str
    """Prepared tokens."""
    model: dict[str, Any]
    """`ModelConfig.to_dict()`, with the iteration schedule to train."""
    recipe: TrainingSettings
    """Steps, batch, learning rate, when to validate and save."""
    objective: Literal["pretrain", "distill", "cross_entropy"] = "pretrain"
    """`pretrain`: cross-entropy from random weights; `distill`: from a teacher; `cross_entropy`: a
    student trained without its teacher."""
    teacher_folder: str | None = None
    """Checkpoint of the frozen teacher; for `distill`."""
    initial_folder: str | None = None
    """Checkpoint with the initial weights; random weights when unset."""
    distillation: DistillationConfig | None = None
    """The distillation loss; defaults when unset."""
    teacher_cache: str | None = None
    """Folder of the teacher's stored outputs."""
    first_stages: str | None = None
    """Folder of first stages shared between models; nothing is shared when unset."""
    storage: str | None = None
    """URI for copies of the checkpoints."""
    section: str = "training"
    """Settings section of the recipe, named in errors."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-able entries for the `provenance.json` of every checkpoint; not part of the key."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder)

    def config(self) -> ModelConfig:
        """Return the model's configuration.

        Raises:
            UserError: If it is not valid.
        """
        try:
            return ModelConfig.from_dict(self.model)
        except ValueError as error:
            raise UserError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping; `from_dict` is its inverse."""
        values: dict[str, Any] = _JOB.dump_python(self, mode="json")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingJob:
        """Rebuild a job from `to_dict`."""
        return _JOB.validate_python(values)


_JOB = TypeAdapter(TrainingJob)


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """The result of a run, finished or stopped."""

    checkpoint: str | None
    """Folder of the newest checkpoint; None if the run was stopped before the first."""
    step: int
    """Optimizer steps done."""
    finished: bool
    """False if the run was stopped on request; the same job resumes it."""
    validation_loss: float = math.nan
    """Latest validation loss; NaN before the first."""
    train_seconds: float = 0.0
    """Time spent in steps, over all restarts."""
    num_tokens: int = 0
    """Tokens trained on."""
    training_flops: float = 0.0
    """Training FLOPs, with the forward passes of a teacher that ran."""
    shared_flops: float = 0.0
    """Part of them that another run spent on a shared first stage."""


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
    return {
        "model": job.config().to_dict(),
        "recipe": job.recipe.model_dump(mode="json", exclude=NON_KEY_FIELDS),
        "tokens": open_tokens(job.tokens_folder).fingerprint,
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
    path = job.folder / DONE_NAME
    done = read_json_object(path)
    if not done:
        return None
    with damage_as_user_error(path):
        folder = job.folder / checkpoint_name(done["step"])  # The workspace may have been moved.
        outcome = TrainingOutcome(**{**done, "checkpoint": str(folder)})
    try:
        check_checkpoint(folder)
    except UserError as error:
        if warn:
            warn(f"{error}; the end of this training is lost and is trained again")
        return None
    return outcome


def request_stop(run_folder: Path) -> None:
    """Ask a job in any process to save its state and return after the current step."""
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / STOP_NAME).touch()


def clear_stop_request(run_folder: Path) -> None:
    """Delete the stop request. Do this before a job is started or resumed."""
    (run_folder / STOP_NAME).unlink(missing_ok=True)


def is_stop_requested(run_folder: Path) -> bool:
    """Return whether a stop was requested."""
    return (run_folder / STOP_NAME).exists()
