"""Iteration schedules: how many corrections each layer makes.

A schedule is a plain value without torch, so that configs, cost counts and sweeps can share it.
`iiet.pruning` derives schedules from an influence table. Source: this project.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import index
from typing import SupportsIndex, TypeGuard

__all__ = ["IterationSchedule", "ScheduleLike"]


MAX_CORRECTIONS = 1000
"""Limit per layer. A larger number is a typing error, and its run would look like a hang."""
_RAMP = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_PART = re.compile(r"\s*[-+]?[0-9]{1,9}\s*(?:\*\s*[0-9]{1,9}\s*)?")
_LONGEST_QUOTE = 80
_LONGEST_PLAIN = 16
"""Characters of a schedule that is written with a number for each layer, 8 layers of one digit."""


@dataclass(frozen=True, slots=True, eq=False)
class IterationSchedule:
    """The number of corrections `r_1, ..., r_L` of each layer; layer l costs `1 + r_l` evaluations.

    It equals the tuple of these numbers, and has its hash. Text is compared after `parse`.
    Anything but at least one layer, each with 0 to `MAX_CORRECTIONS`, is a ValueError.
    """

    corrections: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.corrections, tuple) or not self.corrections:
            raise ValueError(
                "an iteration schedule is a non-empty tuple of integers (IterationSchedule.parse "
                f"takes text and lists), got {self.corrections!r}"
            )
        for layer, count in enumerate(self.corrections, start=1):
            if not _is_integer(count) or not 0 <= count <= MAX_CORRECTIONS:
                raise ValueError(
                    f"corrections of layer {layer} must be an integer from 0 to {MAX_CORRECTIONS}, "
                    f"got {_quoted(count)} in {_quoted(self.corrections)}"
                )
        object.__setattr__(self, "corrections", tuple(map(index, self.corrections)))

    @classmethod
    def uniform(cls, num_layers: int, r: int) -> IterationSchedule:
        """Give every layer the same number `r` of corrections."""
        return cls((r,) * num_layers)

    @classmethod
    def none(cls, num_layers: int) -> IterationSchedule:
        """Give no layer any correction."""
        return cls.uniform(num_layers, 0)

    @classmethod
    def ramp(cls, num_layers: int, first: int, last: int) -> IterationSchedule:
        """Go evenly from `first` corrections in the first layer to `last` in the last, rounded half
        up."""
        steps = max(1, num_layers - 1)
        line = (first * (steps - layer) + last * layer for layer in range(num_layers))
        return cls(tuple((2 * height + steps) // (2 * steps) for height in line))

    @classmethod
    def parse(cls, text: ScheduleLike, *, num_layers: int) -> IterationSchedule:
        """Read a schedule for `num_layers` layers as people write it.

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
        elif _is_integer(text):
            schedule = cls.uniform(num_layers, text)
        elif isinstance(text, Iterable):
            schedule = cls(tuple(text))
        else:
            raise ValueError(f"{_quoted(text)} is not an iteration schedule")
        if schedule.num_layers != num_layers:
            raise _wrong_length(text, schedule.num_layers, num_layers)
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

    @property
    def num_within(self) -> int:
        """How many schedules lie within this one, itself and none included."""
        return math.prod(1 + count for count in self)

    def is_within(self, other: IterationSchedule) -> bool:
        """Whether no layer makes more corrections than under `other`.

        Raises:
            ValueError: `other` has another number of layers.
        """
        if self.num_layers != other.num_layers:
            raise ValueError(f"({self}) and ({other}) have different numbers of layers")
        return all(count <= most for count, most in zip(self, other, strict=True))

    def with_layer(self, layer: int, count: int) -> IterationSchedule:
        """Return the schedule with another number of corrections in one layer, counted from 0."""
        before = self.corrections[:layer]
        after = self.corrections[layer + 1 :]
        return IterationSchedule((*before, count, *after))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, IterationSchedule):
            return self.corrections == other.corrections
        return self.corrections == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.corrections)

    def __iter__(self) -> Iterator[int]:
        return iter(self.corrections)

    def __len__(self) -> int:
        return len(self.corrections)

    def __getitem__(self, layer: int) -> int:
        return self.corrections[layer]

    def with_repetitions(self) -> str:
        """Write equal neighbours as `corrections*layers`: `0*12,2*6,0*12`."""
        groups = [(count, len(list(same))) for count, same in groupby(self.corrections)]
        return ",".join(f"{count}*{size}" if size > 1 else str(count) for count, size in groups)

    def __str__(self) -> str:
        """Write the schedule as it is typed; a long one with repetitions: `0*12,2*6,0*12`."""
        plain = ",".join(map(str, self.corrections))
        return plain if len(plain) <= _LONGEST_PLAIN else self.with_repetitions()


ScheduleLike = str | SupportsIndex | Iterable[int] | IterationSchedule
"""A schedule as people write it; `IterationSchedule.parse` reads all of these."""


def _is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of Python, NumPy or PyTorch."""
    try:
        return not isinstance(value, bool) and index(value) is not None  # type: ignore[arg-type]
    except TypeError:
        return False


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
    if num_given > num_layers:  # Refuse before making a list of, say, 10^9 entries.
        raise _wrong_length(text, num_given, num_layers)
    return tuple(count for count, times in runs for _ in range(times))


def _wrong_length(text: object, num_given: int, num_layers: int) -> ValueError:
    return ValueError(
        f"the iteration schedule {_shortened(str(text))} is for {num_given} layers, the model has "
        f"{num_layers}"
    )


def _quoted(value: object) -> str:
    try:
        return _shortened(repr(value))
    except ValueError:  # An integer of more digits than Python writes.
        return "a number too long to show"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
