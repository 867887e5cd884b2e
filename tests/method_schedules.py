"""Iteration schedules that fit any method."""

from __future__ import annotations

from collections.abc import Sequence

from iiet.methods import METHODS
from iiet.schedule import IterationSchedule


def schedule_for(method: str, corrections: Sequence[int]) -> IterationSchedule | None:
    """Return these corrections, their maximum in all layers where the method repeats the stack, or
    None where it makes none.
    """
    if not METHODS[method].has_corrections:
        return None
    if METHODS[method].repeats_stack:
        return IterationSchedule.uniform(len(corrections), max(corrections))
    return IterationSchedule(tuple(corrections))
