"""The models of a job: the decoder to train, and its frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.dropping import drop_layers
from iiet.layers import initial_weights
from orchestrator.models.open import load_model, use_tf32
from orchestrator.records.training import TrainingJob
from orchestrator.training.distributed import World, own_rows
from orchestrator.training.precision import frozen_dtype
from orchestrator.training.teacher_cache import CachedTeacher, cache_plan, open_cache


def decoder_to_train(job: TrainingJob, world: World, checkpoint: Path | None) -> Decoder:
    """Return the decoder on this worker's device, sharded if the model is, in training mode.

    Its weights are those of the checkpoint to resume from, else the job's initial ones, or random.
    It is made without weights. They are then copied tensor by tensor, a shard's own rows only, so
    no worker needs memory for a model beside its own.
    """
    torch.manual_seed(job.recipe.seed)
    use_tf32(world.device)
    source = _source(job, checkpoint)
    config = source.config if source else job.model
    decoder = _without_weights(config)
    if world.is_sharded:
        from orchestrator.training.sharding import shard

        shard(decoder, world, precision=job.recipe.precision)
    decoder.to_empty(device=world.device)
    if source is None:
        weights = initial_weights(_without_weights(config), config.initializer_std)
    else:
        weights = iter(source.state_dict().items())
    _fill(decoder, weights)
    return decoder.train()


def _source(job: TrainingJob, checkpoint: Path | None) -> Decoder | None:
    """Return the decoder to copy, mapped from its file where possible; None for random weights."""
    schedule = job.model.corrections
    folder = checkpoint or job.initial_folder
    if folder is None:
        return None
    if checkpoint is None and job.kept_layers is not None:
        whole = load_model(Path(folder), check=False, frozen=True)
        return drop_layers(whole, job.kept_layers).with_schedule(schedule)
    return load_model(Path(folder), schedule=schedule, check=False, frozen=True)


def _without_weights(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@torch.no_grad()
def _fill(decoder: Decoder, weights: Iterator[tuple[str, Tensor]]) -> None:
    missing = dict(decoder.named_parameters())
    for name, whole in weights:
        parameter = missing.pop(name)
        own = getattr(parameter, "to_local", lambda parameter=parameter: parameter)()
        own.copy_(own_rows(whole, parameter))
    assert not missing, f"no weights for {sorted(missing)}"


def load_teacher(job: TrainingJob, world: World) -> Decoder | CachedTeacher | None:
    """Return the frozen teacher on this worker's device; None if the job has none.

    Stored outputs replace the teacher if they are complete; damaged ones are ignored.
    """
    if job.objective != "distill" or job.teacher_folder is None:
        return None
    plan = cache_plan(job) if job.teacher_cache else None
    if plan and (cached := open_cache(Path(str(job.teacher_cache)), plan)):
        return cached
    dtype = frozen_dtype(job.recipe.precision, world.device)
    folder = Path(job.teacher_folder)
    return load_model(folder, device=world.device, dtype=dtype, check=False, frozen=True)
