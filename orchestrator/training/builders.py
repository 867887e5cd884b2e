"""The parts of a run, made from the words of its job: weights, teacher, loss, FLOPs, provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.cost import inference_cost, training_flops_per_token
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, Model
from iiet.schedule import IterationSchedule
from orchestrator.data.token_store import TokenStore
from orchestrator.training.checkpoint import load_decoder, weights_key
from orchestrator.training.distributed import World
from orchestrator.training.job import TrainingJob
from orchestrator.training.objective import (
    Objective,
    ScheduleAt,
    distillation_objective,
    pretraining_objective,
)
from orchestrator.training.teacher_cache import CachedTeacher, open_cache
from orchestrator.training.teacher_choice import cache_plan
from orchestrator.workspace.provenance import environment


def first_weights(job: TrainingJob, config: ModelConfig) -> Decoder:
    """Return the decoder before the first step: fresh by the seed, or a checkpoint's."""
    torch.manual_seed(job.recipe.seed)
    if job.initial_folder is None:
        return Decoder(config)
    decoder = load_decoder(Path(job.initial_folder), check=False)
    return decoder.with_schedule(config.corrections)


def load_teacher(job: TrainingJob, world: World) -> Decoder | CachedTeacher | None:
    """Return the frozen teacher on this worker's device; None if the job has none.

    Where its answers are stored and whole, they stand for it; what is damaged is not used.
    """
    if job.objective != "distill" or job.teacher_folder is None:
        return None
    plan = cache_plan(job) if job.teacher_cache else None
    if plan and (cached := open_cache(Path(str(job.teacher_cache)), plan)):
        return cached
    return load_decoder(Path(job.teacher_folder), device=world.device, check=False, frozen=True)


def objective_of(job: TrainingJob, schedule_at: ScheduleAt, teacher: Model | None) -> Objective:
    """Return the loss that the job minimizes."""
    if teacher is None:
        return pretraining_objective(schedule_at)
    return distillation_objective(schedule_at, teacher, job.distillation or DistillationConfig())


def flops_counter(
    job: TrainingJob, config: ModelConfig, schedule_at: ScheduleAt, teacher: Model | None
) -> Callable[[int], float]:
    """Return step -> training FLOPs of one token, a teacher's forward pass included if it runs."""
    distillation = job.distillation or DistillationConfig()

    @lru_cache
    def training(schedule: IterationSchedule) -> float:
        return float(training_flops_per_token(config, schedule))

    forward = (
        inference_cost(teacher.config).forward_flops_per_token
        if isinstance(teacher, Decoder)
        else 0.0
    )
    return lambda step: (
        training(schedule_at(step)) + (forward if distillation.uses_teacher(step) else 0.0)
    )


def provenance_of(job: TrainingJob, store: TokenStore) -> dict[str, Any]:
    """Return what a checkpoint says about its origin; weights and checksums are added on saving."""
    return {
        "tokens": store.fingerprint,
        "objective": job.objective,
        "recipe": job.recipe.model_dump(mode="json"),
        "distillation": asdict(job.distillation) if job.distillation else None,
        "teacher": weights_key(Path(job.teacher_folder)) if job.teacher_folder else None,
        "environment": environment(),
        **job.provenance,
    }


def random_state(world: World) -> dict[str, Tensor]:
    """Return the state of the random numbers.

    Nothing draws any after the weights are made; it is kept so that dropout could come.
    """
    state = {"cpu": torch.get_rng_state()}
    if world.device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_random_state(state: Mapping[str, Tensor], world: World) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], world.device)
