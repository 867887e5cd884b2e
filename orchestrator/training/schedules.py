"""The iteration schedules of each training step, and the FLOPs of each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from iiet.cost import inference_cost, training_flops_per_token
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, Model
from iiet.schedule import IterationSchedule
from orchestrator.data.keyed_random import random_bits, uniform_below
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings

_DRAWS = 0x5DEECE66D << 20
"""Added to the seed, so that draws do not depend on the order of the data."""

ScheduleByStep = Callable[[int], IterationSchedule]
"""Step -> the iteration schedule that is trained in this step."""
SchedulesByStep = Callable[[int], tuple[IterationSchedule, ...]]
"""Step -> the cheaper schedules that are trained beside it."""


def schedule_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> ScheduleByStep:
    """Return the schedule of each step: no corrections in the first stage, then all of them.

    The ramp between the two has equal parts: in part k, layer l makes `min(r_l, k)` corrections.
    """
    most = schedule.max_corrections
    stages = tuple(_capped(schedule, top) for top in range(most + 1))
    first = round(recipe.num_steps * recipe.iterate_from_fraction)
    end = round(recipe.num_steps * (recipe.iterate_from_fraction + recipe.iterate_ramp_fraction))

    def schedule_at(step: int) -> IterationSchedule:
        if step < first:
            return stages[0]
        if step >= end:
            return stages[most]
        return stages[min(most, 1 + (step - first) * most // (end - first))]

    return schedule_at


def drawn_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> SchedulesByStep:
    """Return the schedules that are drawn in each step, from the seed and the step alone.

    One with cap k gives layer l `min(r_l, k)` corrections of the step's own schedule; k is drawn
    from 0 to one below the largest r_l. A step without corrections draws none.
    """
    schedule_at = schedule_by_step(schedule, recipe)

    def drawn_at(step: int) -> tuple[IterationSchedule, ...]:
        full = schedule_at(step)
        if not recipe.drawn_schedules or not full.num_corrections:
            return ()
        bits = random_bits(_DRAWS + recipe.seed, np.array([step]), recipe.drawn_schedules)[0]
        caps = uniform_below(bits, full.max_corrections)
        return tuple(_capped(full, cap) for cap in caps.tolist())

    return drawn_at


def _capped(schedule: IterationSchedule, most: int) -> IterationSchedule:
    return IterationSchedule(tuple(min(count, most) for count in schedule))


def flops_per_token_by_step(
    job: TrainingJob, teacher: Model | None = None
) -> Callable[[int], float]:
    """Return step -> training FLOPs per token; a teacher that runs adds its forward pass."""
    config, distillation = job.model, job.distillation or DistillationConfig()
    schedule_at = schedule_by_step(config.corrections, job.recipe)
    drawn_at = drawn_by_step(config.corrections, job.recipe)
    teacher_flops = 0.0
    if isinstance(teacher, Decoder):
        teacher_flops = inference_cost(teacher.config).forward_flops_per_token

    @lru_cache
    def student_flops(schedule: IterationSchedule) -> float:
        return float(training_flops_per_token(config, schedule))

    return lambda step: (
        sum(map(student_flops, drawn_at(step)), start=student_flops(schedule_at(step)))
        + (teacher_flops if distillation.uses_teacher(step) else 0.0)
    )
