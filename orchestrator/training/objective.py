"""What the loop minimizes. Pretraining and distillation differ here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from iiet.batch import Batch
from iiet.distillation import DistillationConfig, Model, student_loss
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.training.schedules import ScheduleByStep, SchedulesByStep

Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, named parts. All are means that divide by the batch's
`target_count` or `position_count`."""


def make_objective(
    schedule_at: ScheduleByStep,
    teacher: Model | None = None,
    distillation: DistillationConfig | None = None,
) -> Objective:
    """Return the loss under the schedule of the step: cross-entropy, or IIAD with a teacher.

    `teacher` is the frozen teacher, or a lookup of its stored outputs.
    """
    config = distillation or DistillationConfig()

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        # The loss is computed within the model's forward pass, where replicas and shards expect it.
        student = partial(model, batch.input_ids, schedule=schedule_at(step))
        if teacher is None:
            return student(finish=partial(batch_cross_entropy, batch=batch)), {}
        result: tuple[Tensor, Mapping[str, Tensor]] = student(
            return_hidden=config.needs_hidden(step),
            finish=student_loss(teacher, batch, config=config, step=step),
        )
        return result

    return loss_of


def drawn_objectives(drawn_at: SchedulesByStep) -> Callable[[int], list[Objective]]:
    """Return step -> the cross-entropies under the schedules that are drawn in this step."""

    def under(schedule: IterationSchedule) -> Objective:
        return make_objective(lambda _: schedule)

    return lambda step: [under(schedule) for schedule in drawn_at(step)]
