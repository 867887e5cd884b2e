"""A training before it runs: the job of some settings, its key, its checks and its outcome.

The key is the hash of everything that determines the result. Equal weights are not trained twice,
whatever they are for: a run of `pretrain --name`, a model of a sweep and a student may be the same
training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from iiet.config import DistillationConfig, ModelConfig
from iiet.facts import facts_of
from orchestrator.data.mixture import open_data
from orchestrator.data.order import check_even_split
from orchestrator.data.preparation import check_context_length, expected_tokens
from orchestrator.data.store import verify_data
from orchestrator.models.config import build_model_config
from orchestrator.models.folder import check_checkpoint, load_config, weights_key
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import Settings, TrainingSettings
from orchestrator.training.dropping import kept_config
from orchestrator.training.remote_copy import RemoteCopy
from orchestrator.training.schedules import DRAWS_VERSION, checked_family
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, write_json
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, Workspace, checkpoint_name
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key

KEY_CHARACTERS = 8
"""Characters of the key in the name of a run."""

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
    recipe = checked_family(settings.training, config)
    if facts_of(config.method).full_level is not None:  # Its levels are no stages of a training.
        stages = {"iterate_from_fraction": 0.0, "iterate_ramp_fraction": 0.0}
        recipe = recipe.model_copy(update=stages)
    job = TrainingJob(
        run_folder="",
        tokens_folder=str(tokens or ""),
        model=config,
        recipe=recipe,
        first_stages=str(workspace.runs),
        storage=settings.cluster.storage,
    )
    folder = workspace.runs / (name or "")
    if name is None:
        key = job_key(job)
        counts = sorted(set(config.corrections))
        schedule = f"-r{counts[0]}" if len(counts) == 1 else "-ragged"
        middle = schedule if facts_of(config.method).has_corrections else ""
        usual = workspace.runs / f"{config.method}{middle}-{key[:KEY_CHARACTERS]}"
        folder = folder_of_weights(workspace, key, usual)
    return job.model_copy(update={"run_folder": str(folder)})


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


# The key


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
    version = facts_of(job.model.method).version
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


def folder_of_weights(workspace: Workspace, key: str, usual: Path) -> Path:
    """Return the folder in which the training of a key is finished, else its usual folder."""
    if (usual / JOB_NAME).exists():
        return usual
    # Folders of trials are named by their keys, so only the names of runs tell nothing.
    runs = sorted(workspace.runs.glob(f"*/{DONE_NAME}"))
    for done in (*runs, workspace.trials / key / DONE_NAME):
        record = done.with_name(JOB_NAME)
        are_files = done.is_file() and record.is_file()
        if are_files and _key_in(record, record.stat().st_mtime_ns) == key:
            return done.parent
    return usual


@lru_cache(maxsize=4096)
def _key_in(record: Path, _modified: int) -> str | None:
    try:
        return (read_json(record) or {}).get("key")
    except UserError:
        return None  # Who uses that run is told of the damage.


# Checks, within a moment, and what a folder holds


def check_job(job: TrainingJob, *, num_workers: int = 1) -> None:
    """Check that a job can run, and that its folder holds no other job.

    Raises:
        UserError: If tokens or checkpoints are missing, sizes do not fit together, or the batch
            cannot be divided among the workers.
    """
    config = job.model
    verify_data(Path(job.tokens_folder), remember=True)
    data = open_data(job.tokens_folder)
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokens need a vocab_size of {data.vocab_size}, the model's is {config.vocab_size}"
        )
    data.check_length(config.context_length)
    global_batch = sequences_per_step(job.recipe, config, section=job.section)
    check_even_split(global_batch, num_workers, section=job.section)
    if job.objective == "distill" and not job.teacher_folder:
        raise UserError("distillation needs a teacher's checkpoint; `iiet-orch pretrain` makes one")
    if job.teacher_folder:
        check_checkpoint(Path(job.teacher_folder), remember=True)
    if job.initial_folder:
        folder = Path(job.initial_folder)
        check_checkpoint(folder, remember=True)
        initial = load_config(folder)
        if job.kept_layers is not None:
            try:
                initial = kept_config(initial, job.kept_layers)
            except ValueError as error:
                raise UserError(f"the model in {folder}: {error}") from None
        has_layers = initial.num_layers == config.num_layers
        if not has_layers or replace(initial, schedule=config.schedule) != config:
            raise UserError(
                f"the weights in {job.initial_folder} belong to a model with another configuration "
                "than the one to train; only the iteration schedule may differ"
            )
    essence = _check_job_file(job)
    if job.storage:
        RemoteCopy(job.storage, job.folder, content_key(essence))


def write_job_file(job: TrainingJob) -> None:
    """Write `job.json`, so that a job with other settings cannot resume in this folder.

    Raises:
        UserError: If the folder holds another job.
    """
    essence = _check_job_file(job)
    path = job.folder / JOB_NAME
    if not path.exists():
        record = {"recipe_version": RECIPE_VERSION, "key": content_key(essence)}
        write_json(path, {**record, "essence": essence, "job": job.stored_at(path)})


def _check_job_file(job: TrainingJob) -> dict[str, Any]:
    # Compares the fields of the key with those in `job.json`, and returns them.
    earlier = read_json(job.folder / JOB_NAME)
    if earlier is not None and earlier.get("recipe_version", 1) != RECIPE_VERSION:
        raise UserError(
            f"{job.folder} holds a run of another version of this program, which this version "
            "cannot resume; choose another name or another workspace"
        )
    essence = key_fields(job)
    if earlier is not None and earlier.get("key") != content_key(essence):
        raise UserError(
            f"{job.folder} holds a run with other settings "
            f"({describe_difference(earlier.get('essence'), essence)}); "
            "choose another name, or delete the folder"
        )
    return essence


def describe_difference(earlier: Any, now: Any, prefix: str = "") -> str:
    """Say which fields of two nested mappings differ; empty if none."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
        parts = [
            describe_difference(earlier.get(name), now.get(name), f"{prefix}{name}.")
            for name in names
        ]
        return ", ".join(parts)
    return f"{prefix.removesuffix('.')} was {earlier!r}, is {now!r}"


def stored_job(folder: Path) -> TrainingJob | None:
    """Return the job of a run's folder; None if its file is missing, damaged or too old."""
    try:
        return TrainingJob.of_folder(folder)
    except UserError:
        return None


def finished_outcome(
    job: TrainingJob, warn: Callable[[str], None] | None = None
) -> TrainingOutcome | None:
    """Return the outcome of a finished job with an intact last checkpoint, else None.

    `warn` is called with a sentence if the last checkpoint of a finished job is damaged.
    """
    outcome = TrainingOutcome.read(job.folder / DONE_NAME) if job.tokens_folder else None
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
