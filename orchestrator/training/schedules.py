"""Learning rate, iteration schedules and FLOPs of a training step, as pure functions of the step.

So a resumed run needs no state of them. The learning rate has a linear warm-up, then one of three
shapes: `cosine` to the final rate; `wsd` (warm-up, stable, decay), constant, then linear to the
final rate, so that a run can be continued from before its decay; or `constant`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from iiet.cost import inference_cost, member_flops_per_token, training_flops_per_token
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.data.order import random_bits
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.workspace.errors import UserError

DRAWS_VERSION = 2
"""Increase when the same seed and step draw other schedules."""
_DRAWS = 0x5DEECE66D << 20
"""Added to the seed, so that draws do not depend on the order of the data."""

ScheduleByStep = Callable[[int], IterationSchedule]
"""Step -> the iteration schedule that is trained in this step."""
SchedulesByStep = Callable[[int], tuple[IterationSchedule, ...]]
"""Step -> the cheaper schedules that are trained, or may be drawn, in this step."""


def learning_rate_at(step: int, recipe: TrainingSettings) -> float:
    """Return the learning rate of an optimizer step, from 0 to `recipe.num_steps - 1`."""
    peak = recipe.learning_rate
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    return peak * (1.0 - (1.0 - recipe.final_learning_rate_fraction) * _decay(step, recipe))


def stable_steps(recipe: TrainingSettings) -> int:
    """Return the steps of a `wsd` training before its decay; 0 for another shape.

    A run keeps the checkpoint after these steps, from which a longer training can start.
    """
    if recipe.decay != "wsd":
        return 0
    return max(recipe.warmup_steps, round(recipe.num_steps * (1.0 - recipe.decay_fraction)))


def _decay(step: int, recipe: TrainingSettings) -> float:
    """Return the progress of the decay, from 0 at the peak rate to 1 at the final rate."""
    first = stable_steps(recipe) or recipe.warmup_steps
    if recipe.decay == "constant" or step < first:
        return 0.0
    progress = (step - first) / max(1, recipe.num_steps - 1 - first)
    return progress if recipe.decay == "wsd" else 0.5 * (1.0 - math.cos(math.pi * progress))


def steps_before_corrections(recipe: TrainingSettings) -> int:
    """Return the steps of the first stage of a two-stage training, which makes no corrections."""
    return round(recipe.num_steps * recipe.iterate_from_fraction)


def schedule_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> ScheduleByStep:
    """Return the schedule of each step: no corrections in the first stage, all in the second.

    A ramp between the stages has parts of equal length: in part k, layer l makes `min(r_l, k)`
    corrections.
    """
    most = schedule.max_corrections
    stages = tuple(_capped(schedule, limit) for limit in range(most + 1))
    ramp_end_fraction = recipe.iterate_from_fraction + recipe.iterate_ramp_fraction
    ramp_start = steps_before_corrections(recipe)
    ramp_end = round(recipe.num_steps * ramp_end_fraction)

    def schedule_at(step: int) -> IterationSchedule:
        if step < ramp_start:
            return stages[0]
        if step >= ramp_end:
            return stages[most]
        return stages[min(most, 1 + (step - ramp_start) * most // (ramp_end - ramp_start))]

    return schedule_at


def stages_of(
    schedule: IterationSchedule, recipe: TrainingSettings, steps: range
) -> dict[IterationSchedule, range]:
    """Return the iteration schedules of consecutive steps, each with the steps under it."""
    schedule_at = schedule_by_step(schedule, recipe)
    stages: dict[IterationSchedule, range] = {}
    start = steps.start
    while start < steps.stop:
        schedule_of_stage = schedule_at(start)
        # Corrections only increase with the steps, so a binary search finds the end of each stage.
        end = bisect_right(
            range(steps.stop),
            schedule_of_stage.num_corrections,
            lo=start,
            key=lambda step: schedule_at(step).num_corrections,
        )
        stages[schedule_of_stage] = range(start, end)
        start = end
    return stages


def elastic_family(
    schedule: IterationSchedule, elastic: ElasticSettings | None
) -> tuple[IterationSchedule, ...]:
    """Return the cheaper schedules that elastic training trains, costliest first; none if it is
    off.

    Raises:
        ValueError: If one has another number of layers than the full schedule, or is not below it.
    """
    if elastic is None or not elastic.weight:
        return ()
    if not elastic.schedules:
        return tuple(_capped(schedule, most) for most in reversed(range(schedule.max_corrections)))
    family = {IterationSchedule.parse(s, num_layers=len(schedule)) for s in elastic.schedules}
    for cheaper in family:
        if cheaper == schedule or not cheaper.is_within(schedule):
            raise ValueError(
                f"the schedule {cheaper} is not below the full one, {schedule}; no layer may make "
                "more corrections than there, and one must make fewer"
            )
    return tuple(sorted(family, key=lambda m: (m.num_evaluations, m.corrections), reverse=True))


def checked_family(
    recipe: TrainingSettings, config: ModelConfig, *, section: str = "training"
) -> TrainingSettings:
    """Return the recipe, with the schedules of elastic training in one spelling, as keys need.

    Raises:
        UserError: If the model has no cheaper schedule, or cannot run one of those in the recipe.
    """
    elastic = recipe.elastic
    full = config.corrections
    if elastic is None:
        return recipe
    if not full.num_corrections:
        raise UserError(
            f"{section}.elastic trains schedules of fewer corrections, and the model "
            f"({config.method}) makes none; leave it out, or take method iiet with 1 correction or "
            "more"
        )
    try:
        family = elastic_family(full, elastic.model_copy(update={"weight": 1.0}))
        for cheaper in family:
            config.evaluations_per_layer(cheaper)
    except ValueError as error:
        raise UserError(f"{section}.elastic.schedules: {error}") from None
    names = tuple(map(str, family)) if elastic.schedules else ()
    return recipe.model_copy(update={"elastic": elastic.model_copy(update={"schedules": names})})


def cheaper_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> SchedulesByStep:
    """Return the cheaper schedules of each step, costliest first, from which `drawn_by_step` draws.

    While the step's own schedule is not the full one yet, theirs are capped by it; they differ from
    it and from each other. A step without corrections has none.
    """
    schedule_at = schedule_by_step(schedule, recipe)
    family = elastic_family(schedule, recipe.elastic)

    @lru_cache
    def below(full: IterationSchedule) -> tuple[IterationSchedule, ...]:
        capped = (IterationSchedule(tuple(map(min, cheaper, full))) for cheaper in family)
        return tuple(cheaper for cheaper in dict.fromkeys(capped) if cheaper != full)

    return lambda step: below(schedule_at(step))


def drawn_by_step(schedule: IterationSchedule, recipe: TrainingSettings) -> SchedulesByStep:
    """Return the cheaper schedules that each step draws, from the seed and the step alone.

    They are distinct, and a larger number of draws keeps the first ones. A schedule is drawn with a
    probability in proportion to the corrections that it leaves out: the further it is from the full
    schedule, the more there is to learn, and the less a step costs.
    """
    cheaper_at = cheaper_by_step(schedule, recipe)
    schedule_at = schedule_by_step(schedule, recipe)

    def drawn_at(step: int) -> tuple[IterationSchedule, ...]:
        cheaper = cheaper_at(step)
        if not cheaper or recipe.elastic is None:
            return ()
        full = schedule_at(step).num_corrections
        left_out = np.array([full - schedule.num_corrections for schedule in cheaper])
        bits = random_bits(_DRAWS + recipe.seed, np.array([step]), len(cheaper))[0]
        # Exponential times with these rates; the first ones win (Efraimidis and Spirakis 2006).
        times = -np.log(((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53) / left_out
        drawn = np.argsort(times, kind="stable")[: recipe.elastic.num_drawn]
        return tuple(cheaper[number] for number in drawn.tolist())

    return drawn_at


def _capped(schedule: IterationSchedule, most: int) -> IterationSchedule:
    return IterationSchedule(tuple(min(count, most) for count in schedule))


def largest_step(job: TrainingJob, flops_per_token: Callable[[int], float], start: int) -> int:
    """Return the first step, from `start` on, that needs the most memory.

    All steps read the same number of tokens, so it is the step with the most FLOPs: with all
    corrections, and with the teacher if that begins later.
    """
    recipe = job.recipe
    stages = stages_of(job.model.corrections, recipe, range(start, recipe.num_steps))
    begins = [steps.start for steps in stages.values()]
    if job.teaching and start < job.teaching.start_step < recipe.num_steps:
        begins.append(job.teaching.start_step)
    return max(sorted(begins), key=flops_per_token)


def flops_per_token_by_step(
    job: TrainingJob, teacher: ModelConfig | None = None
) -> Callable[[int], float]:
    """Return step -> training FLOPs per token; a teacher adds its forward pass."""
    is_student = job.objective == "distill"
    model_flops_at = model_flops_by_step(job.model, job.recipe, is_student=is_student)
    if teacher is None:
        return model_flops_at
    distillation = job.teaching or DistillationConfig()
    teacher_cost = inference_cost(teacher, context_length=job.sequence_length)
    teacher_flops = teacher_cost.forward_flops_per_token
    return lambda step: (
        model_flops_at(step) + (teacher_flops if distillation.uses_teacher(step) else 0.0)
    )


def model_flops_by_step(
    config: ModelConfig, recipe: TrainingSettings, *, is_student: bool
) -> Callable[[int], float]:
    """Return step -> training FLOPs per token of the trained model, without a teacher's.

    Args:
        is_student: Whether the model learns from a teacher. Then its cheaper schedules do so, too;
            in any other training they learn from the full schedule.
    """
    schedule_at = schedule_by_step(config.corrections, recipe)
    drawn_at = drawn_by_step(config.corrections, recipe)
    length = recipe.tokens_per_sequence(config)
    trained = recipe.trained_layers
    reads_full = recipe.elastic is not None and recipe.elastic.kl_weight > 0 and not is_student

    @lru_cache
    def schedule_flops(schedule: IterationSchedule) -> float:
        flops = training_flops_per_token(config, schedule, context_length=length, trained=trained)
        return float(flops)

    @lru_cache
    def cheaper_flops(cheaper: IterationSchedule) -> float:
        flops = member_flops_per_token(
            config, cheaper, reads_full=reads_full, context_length=length, trained=trained
        )
        return float(flops)

    return lambda step: sum(
        map(cheaper_flops, drawn_at(step)), start=schedule_flops(schedule_at(step))
    )
