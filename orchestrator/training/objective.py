"""What the loop minimizes. Pretraining and distillation differ here and nowhere else.

An objective takes the model, a batch and the step, and returns a scalar loss with its parts for the
record. Training in stages is part of each: before `iterate_from_fraction` of the steps the
decoder runs without corrections, which costs a quarter of the time at r = 3, then with more and
more of them or with all; the weights are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from iiet.batch import Batch
from iiet.distillation import DistillationConfig, Model, distillation_loss
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.settings import TrainingSettings

Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, and its named parts. All are means over what counts, which
divide by the batch's `target_count` or `position_count`."""

ScheduleAt = Callable[[int], IterationSchedule]
"""Step -> the iteration schedule that is trained at this step."""


def two_stage(schedule: IterationSchedule, recipe: TrainingSettings) -> ScheduleAt:
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


def pretraining_objective(schedule_at: ScheduleAt) -> Objective:
    """Return the cross-entropy of the targets under the schedule of the step."""

    def objective(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = model(batch.input_ids, schedule=schedule_at(step))
        return batch_cross_entropy(logits, batch), {}

    return objective


def distillation_objective(
    schedule_at: ScheduleAt, teacher: Model, config: DistillationConfig
) -> Objective:
    """Return the IIAD loss of the student under the schedule of the step, against a frozen teacher,
    or what it once said."""

    def objective(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        student = partial(model, schedule=schedule_at(step))
        return distillation_loss(student, teacher, batch, config=config, step=step)

    return objective
