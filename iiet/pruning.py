"""From influence to iteration schedules: the threshold's nested family, and an exact knapsack.

In: an influence table, one row per layer, one number per correction. Out: schedules.
A correction can be kept only with those before it, so a threshold acts on suffix maxima. Their
distinct values are the only breakpoints, so the family of all schedules that some threshold gives
is known without a sweep over thresholds. `knapsack` finds the schedule of the highest total worth
under a budget instead; its schedules need not be nested. A malformed table is a ValueError.
Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

from iiet.schedule import IterationSchedule

__all__ = [
    "Cost",
    "FamilyMember",
    "ScheduleFamily",
    "Influence",
    "influence_rows",
    "knapsack",
    "num_evaluations",
    "schedule_at_threshold",
    "schedule_family",
    "spread_over_cost",
    "suffix_maxima",
]


@runtime_checkable
class HasRows(Protocol):
    """A measured influence: `iiet.influence.InfluenceTable`, which explains both."""

    def rows(self) -> Sequence[Sequence[float]]: ...

    def worths(self) -> Sequence[Sequence[float]]: ...


Influence = Sequence[Sequence[float]] | HasRows
"""One row per layer, one number per correction; rows may differ in length."""

Cost = Callable[[IterationSchedule], float]
"""The cost of a schedule in any unit, such as evaluations, FLOPs or bytes."""


@dataclass(frozen=True, slots=True)
class FamilyMember:
    """A schedule, and the thresholds t that give it: `threshold_above < t <= threshold_up_to`.

    The ends of a family are minus infinity and infinity.
    """

    schedule: IterationSchedule
    threshold_above: float
    threshold_up_to: float


class ScheduleFamily(tuple[FamilyMember, ...]):
    """Nested schedules, from full to no corrections."""

    __slots__ = ()

    def within(self, cost: float, *, of: Cost | None = None) -> IterationSchedule:
        """Return the first schedule, the one with the most corrections, that costs at most `cost`.

        `of` is the cost of a schedule, by default its field evaluations.

        Raises:
            ValueError: none is that cheap.
        """
        costs = [(of or num_evaluations)(member.schedule) for member in self]
        for member, own in zip(self, costs, strict=True):
            if own <= cost:
                return member.schedule
        cheapest = min(costs, default=math.nan)
        raise ValueError(f"no schedule costs at most {cost}: the cheapest costs {cheapest}")


def num_evaluations(schedule: IterationSchedule) -> float:
    """Cost a schedule by its field evaluations."""
    return schedule.num_evaluations


def suffix_maxima(row: Sequence[float]) -> tuple[float, ...]:
    """Compute `M[i] = max_{k>=i} I[k]` of one layer: the largest influence from correction i on."""
    return tuple(accumulate(reversed(row), max))[::-1]


def schedule_at_threshold(influence: Influence, threshold: float) -> IterationSchedule:
    """Keep `#{i : M[i] >= threshold}` corrections in each layer."""
    return IterationSchedule(
        tuple(
            sum(value >= threshold for value in suffix_maxima(row))
            for row in influence_rows(influence)
        )
    )


def schedule_family(influence: Influence) -> ScheduleFamily:
    """List every distinct schedule that some threshold gives, from full to no corrections.

    The schedules are nested, and there are at most one more than corrections. Two neighbors differ
    by several corrections where suffix maxima are equal.
    """
    rows = influence_rows(influence)
    breakpoints = sorted({value for row in rows for value in suffix_maxima(row)})
    ends = [-math.inf, *breakpoints, math.inf]
    return ScheduleFamily(
        FamilyMember(schedule_at_threshold(rows, up_to), above, up_to)
        for above, up_to in pairwise(ends)
    )


def spread_over_cost(
    family: Sequence[FamilyMember], num_points: int, *, cost: Cost = num_evaluations
) -> tuple[FamilyMember, ...]:
    """Choose members spread as evenly over cost as the family allows, both ends included.

    A family of at most `num_points` members is returned whole.

    Raises:
        ValueError: fewer than 2 points are asked for.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2 (both ends), got {num_points}")
    if len(family) <= num_points:
        return tuple(family)
    costs = [cost(member.schedule) for member in family]
    step = (costs[-1] - costs[0]) / (num_points - 1)
    chosen: list[int] = []
    for point in range(num_points):
        # Each point gets another member: leave enough of them for the points that follow.
        first = chosen[-1] + 1 if chosen else 0
        candidates = range(first, len(family) - (num_points - 1 - point))
        target = costs[0] + point * step
        chosen.append(min(candidates, key=lambda index: abs(costs[index] - target)))
    return tuple(family[index] for index in chosen)


def influence_rows(influence: Influence) -> tuple[tuple[float, ...], ...]:
    """Return the table as tuples of floats, all finite."""
    given = influence.rows() if isinstance(influence, HasRows) else influence
    rows = tuple(tuple(map(float, row)) for row in given)
    if not rows or not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(f"an influence table has a row of finite numbers per layer, got {rows}")
    return rows


ROUNDING = Fraction(1, 10**12)
"""Largest relative rounding error of a cost."""


def knapsack(
    influence: Influence, max_cost: float, *, cost: Cost = num_evaluations
) -> IterationSchedule:
    """Find the schedule of the highest total worth under a budget, exactly.

    Dynamic programming over layers: of all schedules of the first l layers, keep those that are
    worth more than every cheaper one. Sums are rational, so rounding never decides. Among equals
    the cheapest wins, then the one with fewer corrections in later layers.

    Args:
        influence: numbers, also negative ones, are worths: what each correction adds if those
            before it are kept. A measured influence knows its worths.
        max_cost: in the unit of `cost`.
        cost: must add up over layers, as FLOPs and bytes do.

    Raises:
        ValueError: the budget does not pay for the predictions.
    """
    rows = influence_rows(influence.worths() if isinstance(influence, HasRows) else influence)
    full, none = IterationSchedule(tuple(map(len, rows))), IterationSchedule.none(len(rows))
    least = Fraction(cost(none))
    if not max_cost >= least:
        raise ValueError(
            f"a budget of {max_cost} does not pay for the {len(rows)} predictions that the layers "
            f"always make, which cost {cost(none)}"
        )
    # Prices are differences of rounded costs, so allow slightly more here; the end checks the cost.
    budget = Fraction(min(max_cost, 2 * cost(full))) * (1 + ROUNDING) - least
    # Worth, minus the cost, and corrections of the layers so far; the larger one is better.
    states: list[tuple[Fraction, Fraction, tuple[int, ...]]] = [(Fraction(0), Fraction(0), ())]
    for layer, row in enumerate(rows):
        prices = [
            Fraction(cost(none.with_layer(layer, kept))) - least for kept in range(len(row) + 1)
        ]
        worths = accumulate(map(Fraction, row), initial=Fraction(0))
        choices = list(enumerate(zip(worths, prices, strict=True)))
        longer = [
            (worth + more, minus_spent - price, (*counts, kept))
            for worth, minus_spent, counts in states
            for kept, (more, price) in choices
            if price - minus_spent <= budget
        ]
        states = []
        for state in sorted(longer, key=lambda one: (one[1], one[0], one[2]), reverse=True):
            if not states or state[0] > states[-1][0]:
                states.append(state)
    schedules = [IterationSchedule(counts) for _, _, counts in sorted(states, reverse=True)]
    return next((one for one in schedules if cost(one) <= max_cost), none)
