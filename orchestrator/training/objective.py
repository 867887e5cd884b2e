"""What the loop minimizes. Pretraining and distillation differ here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from iiet.batch import Batch
from iiet.distillation import DistillationConfig, Model, student_loss
from iiet.loss_metrics import cross_entropy_by_source
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.training.schedules import ScheduleByStep, SchedulesByStep

Objective = Callable[[nn.Module, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, named parts. All are means that divide by the batch's
`target_count` or `position_count`."""

LOSS, SHARE = "loss_", "share_of_targets_"
"""Prefixes of the parts of a source: what it adds to the loss, and its share of the targets."""


def make_objective(
    schedule_at: ScheduleByStep,
    teacher: Model | None = None,
    distillation: DistillationConfig | None = None,
    source_names: Sequence[str] = (),
) -> Objective:
    """Return the loss under the schedule of the step: cross-entropy, or IIAD with a teacher.

    Args:
        teacher: The frozen teacher, or a lookup of its stored outputs.
        distillation: What the student learns from it.
        source_names: The sources of a mixture. Without a teacher, the parts then hold what
            `mean_by_source` reads.
    """
    config = distillation or DistillationConfig()

    def loss_of(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        # The loss is computed within the model's forward pass, where replicas and shards expect it.
        student = partial(model, batch.input_ids, schedule=schedule_at(step))
        if teacher is None and source_names:
            of_sources = partial(
                cross_entropy_by_source, batch=batch, num_sources=len(source_names)
            )
            loss, losses, shares = student(finish=of_sources)
            named = zip(source_names, losses, shares, strict=True)
            parts: dict[str, Tensor] = {}
            for name, of_source, share in named:
                parts |= {LOSS + name: of_source, SHARE + name: share}
            return loss, parts
        if teacher is None:
            return student(finish=partial(batch_cross_entropy, batch=batch)), {}
        result: tuple[Tensor, Mapping[str, Tensor]] = student(
            return_hidden=config.needs_hidden(step),
            finish=student_loss(teacher, batch, config=config, step=step),
        )
        return result

    return loss_of


def drawn_objectives(drawn_at: SchedulesByStep) -> Callable[[int], list[Objective]]:
    """Return step -> the cross-entropies under the schedules that are drawn in this step.

    They have no parts, so the losses of a mixture's sources are those of the full schedule.
    """

    def under(schedule: IterationSchedule) -> Objective:
        return make_objective(lambda _: schedule)

    return lambda step: [under(schedule) for schedule in drawn_at(step)]


def mean_by_source(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step with the mean loss of each source instead of its parts.

    A source without targets in this step is left out.
    """
    names = [name.removeprefix(SHARE) for name in numbers if name.startswith(SHARE)]
    parts = {prefix + name for name in names for prefix in (LOSS, SHARE)}
    others = {name: number for name, number in numbers.items() if name not in parts}
    shares = {name: numbers[SHARE + name] for name in names}
    return others | {LOSS + n: numbers[LOSS + n] / share for n, share in shares.items() if share}
