"""The models of a job: the decoder to train, and its frozen teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.dropping import drop_layers
from orchestrator.records.training import TrainingJob
from orchestrator.training.distributed import World
from orchestrator.training.model_loading import load_model
from orchestrator.training.teacher_cache import CachedTeacher, cache_plan, open_cache


def initial_decoder(job: TrainingJob, config: ModelConfig) -> Decoder:
    """Return the decoder before the first step, with random weights or those of a checkpoint."""
    torch.manual_seed(job.recipe.seed)
    if job.initial_folder is None:
        return Decoder(config)
    if job.kept_layers is None:
        return load_model(Path(job.initial_folder), schedule=config.corrections, check=False)
    decoder = load_model(Path(job.initial_folder), check=False, frozen=True)  # It is copied below.
    return drop_layers(decoder, job.kept_layers).with_schedule(config.corrections)


def load_teacher(job: TrainingJob, world: World) -> Decoder | CachedTeacher | None:
    """Return the frozen teacher on this worker's device; None if the job has none.

    Stored outputs replace the teacher if they are complete; damaged ones are ignored.
    """
    if job.objective != "distill" or job.teacher_folder is None:
        return None
    plan = cache_plan(job) if job.teacher_cache else None
    if plan and (cached := open_cache(Path(str(job.teacher_cache)), plan)):
        return cached
    return load_model(Path(job.teacher_folder), device=world.device, check=False, frozen=True)
