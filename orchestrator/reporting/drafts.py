"""Which model of a sweep to draft with: acceptance and speed are measured by `sweeping`.

A trial drafts for the costliest schedule of its own weights. One whose weights have no costlier
schedule in the sweep, such as a distilled student, drafts for the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.records.trial import Trial
from orchestrator.terminal.render import join_names
from orchestrator.workspace.errors import UserError


def draft_targets(results: Sequence[Trial]) -> dict[str, Trial]:
    """Return key of a trial -> the full model that it drafts for; costs must be known.

    Baselines and the full models themselves draft for none.
    """
    teacher = next((result for result in results if result.role == "teacher"), None)
    costliest: dict[str, Trial] = {}
    for result in results:
        if result.checkpoint and result.role != "baseline":
            most = costliest.get(result.checkpoint)
            if most is None or _evaluations(result) > _evaluations(most):
                costliest[result.checkpoint] = result
    targets = {}
    for result in results:
        own = costliest.get(str(result.checkpoint))
        target = own if own and _evaluations(result) < _evaluations(own) else teacher
        is_draft = result.role == "trial" and result.checkpoint
        if target and is_draft and _evaluations(result) < _evaluations(target):
            targets[result.key] = target
    return targets


def best_drafts(results: Sequence[Trial]) -> dict[str, Trial]:
    """Return name of a full model -> its fastest measured draft."""
    targets = draft_targets(results)
    measured: dict[str, list[Trial]] = {}
    for result in results:
        if result.key in targets and result.decoding.speed_up is not None:
            measured.setdefault(targets[result.key].name, []).append(result)
    return {
        name: max(drafts, key=lambda draft: draft.decoding.speed_up or 0.0)
        for name, drafts in measured.items()
    }


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
    if (draft.decoding.speed_up or 0.0) <= 1.0:
        raise UserError(
            f"no draft speeds up {model}: with the best one, {draft.name}, its output takes "
            f"{1 / (draft.decoding.speed_up or 1.0):.2f} times as long as without"
        )
    return draft


def draft_sentences(results: Sequence[Trial]) -> list[str]:
    """Return a sentence on the best draft of each full model; none without measured ones."""
    found = []
    for name, best in best_drafts(results).items():
        text = draft_sentence(best, name)
        found.append(text[0].upper() + text[1:] + ".")
    return found


def draft_sentence(draft: Trial, full: str) -> str:
    """Return a clause on a measured draft of the full model of this name."""
    numbers = draft.decoding
    speed_up, accepted = numbers.speed_up or 0.0, numbers.acceptance or 0.0
    name = f"{draft.name} as its draft ({accepted:.0%} of the drafted tokens kept)"
    if speed_up <= 1.0:
        return f"no draft speeds up the exact output of {full}; the best is {name}"
    return (
        f"the exact output of {full} takes {numbers.exact_ms_per_token:.2f} ms a token with "
        f"{name}, plain decoding {speed_up:.2f} times as long"
    )


def _evaluations(trial: Trial) -> float:
    return float(trial.cost.evaluations or 0)
