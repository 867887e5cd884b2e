"""A training job as a plain value: where, which model, which recipe, which objective.

It pickles and turns into JSON, so the same job runs in this process, in a Ray Train worker or in a
Ray Tune trial. Its key is the hash of all that determines the result; paths, worker counts and how
often a run is watched or saved stay out of it. `orchestrator.training.run` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from orchestrator.data.batches import check_even_split, check_text_length
from orchestrator.data.token_store import open_tokens
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import (
    check_checkpoint,
    checkpoint_name,
    load_config,
    weights_key,
)
from orchestrator.training.compiling import check_compiler
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damage_as_user_error, read_json_object, write_json
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key

STOP_NAME = "stop"
DONE_NAME = "done.json"
JOB_NAME = "job.json"

JOURNAL_ONLY_FIELDS = (
    "num_sequences_per_pass",
    "activation_checkpointing",
    "compile",
    "skip_bad_steps",
    "validate_every_steps",
    "num_validation_tokens",
)
"""Parts of a recipe that change how a run is watched or fitted into memory only, and so its record
and its rounding; or, as `skip_bad_steps`, whether it gets to its end, not what stands there."""

NON_KEY_FIELDS = frozenset(
    [
        *JOURNAL_ONLY_FIELDS,
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "num_checkpoints_kept",
        "keep_best",
    ]
)
"""Parts of a recipe that no key holds: these, and how a run is saved."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that one training run needs to know."""

    run_folder: str
    """Journal, checkpoints and result go here; must be visible to every worker."""
    tokens_folder: str
    """Prepared tokens."""
    model: dict[str, Any]
    """`ModelConfig.to_dict()`, with the iteration schedule to train."""
    recipe: TrainingSettings
    """Steps, batch, rates, and when to look and save."""
    objective: Literal["pretrain", "distill", "cross_entropy"] = "pretrain"
    """`pretrain` from fresh weights, `distill` from a teacher, `cross_entropy` without it."""
    teacher_folder: str | None = None
    """Checkpoint of the frozen teacher; for `distill`."""
    initial_folder: str | None = None
    """Checkpoint whose weights the run starts from; fresh weights when unset."""
    distillation: DistillationConfig | None = None
    """Weights and kind of the distillation loss; its defaults when unset."""
    teacher_cache: str | None = None
    """Folder with what the teacher says, if it was stored; not part of the key."""
    first_stages: str | None = None
    """Folder where models that are trained alike before their corrections are switched on put that
    and find it; None keeps it to itself. Not part of the key."""
    storage: str | None = None
    """URI of a second place for the checkpoints; not part of the key."""
    section: str = "training"
    """Section of the settings that the recipe came from, for advice; not part of the key."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-able remarks that go into every checkpoint; not part of the key."""

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
        return {
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            "recipe": self.recipe.model_dump(mode="json"),
            "distillation": asdict(self.distillation) if self.distillation else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingJob:
        """Rebuild a job from `to_dict`."""
        distillation = values.get("distillation")
        return cls(
            **{name: values[name] for name in _PLAIN_FIELDS if name in values},
            recipe=TrainingSettings.model_validate(values["recipe"]),
            distillation=DistillationConfig(**distillation) if distillation else None,
        )


_PLAIN_FIELDS = (
    "run_folder", "tokens_folder", "model", "objective", "teacher_folder", "initial_folder",
    "teacher_cache", "first_stages", "storage", "section", "provenance",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a run has come to."""

    checkpoint: str | None
    """Folder of the newest checkpoint; None if it was stopped before the first."""
    step: int
    """Optimizer steps done."""
    finished: bool
    """False when stopped on request; the same job goes on from there."""
    validation_loss: float = math.nan
    """Latest validation loss; not a number before the first."""
    train_seconds: float = 0.0
    """Time spent in steps, over all interruptions."""
    num_tokens: int = 0
    """Tokens trained on."""
    training_flops: float = 0.0
    """Training FLOPs, the teacher's forward passes included where it ran."""
    shared_flops: float = 0.0
    """Those among them that another run had spent, on a first stage in common."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping of the fields."""
        return asdict(self)


def job_key(job: TrainingJob) -> str:
    """Return the hash of all that determines a job's result.

    Raises:
        UserError: If the tokens, the teacher or the initial weights are missing or damaged.
    """
    return content_key(_essence(job))


def _essence(job: TrainingJob) -> dict[str, Any]:
    distills = job.objective == "distill"
    loss = asdict(job.distillation or DistillationConfig()) if distills else None
    return {
        "model": job.config().to_dict(),
        "recipe": {
            name: value
            for name, value in job.recipe.model_dump(mode="json").items()
            if name not in NON_KEY_FIELDS
        },
        "tokens": open_tokens(job.tokens_folder).fingerprint,
        "teacher": weights_key(Path(job.teacher_folder))
        if job.teacher_folder and distills
        else None,
        "initial": weights_key(Path(job.initial_folder)) if job.initial_folder else None,
        "distillation": loss,
    }


def check_job(job: TrainingJob, *, num_workers: int = 1) -> None:
    """Find in a moment, before anything is started, what would make a job fail.

    Raises:
        UserError: If tokens or checkpoints are missing, sizes do not go together, or the batch
        cannot be shared.
    """
    config = job.config()
    if job.recipe.compile:
        check_compiler(job.section)
    if job.storage:
        from orchestrator.training.remote_copy import RemoteCopy  # pyarrow takes a moment

        RemoteCopy(job.storage, job.folder)
    store = open_tokens(job.tokens_folder)
    if store.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokens use {store.vocab_size} entries, the model has a vocab_size of "
            f"{config.vocab_size}"
        )
    check_text_length(len(store.train), config.context_length, "training")
    check_text_length(len(store.validation), config.context_length, "validation")
    global_batch = sequences_per_step(job.recipe, config, section=job.section)
    check_even_split(global_batch, num_workers, section=job.section)
    if job.objective == "distill" and not job.teacher_folder:
        raise UserError("distillation needs a teacher's checkpoint; `iiet-orch pretrain` makes one")
    if job.teacher_folder:
        check_checkpoint(Path(job.teacher_folder))
    if job.initial_folder:
        folder = Path(job.initial_folder)
        check_checkpoint(folder)
        initial = load_config(folder)
        if replace(initial, schedule=config.schedule) != config:
            raise UserError(
                f"the weights in {job.initial_folder} are another model's than the one to train; "
                "only the iteration schedule may differ"
            )
    _check_claim(job)


def sequences_per_step(
    recipe: TrainingSettings, config: ModelConfig, *, section: str = "training"
) -> int:
    """Return the sequences of the global batch.

    Args:
        recipe: How the model is trained.
        config: The model.
        section: Of the settings that the recipe came from, for the error.

    Raises:
        UserError: If the tokens of a step are no whole number of sequences.
    """
    sequences, rest = divmod(recipe.num_tokens_per_step, config.context_length)
    if rest or not sequences:
        raise UserError(
            f"{section}.num_tokens_per_step must be a multiple of the context length "
            f"{config.context_length}, such as {max(1, sequences) * config.context_length}; got "
            f"{recipe.num_tokens_per_step}"
        )
    return sequences


def write_job_file(job: TrainingJob) -> None:
    """Write the job into its folder, so that a run of other settings cannot go on in it by mistake.

    Raises:
        UserError: As `check_job`.
    """
    _check_claim(job)
    path = job.folder / JOB_NAME
    if not path.exists():
        essence = _essence(job)
        claim = {"recipe_version": RECIPE_VERSION, "key": content_key(essence)}
        write_json(path, {**claim, "essence": essence, "job": job.to_dict()})


def _check_claim(job: TrainingJob) -> None:
    earlier = read_json_object(job.folder / JOB_NAME)
    if earlier is not None and earlier.get("recipe_version", 1) != RECIPE_VERSION:
        raise UserError(
            f"{job.folder} holds a run of another version of this program, which this one cannot "
            "go on with; choose another name, and take its model along with `iiet-orch import "
            f"{job.folder}`"
        )
    essence = _essence(job)
    if earlier is not None and earlier.get("key") != content_key(essence):
        raise UserError(
            f"{job.folder} holds a run of other settings "
            f"({_difference(earlier.get('essence'), essence)}); "
            "choose another name, or delete the folder"
        )


def _difference(earlier: Any, now: Any, prefix: str = "") -> str:
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
        parts = [
            _difference(earlier.get(name), now.get(name), f"{prefix}{name}.") for name in names
        ]
        return ", ".join(parts)
    return f"{prefix.removesuffix('.')} was {earlier!r}, is {now!r}"


def finished_outcome(
    job: TrainingJob, warn: Callable[[str], None] | None = None
) -> TrainingOutcome | None:
    """Return the outcome of a finished job whose last checkpoint is whole; None otherwise.

    Args:
        job: Whose folder is read.
        warn: Called where the job was finished, and its last checkpoint is damaged.
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
            warn(f"{error}; this training is not finished any more, and is done again")
        return None
    return outcome


def request_stop(run_folder: Path) -> None:
    """Ask a job to save its state and return after its current step, whatever process it is in."""
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / STOP_NAME).touch()


def clear_stop_request(run_folder: Path) -> None:
    """Withdraw the request; what starts or continues a job does so first."""
    (run_folder / STOP_NAME).unlink(missing_ok=True)


def is_stop_requested(run_folder: Path) -> bool:
    """Return whether a stop was asked for."""
    return (run_folder / STOP_NAME).exists()
