"""The iteration schedule of each training step, and the FLOPs of each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from iiet.cost import inference_cost, training_flops_per_token
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, Model
from iiet.schedule import IterationSchedule
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings

ScheduleByStep = Callable[[int], IterationSchedule]
"""Step -> the iteration schedule that is trained in this step."""


def schedule_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> ScheduleByStep:
    """Return the schedule of each step: no corrections in the first stage, then all of them.

    The ramp between the two has equal parts: in part k, layer l makes `min(r_l, k)` corrections.
    """
    most = max(schedule.corrections)
    stages = tuple(
        IterationSchedule(tuple(min(r, top) for r in schedule.corrections))
        for top in range(most + 1)
    )
    first = round(recipe.num_steps * recipe.iterate_from_fraction)
    end = round(recipe.num_steps * (recipe.iterate_from_fraction + recipe.iterate_ramp_fraction))

    def schedule_at(step: int) -> IterationSchedule:
        if step < first:
            return stages[0]
        if step >= end:
            return stages[most]
        return stages[min(most, 1 + (step - first) * most // (end - first))]

    return schedule_at


def flops_per_token_by_step(
    job: TrainingJob, teacher: Model | None = None
) -> Callable[[int], float]:
    """Return step -> training FLOPs per token; a teacher that runs adds its forward pass."""
    config, distillation = job.model, job.distillation or DistillationConfig()
    schedule_at = schedule_by_step(config.corrections, job.recipe)
    teacher_flops = 0.0
    if isinstance(teacher, Decoder):
        teacher_flops = inference_cost(teacher.config).forward_flops_per_token

    @lru_cache
    def student_flops(schedule: IterationSchedule) -> float:
        return float(training_flops_per_token(config, schedule))

    return lambda step: (
        student_flops(schedule_at(step))
        + (teacher_flops if distillation.uses_teacher(step) else 0.0)
    )
