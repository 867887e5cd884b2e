"""The best iteration schedule under a budget, for a score that adds up over corrections.

In: the worth of every correction, one row per layer, and a number of field evaluations. Out: the
schedule of the highest total. A layer's corrections are kept as a prefix, so this is a knapsack
with one choice per layer; dynamic programming solves it exactly in about `evaluations *
corrections` steps, next to nothing for real tables. It is to be compared with the threshold's
schedule of the same cost: the threshold is greedy and nested, this is optimal but need not be
nested.

Source: this project.
"""

from __future__ import annotations

from fractions import Fraction

from iiet.schedule import Influence, IterationSchedule, influence_rows

__all__ = ["knapsack"]


def knapsack(score: Influence, *, max_evaluations: int) -> IterationSchedule:
    """Find the schedule of the highest total score under a budget; exact for scores that add up.

    Dynamic programming over layers: `best[l][n] = max_r best[l-1][n-r] + sum_{i<=r} score[l][i]`
    for n corrections in the first l layers. Sums are rational numbers, so rounding never decides;
    among equals the cheapest wins, then the one with fewer corrections in later layers.

    Args:
        score: one row per layer, one number per correction (negative ones allowed), the worth of
            keeping it when those before it are kept.
        max_evaluations: field evaluations per forward, predictions included.

    Raises:
        ValueError: the table is malformed, or the budget does not pay for the predictions.
    """
    rows = influence_rows(score)
    budget = max_evaluations - len(rows)
    if budget < 0:
        raise ValueError(
            f"max_evaluations={max_evaluations} is less than the {len(rows)} predictions "
            "that the layers always make"
        )
    # best[n]: highest total of exactly n corrections so far, and how they are spread.
    best: dict[int, tuple[Fraction, tuple[int, ...]]] = {0: (Fraction(0), ())}
    for row in rows:
        prefixes = [Fraction(0)]
        for value in row:
            prefixes.append(prefixes[-1] + Fraction(value))
        longer: dict[int, tuple[Fraction, tuple[int, ...]]] = {}
        for used, (total, counts) in best.items():
            for kept, prefix in enumerate(prefixes[: budget - used + 1]):
                candidate = (total + prefix, (*counts, kept))
                longer[used + kept] = max(candidate, longer.get(used + kept, candidate))
        best = longer
    _, most_worthy = max(((best[used][0], -used), best[used][1]) for used in best)
    return IterationSchedule(most_worthy)
