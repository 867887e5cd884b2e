"""Which model of a sweep to take: rules that pick one of a front, and drafts of its full models.

keep      the cheapest that keeps a share of the full model's quality, optionally with a confidence
budget    the best within a cost
knee      the member farthest above the chord from the cheapest to the best
best      the member of highest quality
cheapest  the member of lowest cost
draft     the one that speeds up the exact output of a full model most

A trial drafts for the costliest schedule of its own weights. One whose weights have no costlier
schedule in the sweep, such as a distilled student, drafts for the teacher. Acceptance and speed are
measured by `sweeping`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.records.trial import Trial
from orchestrator.reporting.front import Front, Row
from orchestrator.reporting.statistics import KEPT_SHARE
from orchestrator.terminal.render import join_names
from orchestrator.workspace.errors import UserError

COST, SPEED_UP = "cost/evaluations", "decoding/speed_up"
PickRuleName = Literal["keep", "budget", "knee", "best", "cheapest", "draft"]


@dataclass(frozen=True, kw_only=True)
class PickRule:
    """Rule by which one model of a front is picked.

    Raises:
        UserError: If no model can meet a number.
    """

    name: PickRuleName
    share: float = KEPT_SHARE
    """For `keep`: share of the full model's quality, 0.99 for 99%."""
    confidence: float = 0.0
    """For `keep`: smallest share of the draws in which the quality is kept."""
    budget: float = 0.0
    """For `budget`: highest cost, in the unit of the front's cost axis."""
    model: str = ""
    """For `draft`: name of the full model."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 2.0:
            raise UserError(
                f"--keep takes a share of the full model's quality, such as 0.99; got {self.share}"
            )
        if not 0.0 <= self.confidence < 1.0:
            raise UserError(f"--confidence takes a share of draws below 1; got {self.confidence}")

    @property
    def alias(self) -> str:
        """Alias in the model registry of the version that this rule picks."""
        if self.name == "keep":
            confidence = f"-sure-{100 * self.confidence:.4g}" if self.confidence else ""
            return f"keep-{100 * self.share:.4g}{confidence}".replace(".", "_")
        if self.name == "budget":
            return f"budget-{self.budget:.6g}".replace(".", "_").replace("+", "")
        return self.name


def pick_from_front(front: Front, rule: PickRule) -> Row:
    """Return the model of a front that a rule picks; confidences must relate to the rule's share.

    Raises:
        UserError: If no model meets the rule; the message names the nearest.
    """
    if rule.name == "draft":
        draft = pick_draft(front.trials, rule.model)
        return next(row for row in front.rows if row["key"] == draft.key)
    if not front.members:
        raise UserError(f"no trial of this sweep has been measured in {front.axes.in_words} yet")
    if rule.name == "budget":
        affordable = [row for row in front.members if row["cost"] <= rule.budget]
        if not affordable:
            least = min(row["cost"] for row in front.members)
            raise UserError(f"no model costs {rule.budget:g} or less; the cheapest costs {least:g}")
        return max(affordable, key=lambda row: (row["goodness"], -row["cost"]))
    if rule.name == "keep" and rule.confidence:
        # Candidates off the front count too: one dominated by a hair may be the most certain.
        confident = [
            row
            for row in front.rows
            if row["is_candidate"]
            and (row is front.full or (front.keeps(row) or 0.0) >= rule.confidence)
        ]
        return min(confident, key=lambda row: (row["cost"], -row["goodness"]))
    if rule.name == "keep":
        picked = front.cheapest_keeping(rule.share)
        best = front.share(front.picks["best"]) or 0.0
        problem = (
            f"no model keeps {rule.share:.4g} of the full model's quality; "
            f"the best keeps {best:.4g}"
        )
    else:
        picked = front.picks.get(rule.name)
        problem = (
            "this front has no knee: no model lies above the line from the cheapest to the best"
        )
    if picked is None:
        raise UserError(problem)
    return picked


def draft_targets(results: Sequence[Trial]) -> dict[str, Trial]:
    """Return key of a trial -> the full model that it drafts for; costs must be known.

    Baselines and the full models themselves draft for none.
    """
    teacher = next((result for result in results if result.role == "teacher"), None)
    costliest: dict[str, Trial] = {}
    for result in results:
        if result.checkpoint and result.role != "baseline":
            most = costliest.setdefault(result.checkpoint, result)
            if result.numbers[COST] > most.numbers[COST]:
                costliest[result.checkpoint] = result
    targets = {}
    for result in results:
        if result.role == "trial" and result.checkpoint:
            for target in (costliest[result.checkpoint], teacher):
                if target and result.numbers[COST] < target.numbers[COST]:
                    targets[result.key] = target
                    break
    return targets


def best_drafts(results: Sequence[Trial]) -> dict[str, Trial]:
    """Return name of a full model -> its fastest measured draft."""
    best: dict[str, Trial] = {}
    if not any(SPEED_UP in result.numbers for result in results):
        return best
    targets = draft_targets(results)
    for result in results:
        if result.key in targets and SPEED_UP in result.numbers:
            fastest = best.setdefault(targets[result.key].name, result)
            if result.numbers[SPEED_UP] > fastest.numbers[SPEED_UP]:
                best[targets[result.key].name] = result
    return best


def pick_draft(results: Sequence[Trial], model: str) -> Trial:
    """Return the trial that speeds up a full model most.

    Raises:
        UserError: If there is no such full model, its drafts were not measured, or none is faster
            than plain decoding.
    """
    best = best_drafts(results)
    if not best:
        raise UserError(
            "this sweep has no measured drafts; they are measured for text, at the end of a sweep "
            "with several schedules if sweep.measure_drafts is true; the same sweep again adds them"
        )
    if model not in best:
        raise UserError(
            f"--draft-for: no draft of {model!r} was measured; say {join_names([*best])}"
        )
    draft = best[model]
    if draft.numbers[SPEED_UP] <= 1.0:
        raise UserError(
            f"no draft speeds up {model}: with the best one, {draft.name}, its output takes "
            f"{1 / draft.numbers[SPEED_UP]:.2f} times as long as without"
        )
    return draft


def draft_sentences(results: Sequence[Trial]) -> list[str]:
    """Return a sentence on the best draft of each full model; none without measured ones."""
    clauses = [draft_sentence(draft, full) for full, draft in best_drafts(results).items()]
    return [f"{clause[0].upper()}{clause[1:]}." for clause in clauses]


def draft_sentence(draft: Trial, full: str) -> str:
    """Return a clause on a measured draft of the full model of this name."""
    numbers = draft.numbers
    accepted = numbers["decoding/acceptance"]
    name = f"{draft.name} as its draft ({accepted:.0%} of the drafted tokens kept)"
    if numbers[SPEED_UP] <= 1.0:
        return f"no draft speeds up the exact output of {full}; the best is {name}"
    return (
        f"the exact output of {full} takes {numbers['decoding/exact_ms_per_token']:.2f} ms a token "
        f"with {name}, plain decoding {numbers[SPEED_UP]:.2f} times as long"
    )
