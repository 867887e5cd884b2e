"""Which model of a front to take, by a rule that a person states.

keep      the cheapest that keeps a share of the full model's quality, if asked for with a
          confidence
budget    the best that costs no more than so much
knee      the member farthest above the chord from the cheapest to the best
best      the member of highest quality
cheapest  the member of lowest cost
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.reporting.pareto import KEPT_SHARE, Front, FrontPoint
from orchestrator.workspace.errors import UserError

PickRuleName = Literal["keep", "budget", "knee", "best", "cheapest"]


@dataclass(frozen=True, kw_only=True)
class PickRule:
    """How to pick_from_front.

    Raises:
        UserError: A number that no model can meet.
    """

    name: PickRuleName
    """Which of the rules."""
    share: float = KEPT_SHARE
    """For `keep`: share of the full model's quality, 0.99 for 99%."""
    confidence: float = 0.0
    """For `keep`: in which share of the draws of the items it must be kept."""
    budget: float = 0.0
    """For `budget`: the cost, in the unit of the front's cost axis."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 2.0:
            raise UserError(
                f"--keep takes a share of the full model's quality, such as 0.99; got {self.share}"
            )
        if not 0.0 <= self.confidence < 1.0:
            raise UserError(f"--confidence takes a share of draws below 1; got {self.confidence}")

    @property
    def alias(self) -> str:
        """What a registered model's version is called that was chosen so."""
        if self.name == "keep":
            sure = f"-sure-{100 * self.confidence:.4g}" if self.confidence else ""
            return f"keep-{100 * self.share:.4g}{sure}".replace(".", "_")
        if self.name == "budget":
            return f"budget-{self.budget:.6g}".replace(".", "_").replace("+", "")
        return self.name


def pick_from_front(front: Front, rule: PickRule) -> FrontPoint:
    """Return the model of a front that a rule names.

    Args:
        front: Its confidences relate to the rule's share.
        rule: How to pick_from_front.

    Raises:
        UserError: If no model meets the rule; says which comes nearest.
    """
    if not front.members:
        raise UserError("no trial of this sweep has been measured on both axes yet")
    if rule.name == "keep":
        return _keeping(front, rule)
    if rule.name == "budget":
        within = [point for point in front.members if point.cost <= rule.budget]
        if not within:
            least = min(point.cost for point in front.members)
            raise UserError(f"no model costs {rule.budget:g} or less; the cheapest costs {least:g}")
        return max(within, key=lambda point: (front.goodness(point), -point.cost))
    found = {"knee": front.knee, "best": front.best, "cheapest": front.cheapest}[rule.name]
    if found is None:
        raise UserError("this front has no knee: no model lies above the line from end to end")
    return found


def _keeping(front: Front, rule: PickRule) -> FrontPoint:
    if not rule.confidence:
        kept = front.cheapest_keeping(rule.share)
        if kept is None:
            best = front.best
            assert best is not None
            raise UserError(
                f"no model keeps {rule.share:.4g} of the full model's quality; the best keeps "
                f"{front.share(best):.4g}"
            )
        return kept
    # Off the front too: a model that the items put behind by a hair may be the surest there is.
    candidates = [point for point in front.points if point.is_candidate]
    sure = [
        point
        for point in candidates
        if point is front.full
        or (point.confidence is not None and (point.confidence.keeps or 0.0) >= rule.confidence)
    ]
    return min(sure, key=lambda point: (point.cost, -front.goodness(point)))
