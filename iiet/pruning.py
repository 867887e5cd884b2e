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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from iiet.checks import check_rules, is_integer_from, is_nan, is_number_from
from iiet.facts import metric_facts_of
from iiet.schedule import IterationSchedule
from iiet.tables import SmallTable

__all__ = [
    "Cost",
    "FamilyMember",
    "ScheduleFamily",
    "Influence",
    "InfluenceTable",
    "Rows",
    "influence_rows",
    "knapsack",
    "num_evaluations",
    "schedule_at_threshold",
    "schedule_family",
    "spread_over_cost",
    "suffix_maxima",
]


Rows = tuple[tuple[float, ...], ...]
"""One row per layer, one number per correction; rows differ in length as the layers do."""


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of each correction, its error, and how well the iteration converged.

    Raises:
        ValueError: naming every value that is out of range or does not fit the others.
    """

    metric: str
    """What was measured: a key of `iiet.INFLUENCE_METRICS`."""
    value_rows: Rows
    """Influence per layer and correction; larger matters more. `loss` may be negative."""
    error_rows: Rows
    """Standard error of each value over batches; NaN when there was one batch only."""
    num_tokens: int
    """Tokens that the means run over (for `loss`: those with a target)."""
    residual_rows: Rows = ()
    """Relative residual of each correction, the mean of `|g(e) - e| / |g(e)|` over tokens: `e` is
    the estimate that it starts from, `g(e)` its normalized output. Methods that correct
    without a schedule have rows, too."""
    layer_values: tuple[float, ...] = ()
    """Block influence of each layer, the mean of `1 - cos(h_{l-1}, h_l)` over tokens: by how much
    the whole layer turns the hidden state."""
    accuracy_lost_rows: Rows = ()
    """With `loss`, what stopping a layer before each correction costs in accuracy, the share of
    targets that get the largest logit. Text has none: its targets are not answers."""

    def __post_init__(self) -> None:
        counts = [len(row) for row in self.value_rows]
        values = [value for row in self.value_rows for value in row]
        errors = [error for row in self.error_rows for error in row]
        check_rules(
            "influence table",
            self,
            {
                "metric must be a name": isinstance(self.metric, str) and bool(self.metric),
                "value_rows must be a row of finite numbers per layer": (
                    bool(counts) and all(is_number_from(-math.inf, value) for value in values)
                ),
                "error_rows must have the lengths of value_rows and numbers from 0, or NaN": (
                    [len(row) for row in self.error_rows] == counts
                    and all(is_number_from(0, error) or is_nan(error) for error in errors)
                ),
                "num_tokens must be an integer from 1": is_integer_from(1, self.num_tokens),
                "residual_rows must be a row per layer, or empty": (
                    len(self.residual_rows) in (0, len(counts))
                ),
                "layer_values must be a number per layer, or empty": (
                    len(self.layer_values) in (0, len(counts))
                ),
                "accuracy_lost_rows must have the lengths of value_rows, or be empty": (
                    not self.accuracy_lost_rows
                    or [len(row) for row in self.accuracy_lost_rows] == counts
                ),
            },
        )

    @property
    def schedule(self) -> IterationSchedule:
        """The iteration schedule under which this was measured."""
        return IterationSchedule(tuple(len(row) for row in self.value_rows))

    @property
    def contractions(self) -> tuple[float, ...]:
        """The contraction factor of each layer: the ratio of one correction's residual to that of
        the correction before, as a geometric mean. Below 1 the iteration contracts; NaN where a
        layer makes fewer than two corrections.
        """
        return tuple(
            (row[-1] / row[0]) ** (1 / (len(row) - 1)) if len(row) > 1 and row[0] > 0 else math.nan
            for row in self.residual_rows
        )

    def worths(self) -> Rows:
        """Return what each correction adds if those before it are kept; may be summed.

        Most metrics compare a correction with the evaluation before it, so these are the values
        themselves. `loss` compares stopping before a correction with the full layer, so a
        correction's worth is the difference to stopping one correction later.
        """
        if not metric_facts_of(self.metric).is_of_stopping:
            return self.value_rows
        return tuple(
            tuple(now - later for now, later in zip(row, (*row, 0.0)[1:], strict=True))
            for row in self.value_rows
        )

    def as_table(self) -> SmallTable:
        """Return a line per layer: the influence of each correction, and of the whole layer."""
        num_columns = max(map(len, self.value_rows), default=0)
        rows = []
        for layer, values in enumerate(self.value_rows):
            cells = [f"{value:.5f}" for value in values]
            cells += [""] * (num_columns - len(cells))
            if self.layer_values:
                cells.append(f"{self.layer_values[layer]:.5f}")
            rows.append([str(layer + 1), *cells])
        heads = ["layer", *(f"correction {number + 1}" for number in range(num_columns))]
        heads += ["whole layer"] if self.layer_values else []
        return SmallTable(f"influence ({self.metric}, {self.num_tokens} tokens)", heads, rows)

    def __str__(self) -> str:
        return str(self.as_table())

    def _repr_html_(self) -> str:
        return self.as_table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an unknown error or contraction factor becomes None."""
        return {
            "metric": self.metric,
            "values": [list(row) for row in self.value_rows],
            "errors": [[_finite(error) for error in row] for row in self.error_rows],
            "num_tokens": self.num_tokens,
            "residuals": [list(row) for row in self.residual_rows],
            "contractions": [_finite(factor) for factor in self.contractions],
            "layers": list(self.layer_values),
            "accuracy_lost": [list(row) for row in self.accuracy_lost_rows],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> InfluenceTable:
        """Build a table from `to_dict`; the package of its metric need not be installed."""
        return cls(
            metric=str(table["metric"]),
            value_rows=_rows_of(table["values"]),
            error_rows=_rows_of(table["errors"]),
            num_tokens=int(table["num_tokens"]),
            residual_rows=_rows_of(table["residuals"]),
            layer_values=tuple(map(float, table["layers"])),
            accuracy_lost_rows=_rows_of(table["accuracy_lost"]),
        )


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows_of(rows: Iterable[Iterable[Any]]) -> Rows:
    """Read rows of plain JSON, where None stands for NaN."""
    return tuple(tuple(math.nan if x is None else float(x) for x in row) for row in rows)


Influence = Sequence[Sequence[float]] | InfluenceTable
"""One row per layer, one number per correction; rows may differ in length."""

Cost = Callable[[IterationSchedule], float]
"""The cost of a schedule in any unit, such as evaluations, FLOPs or bytes."""


@dataclass(frozen=True, slots=True)
class FamilyMember:
    """A schedule, and the thresholds t that give it: `threshold_above < t <= threshold_up_to`.

    The ends of a family are minus infinity and infinity. Both are NaN where no threshold chose the
    schedule.

    Raises:
        ValueError: no schedule, or no thresholds between these.
    """

    schedule: IterationSchedule
    threshold_above: float
    threshold_up_to: float

    def __post_init__(self) -> None:
        above = self.threshold_above
        up_to = self.threshold_up_to
        are_numbers = isinstance(above, int | float) and isinstance(up_to, int | float)
        check_rules(
            "family member",
            self,
            {
                "schedule must be an IterationSchedule": isinstance(
                    self.schedule, IterationSchedule
                ),
                "threshold_up_to must be above threshold_above, or both NaN": are_numbers
                and (above < up_to or (is_nan(above) and is_nan(up_to))),
            },
        )


class ScheduleFamily(tuple[FamilyMember, ...]):
    """Nested schedules, from full to no corrections."""

    __slots__ = ()

    def as_table(self) -> SmallTable:
        """Return a line per schedule: its NFE, and the thresholds that give it."""
        rows = [
            (str(member.schedule), str(member.schedule.num_evaluations), _thresholds_of(member))
            for member in self
        ]
        return SmallTable(f"{len(self)} schedules", ("schedule", "NFE", "thresholds"), rows)

    def __str__(self) -> str:
        return str(self.as_table())

    def _repr_html_(self) -> str:
        return self.as_table().to_html()

    def within(self, *, nfe: float) -> IterationSchedule:
        """Return the schedule with the most corrections that makes at most `nfe` evaluations.

        Raises:
            ValueError: none is that cheap.
        """
        return self.within_cost(nfe, num_evaluations)

    def within_cost(self, max_cost: float, cost: Cost) -> IterationSchedule:
        """Return the schedule with the most corrections of at most this cost, in any unit.

        Raises:
            ValueError: none is that cheap.
        """
        costs = [cost(member.schedule) for member in self]
        for member, member_cost in zip(self, costs, strict=True):
            if member_cost <= max_cost:
                return member.schedule
        cheapest = min(costs, default=math.nan)
        raise ValueError(f"no schedule costs at most {max_cost}: the cheapest costs {cheapest}")


def _thresholds_of(member: FamilyMember) -> str:
    above = member.threshold_above
    up_to = member.threshold_up_to
    if math.isnan(above):
        return ""
    if math.isinf(above) and math.isinf(up_to):
        return "all"
    if math.isinf(above):
        return f"up to {up_to:.3g}"
    if math.isinf(up_to):
        return f"above {above:.3g}"
    return f"{above:.3g} to {up_to:.3g}"


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


def influence_rows(influence: Influence) -> Rows:
    """Return the table as tuples of floats, all finite."""
    table = influence.value_rows if isinstance(influence, InfluenceTable) else influence
    rows = tuple(tuple(map(float, row)) for row in table)
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
    rows = influence_rows(
        influence.worths() if isinstance(influence, InfluenceTable) else influence
    )
    full = IterationSchedule(tuple(map(len, rows)))
    none = IterationSchedule.none(len(rows))
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
        added_worths = list(accumulate(map(Fraction, row), initial=Fraction(0)))
        longer = []
        for worth, minus_spent, counts in states:
            for kept, (added, price) in enumerate(zip(added_worths, prices, strict=True)):
                if price - minus_spent <= budget:
                    longer.append((worth + added, minus_spent - price, (*counts, kept)))
        # From the cheapest on, keep those that are worth more than every cheaper one.
        longer.sort(key=lambda state: (state[1], state[0], state[2]), reverse=True)
        states = []
        for state in longer:
            if not states or state[0] > states[-1][0]:
                states.append(state)
    schedules = [IterationSchedule(counts) for _, _, counts in sorted(states, reverse=True)]
    return next((schedule for schedule in schedules if cost(schedule) <= max_cost), none)
