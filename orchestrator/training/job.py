"""A training before it runs: its job from settings, its key, its checks, and its state.

The key is the hash of everything that determines the result, so equal weights are trained once: a
run of `pretrain --name`, a model of a sweep and a student may be the same training. Marks on the
fields of a recipe say which are part of the key (`settings/effects.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from iiet.freezing import TrainedLayers, trained_part
from iiet.hf.weights import CONFIG
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.facts import facts_of
from orchestrator.data.mixture import open_data
from orchestrator.data.order import check_even_split
from orchestrator.data.preparation import check_sequence_length, expected_tokens
from orchestrator.data.store import TOKENIZER_NAME, verify_data
from orchestrator.models.folder import (
    check_checkpoint,
    is_checkpoint,
    load_provenance,
    weights_key,
)
from orchestrator.records.training import StoredJob, TrainingJob, TrainingOutcome
from orchestrator.records.training_state import Training, TrainingState
from orchestrator.settings import Settings, TrainingSettings
from orchestrator.settings.effects import key_values
from orchestrator.training.schedules import DRAWS_VERSION, checked_family
from orchestrator.training.source import Source, check_tokenizer, find_source
from orchestrator.training.uploads import CheckpointUploads
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.layout import (
    DONE_NAME,
    JOB_NAME,
    Workspace,
    find_checkpoints,
)
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key

KEY_CHARACTERS = 8
"""Characters of the key in the name of a run."""

# The job of a pretraining


def pretraining_job(
    settings: Settings,
    workspace: Workspace,
    tokens: Path | None,
    name: str | None = None,
    *,
    source: Source | None = None,
) -> TrainingJob:
    """Return the job that pretrains the model of these settings; checks the sizes.

    Args:
        tokens: Folder of prepared tokens. Without it the job has the expected vocabulary, and can
            be planned but not run.
        name: Name of the run's folder. When unset, the name of a finished run of this model, else
            one made from method, schedule and content.
        source: The source model, which gives the sizes, and with `training.source` also the
            weights; when unset, the one that `training.source` names. It may be missing if no
            tokens are given.

    Raises:
        UserError: If the settings do not go together.
    """
    expected = expected_tokens(settings.data, tokens)
    has_source = settings.training.source is not None
    if settings.training.source_kl_weight and not has_source:
        raise UserError(
            f"training.source_kl_weight={settings.training.source_kl_weight:g} needs a source, "
            "which `pretrain --from` or training.source names; name one, or leave it out"
        )
    if source is None and settings.training.source is not None:
        source = find_source(workspace, settings.training.source)
    if source is None:
        config = settings.model.build(
            vocab_size=expected.vocab_size, context_length=expected.context_length
        )
    else:
        config = source.model(settings.model)
        if tokens is not None:
            check_tokenizer(source, tokens / TOKENIZER_NAME, settings.data.tokenizer)
    check_trained_layers(settings.training.trained_layers, config)
    recipe = checked_family(settings.training, config)
    sequences_per_step(recipe, config)
    check_sequence_length(settings.data, recipe.tokens_per_sequence(config))
    if facts_of(config.method).full_level is not None:  # Levels cannot be switched on later.
        stages = {"iterate_from_fraction": 0.0, "iterate_ramp_fraction": 0.0}
        recipe = recipe.model_copy(update=stages)
    job = TrainingJob(
        run_folder="",
        tokens_folder=str(tokens or ""),
        model=config,
        recipe=recipe,
        storage=settings.cluster.storage,
        initial_folder=str(source.folder) if source and has_source else None,
    )
    if name is not None:
        return job.model_copy(update={"run_folder": str(workspace.runs / name)})
    return in_usual_folder(job, workspace)


def in_usual_folder(job: TrainingJob, workspace: Workspace) -> TrainingJob:
    """Return a job with the folder of a finished training of the same key, else with a folder that
    is named after method, schedule and content."""
    key = job_key(job)
    usual_folder = workspace.runs / f"{usual_name(job.model)}-{key[:KEY_CHARACTERS]}"
    folder = folder_of_weights(workspace, key, usual_folder)
    return job.model_copy(update={"run_folder": str(folder)})


def check_trained_layers(trained: TrainedLayers, config: ModelConfig) -> None:
    """Check that only these layers of a model can be trained.

    Raises:
        UserError: If the model does not start as its source model, or nothing would be trained.
    """
    if trained == "all":
        return
    is_plain = not facts_of(config.method).has_corrections
    if not is_plain and getattr(config.options, "start", None) != "identity":
        raise UserError(
            f"training.trained_layers={trained}: layers can be frozen only if the model starts as "
            "its source model; set model.method_options.start=identity, with the method iiet"
        )
    try:
        trained_part(config.corrections, trained)
    except ValueError as error:
        raise UserError(
            f"training.trained_layers={trained}: {error}; set model.corrections or the layers"
        ) from None


def usual_name(config: ModelConfig) -> str:
    """Return how the name of a run begins: the method, and the corrections if it makes any."""
    if not facts_of(config.method).has_corrections:
        return config.method
    counts = set(config.corrections)
    return f"{config.method}-r{min(counts)}" if len(counts) == 1 else f"{config.method}-ragged"


def sequences_per_step(
    recipe: TrainingSettings, config: ModelConfig, *, section: str = "training"
) -> int:
    """Return the number of sequences in the global batch.

    Raises:
        UserError: If a sequence is longer than the model's context, or the tokens per step are not
            a multiple of a sequence.
    """
    length = recipe.tokens_per_sequence(config)
    if length > config.context_length:
        raise UserError(
            f"{section}.sequence_length={length}: the model's context has {config.context_length} "
            "tokens; set it to at most that, or leave it out"
        )
    num_sequences, num_tokens_over = divmod(recipe.num_tokens_per_step, length)
    if num_tokens_over or not num_sequences:
        name = f"{section}.sequence_length"
        origin = name if recipe.sequence_length else "the context length"
        shorter = "" if recipe.sequence_length else f"; {name} makes sequences shorter"
        raise UserError(
            f"{section}.num_tokens_per_step must be a multiple of {origin} {length}, such as "
            f"{max(1, num_sequences) * length}; got {recipe.num_tokens_per_step}{shorter}"
        )
    return num_sequences


# The key


def job_key(job: TrainingJob) -> str:
    """Return the hash of everything that determines a job's result.

    Raises:
        UserError: If the tokens, the teacher or the initial weights are missing or damaged.
    """
    return content_key(key_fields(job))


def key_fields(job: TrainingJob) -> dict[str, Any]:
    """Return everything that determines a job's result, as JSON values.

    A feature that is off has no entry, so that the key is the same as before the feature existed.
    """
    recipe = job.recipe
    if job.sequence_length == job.model.context_length:  # The default, written out.
        recipe = recipe.model_copy(update={"sequence_length": None})
    recipe_fields = key_values(recipe)
    if recipe.elastic is not None:
        recipe_fields["elastic"]["draws"] = DRAWS_VERSION
    if not facts_of(job.model.method).has_gates(job.model.options):
        del recipe_fields["gate_rate_factor"]
    if recipe.optimizer != "muon":
        del recipe_fields["muon_rate_factor"]
        del recipe_fields["muon_momentum"]
    distills = job.objective == "distill"
    teacher = job.teacher_folder if distills else None
    fields: dict[str, Any] = {
        "model": job.model.to_dict(),
        "recipe": recipe_fields,
        # In a dry run tokens may not be prepared. No stored job has this key.
        "tokens": open_data(job.tokens_folder).fingerprint if job.tokens_folder else "",
        "teacher": weights_key(Path(teacher)) if teacher else None,
        "initial": _initial_key(job),
        "distillation": asdict(job.distillation or DistillationConfig()) if distills else None,
    }
    if job.kept_layers is not None:
        fields["kept_layers"] = list(job.kept_layers)
    method_version = facts_of(job.model.method).version
    if method_version > 1:
        fields["method_version"] = method_version
    return fields


def _initial_key(job: TrainingJob) -> str | None:
    """Return the hash of the weights that a training starts from; None if they are random.

    In a plan the source model may not be imported or trained yet. No stored job has such a key.
    """
    if job.initial_folder is None:
        return None
    folder = Path(job.initial_folder)
    is_untrained = not job.tokens_folder and not folder.is_dir()
    is_unimported = not is_checkpoint(folder) and (folder / CONFIG).is_file()
    return "" if is_untrained or is_unimported else weights_key(folder)


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


# The folder


def folder_of_weights(workspace: Workspace, key: str, usual: Path) -> Path:
    """Return the folder that holds the finished training of a key, else its usual folder."""
    if (usual / JOB_NAME).exists():
        return usual
    # Folders of trials are named by their keys; in folders of runs, the key must be read.
    finished_runs = sorted(done.parent for done in workspace.runs.glob(f"*/{DONE_NAME}"))
    for folder in (*finished_runs, workspace.trials / key):
        job_file = folder / JOB_NAME
        if not (job_file.is_file() and (folder / DONE_NAME).is_file()):
            continue
        if _stored_key(job_file, job_file.stat().st_mtime_ns) == key:
            return folder
    return usual


@lru_cache(maxsize=4096)
def _stored_key(job_file: Path, _modified: int) -> str | None:
    """Return the key in a job's file. `_modified`, the file's time, renews the cache.

    The file is not validated, because a plan reads the keys of all runs in a workspace.
    """
    try:
        return (read_json(job_file) or {}).get("key")
    except UserError:
        return None  # Commands that use this run report the damage.


def check_job(job: TrainingJob, *, num_workers: int = 1) -> None:
    """Check quickly that a job can run, and that its folder holds no other job.

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
    global_batch = sequences_per_step(job.recipe, config, section=job.section)
    data.check_length(job.sequence_length)
    check_even_split(global_batch, num_workers, section=job.section)
    for origin in (job.teacher_folder, job.initial_folder):
        if origin:
            check_checkpoint(Path(origin), remember=True)
    check_folder(job)
    if job.storage:
        CheckpointUploads(job.storage, job.folder, job_key(job))


def check_folder(job: TrainingJob) -> None:
    """Check that a job's folder holds no other job.

    Raises:
        UserError: If it holds another job; says what differs.
    """
    stored = StoredJob.read(job.folder / JOB_NAME)
    checkpoints = find_checkpoints(job.folder)
    if stored is None:
        if checkpoints and "imported" in load_provenance(checkpoints[-1]):
            raise UserError(f"{job.folder} holds an imported model; choose another name")
        return
    if stored.recipe_version != RECIPE_VERSION:
        raise UserError(
            f"{job.folder} holds a run of another version of this program, which this version "
            "cannot resume; choose another name or another workspace"
        )
    fields = key_fields(job)
    if stored.key_fields.get("initial") != fields["initial"] and job.objective == "pretrain":
        raise UserError(
            f"{job.folder} holds a run whose source had other weights than training.source="
            f"{job.initial_folder} has now; restore that source, or choose another name"
        )
    if stored.key != content_key(fields):
        raise UserError(
            f"{job.folder} holds a run with other settings "
            f"({describe_difference(stored.key_fields, fields)}); "
            "choose another name, or delete the folder"
        )


def write_job_file(job: TrainingJob) -> None:
    """Write `job.json`, so that a job with other settings cannot resume in this folder.

    Raises:
        UserError: If the folder holds another job.
    """
    check_folder(job)
    path = job.folder / JOB_NAME
    if not path.exists():
        fields = key_fields(job)
        StoredJob(
            recipe_version=RECIPE_VERSION, key=content_key(fields), key_fields=fields, job=job
        ).write(path)


# How far a training is


def training_of(job: TrainingJob) -> Training | None:
    """Return the training in the folder of a job, after verifying its last checkpoint.

    None while the tokens are not prepared, because then the job has no key to compare.

    Raises:
        UserError: If the files of the job or of its end cannot be read.
    """
    if not job.tokens_folder:
        return None
    return Training(job.folder, check_checkpoint)


def has_diverged(job: TrainingJob) -> bool:
    """Return whether the last run of a job diverged.

    Raises:
        UserError: As `finished_outcome`.
    """
    training = training_of(job)
    return training is not None and training.state == TrainingState.DIVERGED


def finished_outcome(job: TrainingJob) -> TrainingOutcome | None:
    """Return the outcome of a finished job with an intact last checkpoint, else None.

    Raises:
        UserError: If the files of the job or of its end cannot be read.
    """
    training = training_of(job)
    return training.outcome if training else None
