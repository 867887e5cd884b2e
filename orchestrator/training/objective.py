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
from orchestrator.training.job import TrainingJob
from orchestrator.training.schedules import ScheduleByStep

Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, and its named parts. All are means over what counts, which
divide by the batch's `target_count` or `position_count`."""


def pretraining_objective(schedule_at: ScheduleByStep) -> Objective:
    """Return the cross-entropy of the targets under the schedule of the step."""

    def objective(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = model(batch.input_ids, schedule=schedule_at(step))
        return batch_cross_entropy(logits, batch), {}

    return objective


def distillation_objective(
    schedule_at: ScheduleByStep, teacher: Model, config: DistillationConfig
) -> Objective:
    """Return the IIAD loss of the student under the schedule of the step, against a frozen teacher,
    or what it once said."""

    def objective(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        student = partial(model, schedule=schedule_at(step))
        return distillation_loss(student, teacher, batch, config=config, step=step)

    return objective


def make_objective(
    job: TrainingJob, schedule_at: ScheduleByStep, teacher: Model | None
) -> Objective:
    """Return the loss that the job minimizes."""
    if teacher is None:
        return pretraining_objective(schedule_at)
    return distillation_objective(schedule_at, teacher, job.distillation or DistillationConfig())
