"""The best iteration schedule under a budget, for a score that adds up over corrections.

In: the worth of every correction, one row per layer, and a budget. Out: the schedule of the highest
total. A layer's corrections are kept as a prefix, so this is a knapsack with one choice per layer;
dynamic programming solves it exactly, in about `evaluations * corrections` steps where the budget
is of evaluations, next to nothing for real tables. It is to be compared with the threshold's
schedule under the same budget: the threshold is greedy and nested, this is optimal but need not be
nested.

Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Protocol, runtime_checkable

from iiet.schedule import Cost, Influence, IterationSchedule, influence_rows, num_evaluations

__all__ = ["knapsack"]


@runtime_checkable
class HasWorths(Protocol):
    """Anything that says what each correction adds, such as `iiet.influence.InfluenceTable`."""

    def worths(self) -> Sequence[Sequence[float]]: ...


ROUNDING = 1e-12
"""What rounding takes from or adds to a cost, as a share of it, at most."""
State = tuple[Fraction, Fraction, tuple[int, ...]]
"""Worth so far, minus the cost so far, and the corrections of the layers so far: the larger one is
better."""


def knapsack(
    score: Influence,
    *,
    max_evaluations: float | None = None,
    max_cost: float | None = None,
    cost: Cost = num_evaluations,
) -> IterationSchedule:
    """Find the schedule of the highest total score under a budget; exact for scores that add up.

    Dynamic programming over layers: of all ways to spend in the first l layers, only those are kept
    that no cheaper one is worth as much as. Sums are rational numbers, so rounding never decides;
    only a schedule whose own cost, computed with rounding, is within the budget is returned. Among
    equals the cheapest wins, then the one with fewer corrections in later layers.

    Args:
        score: one row per layer, one number per correction (negative ones allowed), the worth of
            keeping it when those before it are kept; an influence table knows what that is.
        max_evaluations: field evaluations per forward, predictions included.
        max_cost: the budget in the units of `cost`, in place of `max_evaluations`.
        cost: maps a schedule to its cost, which must add up over layers, as FLOPs and bytes do.

    Raises:
        ValueError: the table is malformed, there are no or two budgets, the budget does not pay for
            the predictions, or the cost does not add up.
    """
    rows = influence_rows(score.worths() if isinstance(score, HasWorths) else score)
    if (max_evaluations is None) == (max_cost is None):
        raise ValueError("give one budget: max_evaluations, or max_cost and its cost")
    if max_evaluations is not None:
        max_cost, cost = max_evaluations, num_evaluations
    assert max_cost is not None
    full, none = (IterationSchedule(tuple(map(len, rows))), IterationSchedule.none(len(rows)))
    if not max_cost >= cost(none):
        raise ValueError(
            f"a budget of {max_cost} does not pay for the {len(rows)} predictions that the layers "
            f"always make, which cost {cost(none)}"
        )
    prices = _prices(full, cost)
    budget = _budget(max_cost, cost(none), prices)
    states: list[State] = [(Fraction(0), Fraction(0), ())]
    for row, layer_prices in zip(rows, prices, strict=True):
        worths = accumulate(map(Fraction, row), initial=Fraction(0))
        choices = list(enumerate(zip(worths, layer_prices, strict=True)))
        states = _worth_keeping(
            (worth + more, minus_spent - price, (*counts, kept))
            for worth, minus_spent, counts in states
            for kept, (more, price) in choices
            if price - minus_spent <= budget
        )
    schedules = [IterationSchedule(counts) for _, _, counts in sorted(states, reverse=True)]
    return next((one for one in schedules if cost(one) <= max_cost), none)


def _prices(full: IterationSchedule, cost: Cost) -> list[list[Fraction]]:
    """Return what 0, 1, ... corrections of each layer cost, all others making none."""
    none = IterationSchedule.none(len(full))
    least = Fraction(cost(none))

    prices = [
        [Fraction(cost(none.with_layer(layer, kept))) - least for kept in range(most + 1)]
        for layer, most in enumerate(full)
    ]
    together = float(least + sum(own[-1] for own in prices))
    if not math.isclose(together, cost(full), rel_tol=1e-9):
        raise ValueError(
            f"the cost does not add up over layers: ({full}) costs {cost(full)}, its layers one by "
            f"one {together}"
        )
    return prices


def _budget(max_cost: float, least: float, prices: Sequence[Sequence[Fraction]]) -> Fraction:
    """Return what may be spent on corrections: the budget without the predictions, and for costs
    that are not whole numbers a little more, since their prices are differences of rounded ones."""
    everything = sum(map(max, prices), start=Fraction(0))
    if max_cost == math.inf:
        return everything
    budget = Fraction(max_cost) - Fraction(least)
    is_whole = all(price.denominator == 1 for own in prices for price in own)
    return budget if is_whole else budget + abs(Fraction(max_cost)) * Fraction(ROUNDING)


def _worth_keeping(states: Iterable[State]) -> list[State]:
    """Drop the states that another one beats at no higher cost."""
    kept: list[State] = []
    for state in sorted(states, key=lambda one: (one[1], one[0], one[2]), reverse=True):
        if not kept or state[0] > kept[-1][0]:
            kept.append(state)
    return kept
