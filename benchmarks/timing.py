"""Timing side by side: tasks take turns, and ratios are computed within a turn.

A machine that slows down for a while slows down all tasks of a repetition, so the ratio of two
tasks within a repetition changes less than their times. Hence `paired_ratio` is the median of such
ratios over repetitions, not the ratio of two medians. Each repetition starts with another task, so
that no task always follows the slowest. Medians and quartiles are robust against outliers.

What only computes is timed by the seconds of its processor, which another program changes less than
those of the clock; of several threads they add up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

Clock = Callable[[], float]
"""Returns seconds since a fixed moment."""


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def take_turns(
    tasks: Mapping[str, Callable[[], T]], *, repetitions: int, warm_ups: int = 1
) -> dict[str, list[T]]:
    """Run all tasks in turns.

    Args:
        tasks: functions by name that return their measurement.
        repetitions: how often each is measured.
        warm_ups: how often each runs before, without a measurement.

    Returns:
        The results by name, in order of repetition, so that equal positions are pairs.
    """
    names = list(tasks)
    for _ in range(warm_ups):
        for name in names:
            tasks[name]()
    results: dict[str, list[T]] = {name: [] for name in names}
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(tasks[name]())
    return results


def stopwatch(task: Callable[[], object], clock: Clock = time.process_time) -> Callable[[], float]:
    """Return a task that runs another and returns its seconds, of its processor by default."""

    def timed() -> float:
        started = clock()
        task()
        return clock() - started

    return timed


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Summarize the ratios of values measured in the same repetition."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])
