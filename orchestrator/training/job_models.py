"""The models of a job: the decoder to train, and its frozen teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from iiet.decoder import Decoder
from iiet.dropping import drop_layers
from orchestrator.records.training import TrainingJob
from orchestrator.training.distributed import World
from orchestrator.training.model_loading import load_model
from orchestrator.training.precision import use_tf32
from orchestrator.training.teacher_cache import CachedTeacher, cache_plan, open_cache


def decoder_to_train(job: TrainingJob, world: World, checkpoint: Path | None) -> Decoder:
    """Return the decoder on this worker's device, in training mode.

    Its weights are those of the checkpoint to resume from, else the job's initial ones, or random.
    """
    torch.manual_seed(job.recipe.seed)
    use_tf32(world.device)
    schedule = job.model.corrections
    folder = checkpoint or job.initial_folder
    if folder is None:
        decoder = Decoder(job.model)
    elif checkpoint is None and job.kept_layers is not None:
        whole = load_model(Path(folder), check=False, frozen=True)  # It is copied below.
        decoder = drop_layers(whole, job.kept_layers).with_schedule(schedule)
    else:
        decoder = load_model(Path(folder), device=world.device, schedule=schedule, check=False)
    return decoder.to(world.device).train()


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
