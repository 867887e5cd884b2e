"""From influence to iteration schedules: the threshold's nested family, and an exact knapsack.

In: an influence table, one row per layer, one number per correction. Out: schedules.
A correction can be kept only with those before it, so a threshold acts on suffix maxima. Their
distinct values are the only breakpoints, so the family of all schedules that some threshold gives
is known without a sweep over thresholds. `knapsack` finds the schedule of the highest total worth
under a budget instead; its schedules need not be nested. A malformed table is a ValueError.

The rule is the same for whole layers. Evaluations of a layer are numbered from 0, the prediction,
whose influence is that of the whole layer:

    M[l,i] = max of I[l,k] over k >= i;   evaluation i of layer l stays while M[l,i] >= t

A layer of which no evaluation stays is left out. How many may be is a number, 0 by default: the
other layers, those of greatest M[l,0], keep their predictions at each threshold.
Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from iiet.checks import check_rules, is_integer_from, is_nan, is_number_from
from iiet.iiad.tables import SmallTable
from iiet.model.facts import metric_facts_of
from iiet.model.schedule import LEFT_OUT, IterationSchedule

__all__ = [
    "Cost",
    "ThresholdSchedule",
    "ScheduleFamily",
    "Influence",
    "InfluenceTable",
    "LeavingRound",
    "Rows",
    "influence_rows",
    "knapsack",
    "most_important_layers",
    "num_evaluations",
    "num_passes",
    "num_passes_one_at_a_time",
    "schedule_at_threshold",
    "schedule_family",
    "spread_over_cost",
    "suffix_maxima",
    "table_of_rounds",
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
    """Influence of each whole layer, which is that of its evaluation 0, by the same metric; empty
    if it was not measured."""
    layer_errors: tuple[float, ...] = ()
    """Standard errors of `layer_values`, as those of `value_rows`."""
    layer_accuracy_lost: tuple[float, ...] = ()
    """With `loss`, what leaving each layer out costs in accuracy; empty if it was not measured."""
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
                "layer_values must be a finite number per layer, or empty": (
                    len(self.layer_values) in (0, len(counts))
                    and all(is_number_from(-math.inf, value) for value in self.layer_values)
                ),
                "layer_errors must be numbers from 0, or NaN, for each layer value, or empty": (
                    len(self.layer_errors) in (0, len(self.layer_values))
                    and all(is_number_from(0, e) or is_nan(e) for e in self.layer_errors)
                ),
                "layer_accuracy_lost must have the length of layer_values, or be empty": (
                    len(self.layer_accuracy_lost) in (0, len(self.layer_values))
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
    def evaluation_rows(self) -> Rows:
        """Influence per layer and evaluation: of the whole layer, then of each correction.

        Raises:
            ValueError: the influence of whole layers was not measured.
        """
        if not self.layer_values:
            raise ValueError(
                "the table has no influence of whole layers, which says what may be left out; "
                "measure it by influence_table(..., whole_layers=True)"
            )
        pairs = zip(self.layer_values, self.value_rows, strict=True)
        return tuple((value, *row) for value, row in pairs)

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
        return self._worths_of(self.value_rows)

    def evaluation_worths(self) -> Rows:
        """Return what each evaluation adds, that of the whole layer first, as `worths` does.

        Raises:
            ValueError: the influence of whole layers was not measured.
        """
        return self._worths_of(self.evaluation_rows)

    def _worths_of(self, rows: Rows) -> Rows:
        if not metric_facts_of(self.metric).is_of_stopping:
            return rows
        return tuple(
            tuple(now - later for now, later in zip(row, (*row, 0.0)[1:], strict=True))
            for row in rows
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
            "layer_errors": [_finite(error) for error in self.layer_errors],
            "layer_accuracy_lost": list(self.layer_accuracy_lost),
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
            layer_errors=_row_of(table["layer_errors"]),
            layer_accuracy_lost=_row_of(table["layer_accuracy_lost"]),
            accuracy_lost_rows=_rows_of(table["accuracy_lost"]),
        )


@dataclass(frozen=True)
class LeavingRound:
    """One round of leaving layers out one at a time: what the leaving of each layer would add now.

    Raises:
        ValueError: rows of two lengths, or no layer is left.
    """

    values: tuple[float, ...]
    """Influence of each layer of the full model; NaN for those that are gone."""
    errors: tuple[float, ...]
    """Standard errors over batches; NaN where they are unknown."""

    def __post_init__(self) -> None:
        check_rules(
            "round of leaving layers out",
            self,
            {
                "values must have a number for a layer that is left": any(
                    not math.isnan(value) for value in self.values
                ),
                "errors must have the length of values": len(self.errors) == len(self.values),
            },
        )

    @property
    def layer(self) -> int:
        """The layer that goes: that of least influence; of equal ones the last."""
        remaining = [n for n, value in enumerate(self.values) if not math.isnan(value)]
        return min(remaining, key=lambda layer: (self.values[layer], -layer))

    @property
    def value(self) -> float:
        """What its leaving adds."""
        return self.values[self.layer]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "values": [_finite(value) for value in self.values],
            "errors": [_finite(error) for error in self.errors],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LeavingRound:
        """Build a round from `to_dict`."""
        return cls(_row_of(values["values"]), _row_of(values["errors"]))


def table_of_rounds(table: InfluenceTable, rounds: Sequence[LeavingRound]) -> InfluenceTable:
    """Return a table whose whole layers are ordered as they went, one at a time.

    A layer's influence is what its leaving added, or the next number above that of the layer before
    it: so thresholds take layers away in this order, one by one, except those of which a correction
    has more influence. A layer that did not go has what its leaving would have added in the last
    round.

    Args:
        table: of the same model and metric.
        rounds: at least one, the first one first.
    """
    values = list(rounds[-1].values)
    errors = list(rounds[-1].errors)
    least = -math.inf
    for leaving in rounds:
        values[leaving.layer] = max(leaving.value, least)
        errors[leaving.layer] = leaving.errors[leaving.layer]
        least = math.nextafter(values[leaving.layer], math.inf)
    gone = {leaving.layer for leaving in rounds}
    ordered = (v if layer in gone else max(v, least) for layer, v in enumerate(values))
    return replace(
        table, layer_values=tuple(ordered), layer_errors=tuple(errors), layer_accuracy_lost=()
    )


def num_passes(metric: str, schedule: IterationSchedule, *, whole_layers: bool) -> int:
    """Count the forward passes per batch that `iiet.iiad.influence.influence_table` takes.

    Args:
        metric: a key of `iiet.INFLUENCE_METRICS`. One that stops layers early and leaves layers
            out, such as `loss`, takes a pass for each; others compare within one pass.
        schedule: of the model that is measured.
        whole_layers: whether whole layers are measured, too.
    """
    if not metric_facts_of(metric).is_of_stopping:
        return 1
    num_layers_left_out = schedule.num_layers if whole_layers else 0
    return 1 + schedule.num_corrections + num_layers_left_out


def num_passes_one_at_a_time(metric: str, num_layers: int, num_leaving: int) -> int:
    """Count the forward passes per batch that `iiet.iiad.influence.leave_out_one_at_a_time` takes.

    Args:
        metric: as in `num_passes`.
        num_layers: of the model.
        num_leaving: how many of them leave.
    """
    if not metric_facts_of(metric).is_of_stopping:
        return num_leaving
    return sum(1 + num_layers - num_gone for num_gone in range(num_leaving))


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows_of(rows: Iterable[Iterable[Any]]) -> Rows:
    return tuple(map(_row_of, rows))


def _row_of(row: Iterable[Any]) -> tuple[float, ...]:
    """Read numbers of plain JSON, where None stands for NaN."""
    return tuple(math.nan if x is None else float(x) for x in row)


Influence = Sequence[Sequence[float]] | InfluenceTable
"""One row per layer, one number per correction; rows may differ in length."""

Cost = Callable[[IterationSchedule], float]
"""The cost of a schedule in any unit, such as evaluations, FLOPs or bytes."""


@dataclass(frozen=True, slots=True)
class ThresholdSchedule:
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
            "schedule of a family",
            self,
            {
                "schedule must be an IterationSchedule": isinstance(
                    self.schedule, IterationSchedule
                ),
                "threshold_up_to must be above threshold_above, or both NaN": are_numbers
                and (above < up_to or (is_nan(above) and is_nan(up_to))),
            },
        )


class ScheduleFamily(tuple[ThresholdSchedule, ...]):
    """Nested schedules, from full to no corrections, or to the fewest layers."""

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
        """Return the schedule with the most evaluations, at most `nfe`.

        Raises:
            ValueError: none is that cheap.
        """
        return self.within_cost(nfe, num_evaluations)

    def within_cost(self, max_cost: float, cost: Cost) -> IterationSchedule:
        """Return the schedule with the most evaluations of at most this cost, in any unit.

        Raises:
            ValueError: none is that cheap.
        """
        costs = [cost(member.schedule) for member in self]
        for member, member_cost in zip(self, costs, strict=True):
            if member_cost <= max_cost:
                return member.schedule
        cheapest = min(costs, default=math.nan)
        raise ValueError(f"no schedule costs at most {max_cost}: the cheapest costs {cheapest}")


def _thresholds_of(member: ThresholdSchedule) -> str:
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


def schedule_at_threshold(
    influence: Influence, threshold: float, *, max_left_out: int = 0
) -> IterationSchedule:
    """Keep `#{i : M[i] >= threshold}` evaluations in each layer.

    Args:
        influence: a table with the influence of whole layers where layers may be left out.
        threshold: an influence.
        max_left_out: how many layers may be left out. The others, those of greatest `M[0]`, keep
            their predictions (evaluation 0).

    Raises:
        ValueError: the influence of whole layers was not measured, or no layer would stay.
    """
    return _schedule_at(_evaluation_maxima(influence, max_left_out), threshold)


def schedule_family(influence: Influence, *, max_left_out: int = 0) -> ScheduleFamily:
    """List every distinct schedule that some threshold gives, from full to no corrections, or to
    the one that leaves `max_left_out` layers out.

    The schedules are nested, and there are at most one more than evaluations that a threshold can
    take away. Two neighbors differ by several where suffix maxima are equal. Arguments and errors
    are those of `schedule_at_threshold`.
    """
    maxima = _evaluation_maxima(influence, max_left_out)
    # The prediction of a layer that always stays is above every threshold.
    breakpoints = sorted({value for row in maxima for value in row} - {math.inf})
    ends = [-math.inf, *breakpoints, math.inf]
    return ScheduleFamily(
        ThresholdSchedule(_schedule_at(maxima, up_to), above, up_to)
        for above, up_to in pairwise(ends)
    )


def _evaluation_maxima(influence: Influence, max_left_out: int) -> Rows:
    """Return `M[l,i]` of each layer and evaluation; infinity for predictions that always stay."""
    if max_left_out == 0:
        return tuple((math.inf, *suffix_maxima(row)) for row in influence_rows(influence))
    maxima = tuple(
        map(suffix_maxima, _checked_evaluations(influence, max_left_out).evaluation_rows)
    )
    num_staying = len(maxima) - max_left_out
    staying = most_important_layers([row[0] for row in maxima], num_staying)
    return tuple(
        (math.inf, *row[1:]) if layer in staying else row for layer, row in enumerate(maxima)
    )


def _checked_evaluations(influence: Influence, max_left_out: int) -> InfluenceTable:
    """Return a table by which so many layers may be left out."""
    if not isinstance(influence, InfluenceTable):
        raise ValueError("layers are left out by an InfluenceTable, which knows whole layers")
    num_layers = len(influence.value_rows)
    if not (is_integer_from(1, max_left_out) and max_left_out < num_layers):
        raise ValueError(
            f"max_left_out must be an integer from 0 to {num_layers - 1}, as at least one of "
            f"{num_layers} layers stays, got {max_left_out!r}"
        )
    return influence


def _schedule_at(maxima: Rows, threshold: float) -> IterationSchedule:
    """Return the schedule of a threshold; without any evaluation, a layer is left out."""
    nums_kept = (sum(value >= threshold for value in row) for row in maxima)
    return IterationSchedule(tuple(num_kept - 1 for num_kept in nums_kept))


def most_important_layers(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the numbers of the `count` layers of highest importance, in ascending order.

    Of equal layers the earlier ones count as more important, so the choices are nested.
    """
    ranked = sorted(range(len(importance)), key=lambda layer: (-importance[layer], layer))
    return tuple(sorted(ranked[:count]))


def spread_over_cost(
    family: Sequence[ThresholdSchedule], num_points: int, *, cost: Cost = num_evaluations
) -> tuple[ThresholdSchedule, ...]:
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
_State = tuple[Fraction, Fraction, tuple[int, ...]]
"""Worth, minus the cost, and corrections of the first layers; the larger one is better."""


def knapsack(
    influence: Influence,
    max_cost: float,
    *,
    cost: Cost = num_evaluations,
    max_left_out: int = 0,
) -> IterationSchedule:
    """Find the schedule of the highest total worth under a budget, exactly.

    Dynamic programming over layers: of all schedules of the first l layers that leave out equally
    many, keep those that are worth more than every cheaper one. Sums are rational, so rounding
    never decides. Among equals the cheapest wins, then the one with fewer evaluations in later
    layers.

    Args:
        influence: numbers, also negative ones, are worths: what each correction adds if those
            before it are kept. A measured influence knows its worths, and a table with the
            influence of whole layers those of predictions.
        max_cost: in the unit of `cost`.
        cost: must add up over the kept layers, as FLOPs and bytes do. What a layer adds may depend
            on how many are kept before it, as the terms of a mix do.
        max_left_out: how many layers may be left out, whichever these are.

    Raises:
        ValueError: the budget does not pay for the predictions, or as `schedule_at_threshold`.
    """
    if max_left_out == 0:
        rows = influence_rows(
            influence.worths() if isinstance(influence, InfluenceTable) else influence
        )
        worths = [[0.0, *row] for row in rows]
    else:
        worths = [
            [*row] for row in _checked_evaluations(influence, max_left_out).evaluation_worths()
        ]
    num_layers = len(worths)
    full = IterationSchedule(tuple(len(row) - 1 for row in worths))
    none = IterationSchedule.none(num_layers)
    # Prices are differences of rounded costs, so allow slightly more here; the end checks the cost.
    budget = Fraction(min(max_cost, 2 * cost(full))) * (1 + ROUNDING)

    def price(layer: int, count: int, num_left_out: int) -> Fraction:
        """Return what a layer adds to the cost of the layers before it, of which so many are left
        out; the first kept layer's price is the whole cost of a model that consists of it."""
        if max_left_out == 0:  # The cost need not know of left-out layers.
            whole = Fraction(cost(none.with_layer(layer, count)))
            return whole if layer == 0 else whole - Fraction(cost(none))
        before = (*(LEFT_OUT,) * num_left_out, *(0,) * (layer - num_left_out))
        after = (LEFT_OUT,) * (num_layers - layer - 1)
        whole = Fraction(cost(IterationSchedule((*before, count, *after))))
        if num_left_out == layer:
            return whole
        return whole - Fraction(cost(IterationSchedule((*before, LEFT_OUT, *after))))

    # By the number of layers that are left out so far.
    states: dict[int, list[_State]] = {0: [(Fraction(0), Fraction(0), ())]}
    for layer, row in enumerate(worths):
        added_worths = list(accumulate(map(Fraction, row)))
        longer: dict[int, list[_State]] = {}
        for num_left_out, shorter in states.items():
            if num_left_out < max_left_out:
                longer.setdefault(num_left_out + 1, []).extend(
                    (worth, minus_spent, (*counts, LEFT_OUT))
                    for worth, minus_spent, counts in shorter
                )
            for count, added in enumerate(added_worths):
                added_cost = price(layer, count, num_left_out)
                longer.setdefault(num_left_out, []).extend(
                    (worth + added, minus_spent - added_cost, (*counts, count))
                    for worth, minus_spent, counts in shorter
                    if added_cost - minus_spent <= budget
                )
        states = {number: _undominated(candidates) for number, candidates in longer.items()}
    best_first = sorted((state for kept in states.values() for state in kept), reverse=True)
    for _, _, counts in best_first:
        schedule = IterationSchedule(counts)
        if cost(schedule) <= max_cost:
            return schedule
    at_least = num_layers - max_left_out
    raise ValueError(
        f"a budget of {max_cost} does not pay for the {at_least} predictions that are always made"
        + ("" if max_left_out else f", which cost {cost(none)}")
    )


def _undominated(states: list[_State]) -> list[_State]:
    """Return those that are worth more than every cheaper one."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state[1], state[0], state[2]), reverse=True):
        if not kept or state[0] > kept[-1][0]:
            kept.append(state)
    return kept
