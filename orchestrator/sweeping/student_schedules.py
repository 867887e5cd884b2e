"""The schedules of a teacher's students: chosen by influence, or named by the user.

A schedule may leave layers out (`x`). `uniform`, `reversed` and `random*5` are controls: schedules
with the same number of field evaluations (NFE) as those that influence chooses, but chosen without
it. So a front shows what influence is worth.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from iiet.iiad.pruning import (
    Cost,
    InfluenceTable,
    ScheduleFamily,
    ThresholdSchedule,
    knapsack,
    num_evaluations,
    schedule_family,
    spread_over_cost,
)
from iiet.model.config import ModelConfig
from iiet.model.schedule import LEFT_OUT, IterationSchedule
from orchestrator.settings import SweepSettings
from orchestrator.terminal.render import format_count
from orchestrator.training.distilling import student_schedule
from orchestrator.workspace.errors import UserError

CONTROLS = ("uniform", "reversed")
"""Names of controls without randomness."""
_RANDOM = re.compile(r"random(?:\*([1-9][0-9]?))?")
"""How users write random controls: `random`, `random*5`."""


@dataclass(frozen=True)
class StudentSchedule:
    """The schedule of a student, and how it was chosen."""

    threshold_schedule: ThresholdSchedule
    """The schedule, relative to the teacher, with the thresholds that give it."""
    choice: str = ""
    """`uniform`, `reversed` or `random 1` for a control, `own` for a schedule of the user; empty if
    influence chose it."""

    @classmethod
    def of(cls, schedule: IterationSchedule, choice: str = "") -> StudentSchedule:
        """Return a schedule that was chosen without a threshold."""
        return cls(ThresholdSchedule(schedule, math.nan, math.nan), choice)

    @property
    def schedule(self) -> IterationSchedule:
        """The schedule, relative to the teacher."""
        return self.threshold_schedule.schedule

    @property
    def label(self) -> str:
        """Label of the student in tables: its schedule, or with many layers their number."""
        if not self.choice:
            return self.schedule.label()
        if self.choice == "own":
            return str(self.schedule)
        return f"{self.schedule.label()}, {self.choice}"


def most_left_out(sweep: SweepSettings, teacher: ModelConfig) -> int:
    """Return the most layers of a teacher that its students may leave out.

    Raises:
        UserError: If no layer would stay.
    """
    num_layers = teacher.num_layers
    number = sweep.leave_out_layers
    if number is None:
        return 0 if sum(teacher.corrections) else num_layers // 2
    if number == "none":
        return 0
    if number == "all":
        return num_layers - 1
    if number >= num_layers:
        raise UserError(
            f"sweep.leave_out_layers={number}: the teacher has "
            f"{format_count(num_layers, 'layer')}, and one must stay; set it to at most "
            f"{num_layers - 1}"
        )
    return number


def cheapest_schedule(full: ModelConfig, max_left_out: int) -> IterationSchedule:
    """Return a schedule with the fewest evaluations: no corrections, and as many layers left out as
    allowed."""
    num_kept = full.num_layers - max_left_out
    return IterationSchedule((0,) * num_kept + (LEFT_OUT,) * max_left_out)


def named_schedules(sweep: SweepSettings) -> list[str]:
    """Return the schedules that the user writes out, without names of controls."""
    texts = map(str, sweep.schedules)
    return [text for text in texts if text not in CONTROLS and not _RANDOM.fullmatch(text)]


def num_named(sweep: SweepSettings, num_chosen: int) -> int:
    """Return the most schedules that `sweep.schedules` adds to the chosen ones."""
    number = 0
    for text in map(str, sweep.schedules):
        drawn = _RANDOM.fullmatch(text)
        if drawn:
            number += num_chosen * int(drawn[1] or 1)
        else:
            number += num_chosen if text in CONTROLS else 1
    return number


def choose_schedules(
    influence: InfluenceTable,
    sweep: SweepSettings,
    *,
    cost: Cost = num_evaluations,
    max_left_out: int = 0,
) -> tuple[StudentSchedule, ...]:
    """Return the schedules of a sweep's students, costliest first, each once.

    Args:
        influence: The teacher's table.
        sweep: Thresholds, budgets or a number of schedules; the selection; the user's schedules.
        cost: Cost that budgets limit, and over which schedules are spread.
        max_left_out: Most layers that a student leaves out.

    Raises:
        UserError: If all influences are equal, so that none can be chosen, or a schedule of the
            user does not fit the teacher.
    """
    members = choose_from_family(influence, sweep, cost=cost, max_left_out=max_left_out)
    chosen = [StudentSchedule(member) for member in members]
    full = influence.schedule
    for text in sweep.schedules:
        chosen += _named_schedules(str(text), full, members, max_left_out)
    # A schedule that was chosen in several ways is named by the first.
    by_schedule: dict[IterationSchedule, StudentSchedule] = {}
    for student in chosen:
        by_schedule.setdefault(student.schedule, student)
    return tuple(
        sorted(by_schedule.values(), key=lambda student: cost(student.schedule), reverse=True)
    )


def budget_costs(sweep: SweepSettings, full_cost: float) -> list[float]:
    """Return the budgets of a sweep in their unit.

    Args:
        full_cost: The teacher's cost, for budgets that are shares of it.
    """
    return [
        full_cost * float(budget.removesuffix("%")) / 100 if isinstance(budget, str) else budget
        for budget in sweep.budgets
    ]


def choose_from_family(
    influence: InfluenceTable,
    sweep: SweepSettings,
    *,
    cost: Cost = num_evaluations,
    max_left_out: int = 0,
) -> tuple[ThresholdSchedule, ...]:
    """Return the schedules that influence chooses, costliest first, each once.

    Returns:
        Schedules with the thresholds that give them; schedules of a knapsack have none (NaN).

    Raises:
        UserError: If all influences are equal, so that none can be chosen.
    """
    if sweep.schedule_choice == "num_schedules" and sweep.num_schedules == 0:
        return ()
    rows = influence.evaluation_rows if max_left_out else influence.value_rows
    values = [value for row in rows for value in row]
    if len(set(values)) == 1 and (len(values) > 1 or values[0] == 0.0):
        evaluations = format_count(len(values), "evaluation" if max_left_out else "correction")
        raise UserError(
            f"influence.metric={influence.metric}: everything that the teacher's students could "
            f"leave out ({evaluations}) has the same influence, {values[0]:g}; train the teacher "
            "further, or with a higher training.gate_rate_factor"
        )
    family = schedule_family(influence, max_left_out=max_left_out)
    if not influence.schedule.num_corrections:
        # A student with all layers of a plain model is that model, which is a baseline.
        family = ScheduleFamily(member for member in family if member.schedule.left_out_layers)
    if sweep.schedule_choice == "thresholds":
        schedules = {
            member.schedule
            for threshold in sweep.thresholds
            for member in family
            if member.threshold_above < threshold <= member.threshold_up_to
        }
    elif sweep.schedule_choice == "budgets":
        schedules = {
            family.within_cost(budget, cost)
            for budget in budget_costs(sweep, cost(influence.schedule))
        }
    else:
        spread = spread_over_cost(family, sweep.num_schedules, cost=cost)
        schedules = {member.schedule for member in spread}
    chosen = tuple(member for member in family if member.schedule in schedules)
    if sweep.selection != "knapsack":
        return chosen
    # The best schedule within each budget, else at the cost of each chosen schedule.
    if sweep.schedule_choice == "budgets":
        budgets = sorted(budget_costs(sweep, cost(influence.schedule)), reverse=True)
    else:
        budgets = [cost(member.schedule) for member in chosen]
    best = dict.fromkeys(
        knapsack(influence, budget, cost=cost, max_left_out=max_left_out) for budget in budgets
    )
    return tuple(
        ThresholdSchedule(schedule, math.nan, math.nan)
        for schedule in best
        if schedule.left_out_layers or influence.schedule.num_corrections
    )


# What a user names


def _named_schedules(
    text: str, full: IterationSchedule, members: Sequence[ThresholdSchedule], max_left_out: int
) -> Iterator[StudentSchedule]:
    """Yield the schedules that one entry of `sweep.schedules` stands for.

    Raises:
        UserError: If it does not fit the teacher.
    """
    drawn = _RANDOM.fullmatch(text)
    if text not in CONTROLS and not drawn:
        schedule = student_schedule(text, full, "sweep.schedules")
        yield StudentSchedule.of(schedule, "own")
        return
    for member in members:
        num_kept_evaluations = member.schedule.num_evaluations
        if text == "uniform":
            controls = [uniform_schedule(full, num_kept_evaluations)]
        elif text == "reversed":
            controls = [_reversed_schedule(member.schedule, full)]
        else:
            assert drawn is not None, "the only other form"
            controls = [
                random_schedule(full, num_kept_evaluations, max_left_out, seed=seed)
                for seed in range(int(drawn[1] or 1))
            ]
        for number, schedule in enumerate(controls, start=1):
            choice = f"random {number}" if drawn else text
            yield StudentSchedule.of(schedule, choice)


def uniform_schedule(full: IterationSchedule, num_evaluations: int) -> IterationSchedule:
    """Return the most even schedule with a number of field evaluations, within a full schedule.

    All layers get a first evaluation, then a second one, and so on. If the last round is not enough
    for all, evenly spaced layers get it. With fewer evaluations than layers, evenly spaced layers
    stay.
    """
    evaluations = [0] * full.num_layers
    num_left = num_evaluations
    while num_left:
        open_layers = [layer for layer, most in enumerate(full) if evaluations[layer] < 1 + most]
        number = min(num_left, len(open_layers))
        for layer in _evenly_spaced(open_layers, number):
            evaluations[layer] += 1
        num_left -= number
    return _schedule_of(evaluations)


def _evenly_spaced(layers: Sequence[int], number: int) -> list[int]:
    """Choose evenly spaced layers, including the first and the last; if only one, the first."""
    steps = max(1, number - 1)
    return [
        layers[(2 * index * (len(layers) - 1) + steps) // (2 * steps)] for index in range(number)
    ]


def random_schedule(
    full: IterationSchedule, num_evaluations: int, max_left_out: int, *, seed: int
) -> IterationSchedule:
    """Draw a schedule with a number of field evaluations, within a full schedule.

    The layers that stay are drawn first. Each further evaluation then goes to a random layer that
    may make more.
    """
    draw = random.Random(f"{seed} {num_evaluations} {full}")
    evaluations = [0] * full.num_layers
    num_staying = min(num_evaluations, full.num_layers - max_left_out)
    for layer in draw.sample(range(full.num_layers), num_staying):
        evaluations[layer] = 1
    for _ in range(num_evaluations - num_staying):
        open_layers = [layer for layer, most in enumerate(full) if evaluations[layer] < 1 + most]
        evaluations[draw.choice(open_layers)] += 1
    return _schedule_of(evaluations)


def _schedule_of(evaluations: Sequence[int]) -> IterationSchedule:
    return IterationSchedule(tuple(number - 1 if number else LEFT_OUT for number in evaluations))


def _reversed_schedule(schedule: IterationSchedule, full: IterationSchedule) -> IterationSchedule:
    """Return a schedule with its layers in reversed order.

    Raises:
        UserError: If that asks for more corrections than the teacher makes.
    """
    turned = IterationSchedule(schedule.corrections[::-1])
    if not turned.is_within(full):
        raise UserError(
            f"sweep.schedules=reversed: {schedule} reversed is {turned}, which asks for more "
            f"corrections than the teacher makes, {full}; leave it out"
        )
    return turned
