"""Iteration schedules: corrections per layer, and the nested family an influence table proposes.

In: an influence table, one row per layer, one number per correction, as plain nested floats. Out:
the nested family of every schedule that some threshold gives, each with its threshold interval. A
correction can only be kept with those before it, so a threshold acts on suffix maxima; their sorted
distinct values are the only breakpoints, and the family is complete after one sort, where a sweep
over threshold values would miss members or repeat them. `iiet.knapsack` is the other way to choose.

A schedule is a plain value without torch, so that configs, cost counts and sweeps can share it.
Source: this project.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

__all__ = [
    "FamilyMember",
    "IterationSchedule",
    "influence_rows",
    "num_kept",
    "schedule_at_threshold",
    "schedule_family",
    "spread_over_cost",
    "suffix_maxima",
    "within_budget",
    "within_cost",
]


MAX_CORRECTIONS = 1000
"""Of one layer. A larger number is a typing error, and its run would look like a hang."""
_RAMP = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_PART = re.compile(r"\s*[-+]?[0-9]{1,9}\s*(?:\*\s*[0-9]{1,9}\s*)?")
_LONGEST_QUOTE = 80


@runtime_checkable
class HasRows(Protocol):
    """Anything that gives its influence as rows, such as `iiet.influence.InfluenceTable`."""

    def rows(self) -> Sequence[Sequence[float]]: ...


Influence = Sequence[Sequence[float]] | HasRows


@dataclass(frozen=True, slots=True)
class IterationSchedule:
    """The number of corrections `r_1, ..., r_L` of each layer; layer l costs `1 + r_l` evaluations.

    Raises:
        ValueError: no layer, or an entry that is not an integer of at least zero.
    """

    corrections: tuple[int, ...]
    """Corrections per layer, first layer first."""

    def __post_init__(self) -> None:
        if not isinstance(self.corrections, tuple) or not self.corrections:
            raise ValueError(
                "an iteration schedule is a non-empty tuple of integers (IterationSchedule.parse "
                f"takes text and lists), got {self.corrections!r}"
            )
        for layer, count in enumerate(self.corrections, start=1):
            if type(count) is not int or not 0 <= count <= MAX_CORRECTIONS:
                is_large = type(count) is int and count > 0
                bound = f"most {MAX_CORRECTIONS}" if is_large else "least 0"
                raise ValueError(
                    f"corrections of layer {layer} must be an integer of at {bound}, got "
                    f"{_quoted(count)} in {_quoted(self.corrections)}"
                )

    @classmethod
    def uniform(cls, num_layers: int, r: int) -> IterationSchedule:
        """Give every layer the same number `r` of corrections."""
        return cls((r,) * num_layers)

    @classmethod
    def none(cls, num_layers: int) -> IterationSchedule:
        """Give no layer any correction: predictions and the mix alone."""
        return cls.uniform(num_layers, 0)

    @classmethod
    def ramp(cls, num_layers: int, first: int, last: int) -> IterationSchedule:
        """Go evenly from `first` corrections in the first layer to `last` in the last one.

        Layer l gets the nearest integer to the straight line between them, the larger one of two.
        """
        steps = max(1, num_layers - 1)
        line = (first * (steps - layer) + last * layer for layer in range(num_layers))
        return cls(tuple((2 * height + steps) // (2 * steps) for height in line))

    @classmethod
    def parse(
        cls, text: str | int | Iterable[int] | IterationSchedule, *, num_layers: int
    ) -> IterationSchedule:
        """Read a schedule as people write it.

        Args:
            text: one number for all layers (`3`, `"3"`), one per layer (`"2,2,1,1"`, `"(2,2,1,1)"`,
                `[2, 2, 1, 1]`), with repetitions `corrections*layers` (`"3*4"`, `"0*2,1*4"`), or a
                ramp over the depth (`"3..0"`: see `ramp`).
            num_layers: the number of layers that the schedule must have.

        Raises:
            ValueError: the text is not a schedule, or has another number of layers.
        """
        if isinstance(text, IterationSchedule):
            schedule = text
        elif isinstance(text, str) and (ends := _RAMP.fullmatch(text.strip())):
            schedule = cls.ramp(num_layers, int(ends[1]), int(ends[2]))
        elif isinstance(text, str):
            counts = _counts_in(text, num_layers)
            for_each_layer = len(counts) == 1 and "*" not in text
            schedule = cls(counts * num_layers if for_each_layer else counts)
        elif isinstance(text, int):
            schedule = cls.uniform(num_layers, text)
        elif isinstance(text, Iterable):
            schedule = cls(tuple(text))
        else:
            raise ValueError(f"{_quoted(text)} is not an iteration schedule")
        if schedule.num_layers != num_layers:
            raise ValueError(
                f"the iteration schedule {_shortened(str(text))} is for {schedule.num_layers} "
                "layers, "
                f"the model has {num_layers}"
            )
        return schedule

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.corrections)

    @property
    def num_corrections(self) -> int:
        """Corrections of all layers together."""
        return sum(self.corrections)

    @property
    def max_corrections(self) -> int:
        """The largest number of corrections of any layer."""
        return max(self.corrections)

    @property
    def num_evaluations(self) -> int:
        """Field evaluations per forward: one prediction per layer and its corrections."""
        return self.num_layers + self.num_corrections

    def is_within(self, other: IterationSchedule) -> bool:
        """Tell whether no layer makes more corrections than it does under `other`.

        Raises:
            ValueError: the two have different numbers of layers.
        """
        if self.num_layers != other.num_layers:
            raise ValueError(f"({self}) and ({other}) have different numbers of layers")
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))

    @property
    def num_within(self) -> int:
        """How many schedules lie within this one, itself and none included."""
        return math.prod(1 + count for count in self)

    def with_layer(self, layer: int, count: int) -> IterationSchedule:
        """Return the schedule with another number of corrections in one layer, counted from 0."""
        before, after = self.corrections[:layer], self.corrections[layer + 1 :]
        return IterationSchedule((*before, count, *after))

    def __iter__(self) -> Iterator[int]:
        return iter(self.corrections)

    def __len__(self) -> int:
        return len(self.corrections)

    def __getitem__(self, layer: int) -> int:
        return self.corrections[layer]

    def __str__(self) -> str:
        return ",".join(map(str, self.corrections))


@dataclass(frozen=True, slots=True)
class FamilyMember:
    """A schedule, and the thresholds t that give it: `threshold_above < t <= threshold_up_to`."""

    schedule: IterationSchedule
    """What these thresholds keep."""
    threshold_above: float
    """Exclusive lower end; minus infinity for the full schedule."""
    threshold_up_to: float
    """Inclusive upper end; infinity for the schedule without corrections."""


Cost = Callable[[IterationSchedule], float]


def num_evaluations(schedule: IterationSchedule) -> float:
    """Cost a schedule by its field evaluations."""
    return schedule.num_evaluations


def suffix_maxima(row: Sequence[float]) -> tuple[float, ...]:
    """Compute `M[i] = max_{k>=i} I[k]` of one layer: the most that dropping i and later loses."""
    maxima: list[float] = []
    for value in reversed(row):
        maxima.append(max(value, maxima[-1]) if maxima else value)
    return tuple(reversed(maxima))


def num_kept(row: Sequence[float], threshold: float) -> int:
    """Count the corrections that one layer keeps: `#{i : M[i] >= threshold}`."""
    return sum(value >= threshold for value in suffix_maxima(row))


def schedule_at_threshold(influence: Influence, threshold: float) -> IterationSchedule:
    """Drop corrections of influence under the threshold, from each layer's last one backwards.

    Args:
        influence: one row per layer, one number per correction, in lists or arrays of any kind;
            rows may differ in length, or end in NaN for corrections that do not exist.
        threshold: in the units of the influence.

    Raises:
        ValueError: the table is malformed, or the threshold is NaN.
    """
    threshold = float(threshold)  # An entry of an array counts otherwise than a number does.
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN; give a number")
    return IterationSchedule(tuple(num_kept(row, threshold) for row in influence_rows(influence)))


def schedule_family(influence: Influence) -> tuple[FamilyMember, ...]:
    """List every distinct schedule that some threshold gives, from full to no corrections.

    The schedules are nested, and there are at most one more than corrections. Corrections whose
    suffix maxima are equal fall together, so neighbours may differ by more than one correction.

    Args:
        influence: as for `schedule_at_threshold`.

    Raises:
        ValueError: the table is malformed.
    """
    rows = influence_rows(influence)
    breakpoints = sorted({value for row in rows for value in suffix_maxima(row)})
    ends = [-math.inf, *breakpoints, math.inf]
    return tuple(
        FamilyMember(schedule_at_threshold(rows, up_to), above, up_to)
        for above, up_to in pairwise(ends)
    )


def spread_over_cost(
    family: Sequence[FamilyMember], num_points: int, *, cost: Cost = num_evaluations
) -> tuple[FamilyMember, ...]:
    """Choose members spread as evenly over cost as the family allows, both ends included.

    Args:
        family: from `schedule_family`, dearest first.
        num_points: how many to choose, at least 2; a smaller family is returned whole.
        cost: what to spread over; evaluations when not given.

    Raises:
        ValueError: fewer than two points are asked for.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2 (both ends), got {num_points}")
    if len(family) <= num_points:
        return tuple(family)
    costs = [cost(member.schedule) for member in family]
    step = (costs[-1] - costs[0]) / (num_points - 1)
    chosen: list[int] = []
    for point in range(num_points):
        # Leave enough members for the points that follow, so that all chosen ones are distinct.
        first = chosen[-1] + 1 if chosen else 0
        candidates = range(first, len(family) - (num_points - 1 - point))
        target = costs[0] + point * step
        chosen.append(min(candidates, key=lambda index: abs(costs[index] - target)))
    return tuple(family[index] for index in chosen)


def within_cost(family: Sequence[FamilyMember], max_cost: float, *, cost: Cost) -> FamilyMember:
    """Choose the member with the most corrections whose cost is at most `max_cost`.

    Args:
        family: from `schedule_family`, most corrections first.
        max_cost: in the units of `cost` (evaluations, FLOPs, bytes, milliseconds).
        cost: maps a schedule to its cost.

    Raises:
        ValueError: no member is that cheap.
    """
    for member in family:
        if cost(member.schedule) <= max_cost:
            return member
    cheapest = min((cost(member.schedule) for member in family), default=math.nan)
    raise ValueError(f"no schedule costs at most {max_cost}: the cheapest costs {cheapest}")


def within_budget(family: Sequence[FamilyMember], max_evaluations: int) -> FamilyMember:
    """Choose the member with the most corrections under a budget of field evaluations.

    Raises:
        ValueError: no member is that cheap.
    """
    return within_cost(family, max_evaluations, cost=num_evaluations)


def _counts_in(text: str, num_layers: int) -> tuple[int, ...]:
    """Read `"2,2,1*3"`, brackets allowed; a part `r*n` stands for n layers with r corrections."""
    runs: list[tuple[int, int]] = []
    for part in text.strip().strip("()[]").rstrip(",").split(","):
        if not _PART.fullmatch(part):
            raise ValueError(
                f"{_quoted(text)} is not an iteration schedule; write one number for all layers "
                "(3), one per layer (2,2,1,1), corrections*layers (3*4) or a ramp (3..0)"
            )
        count, star, repeats = part.partition("*")
        runs.append((int(count), int(repeats) if star else 1))
    num_given = sum(times for _, times in runs)
    if num_given > num_layers:  # Said before a list of so many is made.
        raise ValueError(
            f"the iteration schedule {_shortened(text)} is for {num_given} layers, the model has "
            f"{num_layers}"
        )
    return tuple(count for count, times in runs for _ in range(times))


def _quoted(value: object) -> str:
    try:
        return _shortened(repr(value))
    except ValueError:  # An integer of more digits than Python writes.
        return "a number too long to show"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def influence_rows(influence: Influence) -> tuple[tuple[float, ...], ...]:
    """Return the table as ragged tuples of finite floats, the NaN at the end of rows removed.

    Raises:
        ValueError: no layers, or a value that is not finite before a row's end.
    """
    table = influence.rows() if isinstance(influence, HasRows) else influence
    rows: list[tuple[float, ...]] = []
    for layer, given in enumerate(table, start=1):
        try:
            row = [float(value) for value in given]
        except TypeError:
            raise ValueError(
                f"influence of layer {layer} must be a row of numbers, one per correction, "
                f"got {given!r}"
            ) from None
        while row and math.isnan(row[-1]):
            row.pop()
        for correction, value in enumerate(row, start=1):
            if not math.isfinite(value):
                raise ValueError(
                    f"influence of layer {layer}, correction {correction} is {value}; "
                    "only the end of a row may be NaN"
                )
        rows.append(tuple(row))
    if not rows:
        raise ValueError("the influence table has no layers")
    return tuple(rows)
