"""What the loop minimizes. Pretraining and distillation differ here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from iiet.batch import Batch
from iiet.distillation import DistillationConfig, Model, student_loss
from iiet.elastic import AnswerKeeper, member_loss
from iiet.loss_metrics import cross_entropy_by_source
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.settings import ElasticSettings
from orchestrator.training.distributed import with_all_gradients
from orchestrator.training.schedules import ScheduleByStep, SchedulesByStep, member_distillation

Objective = Callable[[Model, Batch, int], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, batch, step) -> scalar loss, named parts. All are means that divide by the batch's
`target_count` or `position_count`."""
Passes = Callable[[Objective, int], Sequence[Objective]]
"""(a model's objective, step) -> the losses of one part of a batch, in the order in which they are
computed. Their sum is minimized."""

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

    def loss_of(model: Model, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
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


def single_pass(objective: Objective, _: int) -> Sequence[Objective]:
    """Return the passes of a training under one schedule in each step: its objective alone."""
    return (objective,)


def elastic_passes(
    drawn_at: SchedulesByStep,
    elastic: ElasticSettings,
    teacher: Model | None = None,
    distillation: DistillationConfig | None = None,
) -> Passes:
    """Return passes that first compute a model's objective, then the loss of each drawn member.

    The parts of the first pass are those of the objective and `full_loss`; the others add
    `member_loss` (their mean cross-entropy), `member_kl` and `member_hidden`.

    Args:
        teacher: What the members learn from (default: the full schedule of the same step). One
            that computes its answers should be a `RememberingTeacher`.
        distillation: What they learn from a teacher.
    """
    own = member_distillation(elastic)

    def passes_of(objective: Objective, step: int) -> Sequence[Objective]:
        members = drawn_at(step)
        if not members:
            return single_pass(objective, step)
        answers: list[AnswerKeeper] = []

        def full(model: Model, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            run = with_all_gradients(model)
            if teacher is None:
                answers.append(AnswerKeeper(run))
                run = answers[0]
            loss, parts = objective(run, batch, step)
            return loss, {**parts, "full_loss": loss}

        def loss_of(
            model: Model, batch: Batch, step: int, schedule: IterationSchedule
        ) -> tuple[Tensor, Mapping[str, Tensor]]:
            if teacher is not None:
                return make_objective(lambda _: schedule, teacher, distillation)(model, batch, step)
            answer = answers[0].answer
            assert answer is not None, "the full schedule comes first"
            finish = member_loss(answer, batch, own)
            result: tuple[Tensor, Mapping[str, Tensor]] = model(
                batch.input_ids, schedule=schedule, finish=finish
            )
            return result

        def of_member(
            model: Model, batch: Batch, step: int, *, schedule: IterationSchedule
        ) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, parts = loss_of(with_all_gradients(model), batch, step, schedule)
            means = {_MEMBER_PARTS[name]: part / len(members) for name, part in parts.items()}
            return elastic.weight * loss, means

        return full, *(partial(of_member, schedule=member) for member in members)

    return passes_of


_MEMBER_PARTS = {"cross_entropy": "member_loss", "kl": "member_kl", "hidden": "member_hidden"}


def mean_by_source(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a step with the mean loss of each source instead of its parts.

    A source without targets in this step is left out.
    """
    names = [name.removeprefix(SHARE) for name in numbers if name.startswith(SHARE)]
    parts = {prefix + name for name in names for prefix in (LOSS, SHARE)}
    others = {name: number for name, number in numbers.items() if name not in parts}
    shares = {name: numbers[SHARE + name] for name in names}
    return others | {LOSS + n: numbers[LOSS + n] / share for n, share in shares.items() if share}
