"""Iteration schedules: how many corrections each layer makes, and which layers are left out.

A schedule is a plain value without torch, so that configs, cost counts and sweeps can share it.
`iiet.iiad.pruning` derives schedules from an influence table. A schedule that leaves layers out is
one relative to a larger model: `iiet.iiad.left_out` makes the model of the kept layers, which is
all that runs. Source: this project.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import index
from typing import Final, SupportsIndex, TypeGuard

__all__ = ["LEFT_OUT", "IterationSchedule", "ScheduleLike"]


LEFT_OUT: Final = -1
"""Stands for the corrections of a layer that is left out, which makes `1 + r = 0` evaluations."""
_LEFT_OUT_TEXT = "x"
MAX_CORRECTIONS = 1000
"""Limit per layer. A larger number is a typing error, and its run would look like a hang."""
_RAMP = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_PART = re.compile(r"\s*(?:x|[-+]?[0-9]{1,9})\s*(?:\*\s*[0-9]{1,9}\s*)?")
_LONGEST_QUOTE = 80
_LONGEST_PLAIN = 16
"""Characters of a schedule that is written with a number for each layer, 8 layers of one digit."""


@dataclass(frozen=True, slots=True, eq=False)
class IterationSchedule:
    """The number of corrections `r_1, ..., r_L` of each layer; layer l costs `1 + r_l` evaluations.

    The number of a layer that is left out is `LEFT_OUT`, in text `x`. Layers are counted from 0.
    A schedule equals the tuple of its numbers, and has its hash. Text is compared after `parse`.
    Anything but layers with 0 to `MAX_CORRECTIONS`, at least one, and perhaps others that are left
    out, is a ValueError.
    """

    corrections: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.corrections, tuple) or not self.corrections:
            raise ValueError(
                "an iteration schedule is a non-empty tuple of integers (IterationSchedule.parse "
                f"takes text and lists), got {self.corrections!r}"
            )
        for layer, count in enumerate(self.corrections, start=1):
            if not _is_integer(count) or not LEFT_OUT <= count <= MAX_CORRECTIONS:
                raise ValueError(
                    f"corrections of layer {layer} must be an integer from 0 to {MAX_CORRECTIONS}, "
                    f"or {_LEFT_OUT_TEXT} for a layer that is left out, got {_quoted(count)} in "
                    f"{_quoted(self.corrections)}"
                )
        if all(count == LEFT_OUT for count in self.corrections):
            raise ValueError(
                f"a schedule keeps at least one layer, got {_LEFT_OUT_TEXT} for each of "
                f"{len(self.corrections)} layers"
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
                ramp over the depth (`"3..0"`: see `ramp`). `x` in place of a layer's number leaves
                the layer out (`"3,x,1"`, `"0*4,x*3"`, `[3, "x", 1]`).
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
            schedule = cls(tuple(_count_of(item) for item in text))
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
    def left_out_layers(self) -> tuple[int, ...]:
        """The layers that are left out."""
        return tuple(layer for layer, count in enumerate(self) if count == LEFT_OUT)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers that are not left out."""
        return tuple(layer for layer, count in enumerate(self) if count != LEFT_OUT)

    @property
    def num_kept_layers(self) -> int:
        """Number of layers of the model that runs under this schedule."""
        return len(self.kept_layers)

    @property
    def num_corrections(self) -> int:
        """Corrections of all layers together."""
        return self.num_evaluations - self.num_kept_layers

    @property
    def max_corrections(self) -> int:
        """The largest number of corrections of any layer."""
        return max(self.corrections)

    @property
    def num_evaluations(self) -> int:
        """Field evaluations per forward: a prediction per kept layer and its corrections."""
        return sum(1 + count for count in self)

    def num_within(self, max_left_out: int = 0) -> int:
        """Count the schedules within this one, itself and none included, that leave out at most so
        many of the layers that it keeps."""
        # Of the layers so far: number of those that are left out -> number of schedules.
        counts = {0: 1}
        for layer in self.kept_layers:
            longer: dict[int, int] = {}
            for num_left_out, number in counts.items():
                for added, choices in ((0, 1 + self[layer]), (1, 1)):
                    if num_left_out + added <= max_left_out:
                        key = num_left_out + added
                        longer[key] = longer.get(key, 0) + number * choices
            counts = longer
        everything_left_out = counts.get(self.num_kept_layers, 0)
        return sum(counts.values()) - everything_left_out

    def is_within(self, other: IterationSchedule) -> bool:
        """Whether no layer makes more evaluations than under `other`.

        Raises:
            ValueError: `other` has another number of layers.
        """
        if self.num_layers != other.num_layers:
            raise ValueError(f"({self}) and ({other}) have different numbers of layers")
        return all(count <= most for count, most in zip(self, other, strict=True))

    def with_layer(self, layer: int, count: int) -> IterationSchedule:
        """Return the schedule with another number of corrections in one layer, or without it."""
        before = self.corrections[:layer]
        after = self.corrections[layer + 1 :]
        return IterationSchedule((*before, count, *after))

    def leaving_out(self, layers: Iterable[int]) -> IterationSchedule:
        """Return the schedule without these layers, too.

        Raises:
            ValueError: a number of no layer, or no layer would be left.
        """
        left_out = set(layers)
        if not left_out <= set(range(self.num_layers)):
            raise ValueError(
                f"layers to leave out must be numbers from 0 to {self.num_layers - 1}, got "
                f"{sorted(left_out)}"
            )
        counts = (LEFT_OUT if n in left_out else count for n, count in enumerate(self))
        return IterationSchedule(tuple(counts))

    def of_kept_layers(self) -> IterationSchedule:
        """Return the schedule of the model that consists of the kept layers."""
        return IterationSchedule(tuple(count for count in self if count != LEFT_OUT))

    def as_list(self) -> list[int | str]:
        """Return what JSON stores, with `"x"` for a layer that is left out; `parse` reads it."""
        return [_LEFT_OUT_TEXT if count == LEFT_OUT else count for count in self]

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
        """Write equal neighbours as `corrections*layers`: `0*12,2*6,x*2,0*10`."""
        groups = [(count, len(list(same))) for count, same in groupby(self.as_list())]
        return ",".join(f"{count}*{size}" if size > 1 else str(count) for count, size in groups)

    def __str__(self) -> str:
        """Write the schedule as it is typed; a long one with repetitions: `0*12,2*6,0*12`."""
        plain = ",".join(map(str, self.as_list()))
        return plain if len(plain) <= _LONGEST_PLAIN else self.with_repetitions()

    def label(self) -> str:
        """Write the schedule shortly: of many layers, how many are kept instead of which.

        `27 of 30 layers`; where these make corrections, `27 of 30 layers, 0*14,2*6,0*7`. So
        different schedules may have one label.
        """
        if not self.left_out_layers or 2 * self.num_layers - 1 <= _LONGEST_PLAIN:
            return str(self)
        number = f"{self.num_kept_layers} of {self.num_layers} layers"
        return f"{number}, {self.of_kept_layers()}" if self.num_corrections else number


ScheduleLike = str | SupportsIndex | Iterable[int | str] | IterationSchedule
"""A schedule as people write it; `IterationSchedule.parse` reads all of these."""


def _is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of Python, NumPy or PyTorch."""
    try:
        return not isinstance(value, bool) and index(value) is not None  # type: ignore[arg-type]
    except TypeError:
        return False


def _count_of(item: object) -> int:
    """Read an item of a list; what is no number of corrections is refused by the schedule."""
    if item == _LEFT_OUT_TEXT and isinstance(item, str):
        return LEFT_OUT
    if _is_integer(item) and index(item) == LEFT_OUT:
        raise ValueError(
            f"corrections must be integers from 0, got {_quoted(item)}; a layer that is left out "
            f"is written {_LEFT_OUT_TEXT}"
        )
    return item  # type: ignore[return-value]


def _counts_in(text: str, num_layers: int) -> tuple[int, ...]:
    """Read `"2,x,1*3"`, brackets allowed; a part `r*n` stands for n layers with r corrections."""
    runs: list[tuple[int, int]] = []
    for part in text.strip().strip("()[]").rstrip(",").split(","):
        if not _PART.fullmatch(part):
            raise ValueError(
                f"{_quoted(text)} is not an iteration schedule; write one number for all layers "
                "(3), one per layer (2,2,1,1), corrections*layers (3*4) or a ramp (3..0), and x "
                "for a layer that is left out (3,x,1)"
            )
        count, star, repeats = part.partition("*")
        is_left_out = count.strip() == _LEFT_OUT_TEXT
        number = LEFT_OUT if is_left_out else _count_of(int(count))
        runs.append((number, int(repeats) if star else 1))
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
