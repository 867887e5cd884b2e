"""Choose the models of a large sweep that tables, pages and bootstraps contain.

Pages of ten thousand rows cannot be read, and a bootstrap over that many models needs gigabytes. So
a large sweep shows the models on the front, the full model, the baselines, and the models nearest
below the front. `front.csv` and `front.json` contain all.
"""

from __future__ import annotations

from bisect import bisect_right

from orchestrator.reporting.pareto import Front, FrontPoint

MAX_SHOWN = 200


def shown_points(front: Front, most: int = MAX_SHOWN) -> tuple[FrontPoint, ...]:
    """Return the points of a front that tables and pages show, in the front's order.

    All points if there are at most `most`. Otherwise the members of the front, the full model and
    the baselines, and of the others those that lack least quality to the best member of at most
    their cost.
    """
    if len(front.points) <= most:
        return front.points
    always = {
        p.result.key for p in front.points if p.on_front or not p.is_candidate or p is front.full
    }
    costs = [member.cost for member in front.members]

    def shortfall(point: FrontPoint) -> float:
        cheaper = front.members[: bisect_right(costs, point.cost)]
        return front.goodness(cheaper[-1]) - front.goodness(point)

    others = sorted((p for p in front.points if p.result.key not in always), key=shortfall)
    nearest = {point.result.key for point in others[: max(0, most - len(always))]}
    return tuple(point for point in front.points if point.result.key in always | nearest)


def left_out_notes(front: Front) -> list[str]:
    """Return the sentence on models that tables and pages leave out; none if all are shown."""
    num_shown, num_all = len(shown_points(front)), len(front.points)
    if num_shown == num_all:
        return []
    return [
        f"Of {num_all:,} models, tables show the {num_shown:,} on the front and nearest to it, and "
        "only these have confidences; `front.csv` has all."
    ]
