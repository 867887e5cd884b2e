"""Which model of a sweep to draft with: acceptance and speed are measured by `sweeping`.

A trial drafts for the costliest schedule of its own weights. One whose weights have no costlier
schedule in the sweep, such as a distilled student, drafts for the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.records.trial import Trial
from orchestrator.terminal.render import join_names
from orchestrator.workspace.errors import UserError

COST, SPEED_UP = "cost/evaluations", "decoding/speed_up"


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
            "with several schedules, unless sweep.measure_drafts is false"
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
