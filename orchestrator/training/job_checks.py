"""Check before a training starts that its job can run and that its folder holds no other job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from iiet.dropping import kept_config
from orchestrator.data.mixture import open_data
from orchestrator.data.order import check_even_split
from orchestrator.data.store import verify_data
from orchestrator.models.folder import check_checkpoint, load_config
from orchestrator.records.training import TrainingJob
from orchestrator.training.job import key_fields, sequences_per_step
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, write_json
from orchestrator.workspace.layout import JOB_NAME
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key


def check_job(job: TrainingJob, *, num_workers: int = 1) -> None:
    """Check within a moment that a job can run.

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
        from orchestrator.training.remote_copy import RemoteCopy  # importing pyarrow is slow

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


def stored_job(folder: Path) -> TrainingJob | None:
    """Return the job of a run's folder; None if its file is missing, damaged or too old."""
    path = folder / JOB_NAME
    try:
        stored = read_json(path)
        return TrainingJob.parse(stored.get("job", {}), path) if stored else None
    except UserError:
        return None


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
