"""Rules that pick a model of a front.

- `keep`: the cheapest that keeps a share of the full model's quality, if asked with a confidence;
  where the teacher gains nothing over r = 0, this is r = 0, if it keeps as much.
- `budget`: the best within a cost.
- `knee`: the member farthest above the chord from the cheapest to the best.
- `best`: the member of highest quality.
- `cheapest`: the member of lowest cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.reporting.findings import nothing_placed, plain_choice
from orchestrator.reporting.front import Front, PlacedModel
from orchestrator.reporting.statistics import DEMANDED_SHARE
from orchestrator.workspace.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PickRule:
    """Rule by which one model of a front is picked.

    Raises:
        UserError: If no model can meet a number.
    """

    name: str
    """`keep`, `budget`, `knee`, `best` or `cheapest`."""
    demanded_share: float = DEMANDED_SHARE
    """For `keep`: share of the full model's quality, 0.99 for 99%."""
    confidence: float = 0.0
    """For `keep`: how sure it must be that the quality is kept, corrected for the number of
    models."""
    budget: float = 0.0
    """For `budget`: highest cost, in the unit of the front's cost axis."""

    def __post_init__(self) -> None:
        if not 0 < self.demanded_share <= 2:
            raise UserError(
                "--keep takes a share of the full model's quality, such as 0.99; got "
                f"{self.demanded_share:g}"
            )
        if not 0 <= self.confidence < 1:
            raise UserError(
                f"--confidence takes a probability, from 0 to below 1; got {self.confidence:g}"
            )

    @property
    def alias(self) -> str:
        """Alias in the model registry of the version that this rule picks."""
        if self.name == "keep":
            confidence = f"-sure-{100 * self.confidence:.4g}" if self.confidence else ""
            return f"keep-{100 * self.demanded_share:.4g}{confidence}".replace(".", "_")
        if self.name == "budget":
            return f"budget-{self.budget:.6g}".replace(".", "_").replace("+", "")
        return self.name


def pick_rule(
    *, keep: float | None = None, confidence: float = 0.0, **other_rules: Any
) -> PickRule:
    """Return the rule that is given by the name of its option; `keep` when none is.

    Args:
        keep: Value of `--keep`.
        confidence: Value of `--confidence`.
        other_rules: Values of the other rules' options; None or False where one is not given.

    Raises:
        UserError: If several are given, a confidence with another rule than `keep`, or a number is
            no share.
    """
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep is a share of the quality, above 0 and up to 1; got {keep:g}")
    values = {"keep": keep, **other_rules}
    rules = {
        name: value for name, value in values.items() if value is not None and value is not False
    }
    if len(rules) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in rules)
        raise UserError(f"pick takes one rule; got {options}")
    name, value = next(iter(rules.items()), ("keep", DEMANDED_SHARE))
    if name == "keep":
        return PickRule(name=name, demanded_share=value, confidence=confidence)
    if confidence:
        raise UserError("--confidence can be used with --keep only")
    return PickRule(name=name, budget=float(value) if name == "budget" else 0.0)


def pick_from_front(front: Front, rule: PickRule) -> PlacedModel:
    """Return the model of a front that a rule picks; confidences must relate to the rule's share.

    Raises:
        UserError: If no model meets the rule; the message names the nearest.
    """
    if not front.members:
        raise UserError(nothing_placed(front))
    if rule.name == "budget":
        affordable = [model for model in front.members if model.cost <= rule.budget]
        if not affordable:
            least = front.picks["cheapest"].cost
            raise UserError(f"no model costs {rule.budget:g} or less; the cheapest costs {least:g}")
        return max(affordable, key=lambda model: (model.signed_quality, -model.cost))
    if rule.name == "keep" and (plain := plain_choice(front)) is not None:
        # A baseline, so it competes for no place on the front.
        keeps = (front.share_of_full(plain) or 0.0) >= rule.demanded_share
        if rule.confidence:
            keeps = (front.confidence_keeps(plain) or 0.0) >= rule.confidence
        if keeps:
            return plain
    if rule.name == "keep" and rule.confidence:
        # Candidates off the front count too: one dominated by a hair may be the most certain.
        confident = [
            model
            for model in front.placed
            if model.is_candidate
            and (model is front.full or (front.confidence_keeps(model) or 0.0) >= rule.confidence)
        ]
        return min(confident, key=lambda model: (model.cost, -model.signed_quality))
    problem = (
        "this front has no knee: no model lies above the line from cheapest to best; take "
        "--keep SHARE or --budget COST"
    )
    picked = front.picks.get(rule.name)
    if rule.name == "keep":
        picked = front.cheapest_keeping(rule.demanded_share)
        best = front.share_of_full(front.picks["best"]) or 0.0
        problem = (
            f"no model keeps {rule.demanded_share:.4g} of the full model's quality; "
            f"the best keeps {best:.4g}"
        )
    if picked is None:
        raise UserError(problem)
    return picked
