"""Iteration schedules that fit any method."""

from __future__ import annotations

from collections.abc import Sequence

from iiet.methods import METHODS
from iiet.schedule import IterationSchedule


def schedule_for(method: str, corrections: Sequence[int]) -> IterationSchedule | None:
    """Return these corrections, at most the full level where the method has levels, their maximum
    in all layers where it repeats the stack, or None where it makes none.
    """
    if not METHODS[method].has_corrections:
        return None
    if (most := METHODS[method].full_level) is not None:
        return IterationSchedule(tuple(min(most, count) for count in corrections))
    if METHODS[method].repeats_stack:
        return IterationSchedule.uniform(len(corrections), max(corrections))
    return IterationSchedule(tuple(corrections))
