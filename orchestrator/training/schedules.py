"""The iteration schedule of each step, and what the step costs.

In training in stages the decoder first runs without corrections, which costs a quarter of the time
at r = 3, then with more and more of them, or with all at once. The weights are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from iiet.cost import inference_cost, training_flops_per_token
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, Model
from iiet.schedule import IterationSchedule
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import TrainingJob

ScheduleByStep = Callable[[int], IterationSchedule]
"""Step -> the iteration schedule that is trained at this step."""


def schedule_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> ScheduleByStep:
    """Return the schedule of each step: no corrections in the first stage, then all of them, at
    once or over a ramp.

    On the ramp layer l makes `min(r_l, 1)`, `min(r_l, 2)`, ... corrections, each for an equal
    stretch of it; the last stretch has them all.
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
    """Return step -> training FLOPs of one token, with the forward pass of a teacher that runs."""
    config, distillation = job.config(), job.distillation or DistillationConfig()
    schedule_at = schedule_by_step(config.corrections, job.recipe)

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
