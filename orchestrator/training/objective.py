"""What the loop minimizes. Pretraining and distillation differ here and nowhere else.

An objective takes the model, a batch and the step, and returns a scalar loss and its named parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from iiet.batch import Batch
from iiet.distillation import DistillationConfig, Model, distillation_loss
from iiet.losses import batch_cross_entropy
from orchestrator.training.job import TrainingJob
from orchestrator.training.schedules import ScheduleByStep

Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, named parts. All are means that divide by the batch's
`target_count` or `position_count`."""


def pretraining_objective(schedule_at: ScheduleByStep) -> Objective:
    """Return the cross-entropy of the targets under the schedule of the step."""

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = model(batch.input_ids, schedule=schedule_at(step))
        return batch_cross_entropy(logits, batch), {}

    return loss_of


def distillation_objective(
    schedule_at: ScheduleByStep, teacher: Model, config: DistillationConfig
) -> Objective:
    """Return the IIAD loss of the student under the schedule of the step.

    `teacher` is the frozen teacher, or a lookup of its stored outputs.
    """

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        student = partial(model, schedule=schedule_at(step))
        return distillation_loss(student, teacher, batch, config=config, step=step)

    return loss_of


def make_objective(
    job: TrainingJob, schedule_at: ScheduleByStep, teacher: Model | None
) -> Objective:
    """Return the loss that a job minimizes."""
    if teacher is None:
        return pretraining_objective(schedule_at)
    return distillation_objective(schedule_at, teacher, job.distillation or DistillationConfig())
