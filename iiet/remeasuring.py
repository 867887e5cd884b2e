"""A nested family of schedules that measures the influence anew after every pruning.

In: a function that measures the influence under a schedule. Out: schedules from full to none, as
`iiet.pruning.schedule_family` gives them, but each pruned by what mattered under the one before,
not under the full one: a layer that corrects less hands other states to the layers behind it, and
what their corrections do there may matter more or less than it did. If pruning changes no other
correction's influence, the two families are the same.

Cost: one measurement for each member but the last, where the other family needs one in all; pruning
several corrections between measurements costs less and follows less closely. Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from iiet.pruning import FamilyMember, Influence, schedule_family
from iiet.schedule import IterationSchedule

__all__ = ["remeasured_family"]


def remeasured_family(
    measure: Callable[[IterationSchedule], Influence],
    start: IterationSchedule,
    *,
    num_dropped: int = 1,
) -> tuple[FamilyMember, ...]:
    """Prune from a schedule to none, measuring after every step.

    A threshold t means: prune and measure until nothing that is left lies under t. It so stops at
    the first member that needs a larger one; members that no threshold stops at have
    `threshold_above == threshold_up_to`, and are in the family for their cost.

    Args:
        measure: schedule -> influence under it, with one number for each of its corrections.
        start: the full schedule.
        num_dropped: fewest corrections that fall between two measurements; those of equal influence
            fall together.

    Returns:
        Nested schedules, from `start` to none, each once.

    Raises:
        ValueError: `num_dropped` is under 1, or what is measured belongs to another schedule.
    """
    if num_dropped < 1:
        raise ValueError(f"num_dropped must be at least 1, got {num_dropped}")
    members: list[FamilyMember] = []
    schedule, above = start, -math.inf
    while schedule.num_corrections:
        family = schedule_family(measure(schedule))
        if family[0].schedule != schedule:
            raise ValueError(
                f"asked for the influence under ({schedule}), got one of ({family[0].schedule})"
            )
        most_kept = max(0, schedule.num_corrections - num_dropped)
        pruned = next(m for m in family if m.schedule.num_corrections <= most_kept)
        up_to = max(above, family[0].threshold_up_to)
        members.append(FamilyMember(schedule, above, up_to))
        schedule, above = pruned.schedule, up_to
    return (*members, FamilyMember(schedule, above, math.inf))
