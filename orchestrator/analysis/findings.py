"""What a front says, in sentences: what to take, what it costs, and whether it beats the baselines.

The sentences claim no more than the numbers carry: a difference smaller than the standard error of
the difference is called one that this many items cannot tell. The errors are those of separate
measurements; over the same items the true error of a difference is smaller, so the sentences err
on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.analysis.pareto import Front, Placed
from orchestrator.analysis.style import is_accuracy, title_of
from orchestrator.analysis.tables import model_name, quality_text

COST_NOUNS = {
    "cost/evaluations": "evaluations",
    "cost/relative_evaluations": "evaluations",
    "cost/flops_per_token": "FLOPs",
    "cost/relative_flops": "FLOPs",
    "cost/kv_bytes_per_token": "key/value cache",
    "cost/decode_ms_per_token": "decoding time",
}
KEPT_SHARE = 0.99
"""The share of the full model's quality that `cheapest that keeps` asks for."""


def findings(front: Front, *, kept_share: float = KEPT_SHARE) -> list[str]:
    """Return what the front says, the most useful sentence first.

    Args:
        front: Placed results.
        kept_share: Share of the full model's quality that is worth calling kept.
    """
    full = front.full
    if full is None:
        return ["No trial has been measured on both axes yet."]
    sentences = []
    kept = front.cheapest_keeping(kept_share)
    if kept is not None and kept is not full:
        sentences.append(f"Cheapest that keeps {kept_share:.0%}: {_describe(front, kept)}.")
    else:
        sentences.append(f"No cheaper model keeps {kept_share:.0%} of the full model's quality.")
    if front.knee is not None and front.knee is not kept:
        sentences.append(f"Knee: {_describe(front, front.knee)}.")
    if front.best is not None and front.best not in (kept, front.knee, full):
        sentences.append(f"Best: {_describe(front, front.best)}.")
    sentences += [_against(front, p, kept or full) for p in front.placed if not p.is_candidate]
    if front.unplaced:
        names = ", ".join(result.name for result in front.unplaced)
        sentences.append(f"Not on the picture, for lack of a measurement: {names}.")
    return sentences


def picks(front: Front) -> dict[str, Placed]:
    """Return the named choices that the front offers: knee, best, cheapest; those that exist."""
    found = {"knee": front.knee, "best": front.best, "cheapest": front.cheapest}
    return {name: point for name, point in found.items() if point is not None}


def front_metrics(front: Front) -> dict[str, float]:
    """Return the numbers of a sweep's run: hypervolume with its box, sizes, the picks' numbers."""
    values: dict[str, float | None] = {
        "front/hypervolume": front.hypervolume,
        "front/size": len(front.members),
        "front/num_results": len(front.placed) + len(front.unplaced),
    }
    box = front.box
    if box is not None:
        values["front/reference_cost"] = box.cost
        values["front/reference_quality"] = box.quality
    kept = front.cheapest_keeping(KEPT_SHARE)
    choices = {**picks(front), **({"keeping_99": kept} if kept else {})}
    for name, point in choices.items():
        values[f"front/{name}_cost"] = point.cost
        values[f"front/{name}_quality"] = point.quality
        values[f"front/{name}_share_of_full"] = front.share(point)
    return {name: float(value) for name, value in values.items() if value is not None}


def _describe(front: Front, point: Placed) -> str:
    full = front.full
    share = front.share(point)
    text = f"{model_name(point)} with {_quality(front, point)}"
    if full is None or share is None or not full.cost:
        return text
    part = f"{point.cost:.4g} of {full.cost:.4g}"
    noun = COST_NOUNS.get(front.axes.cost, title_of(front.axes.cost))
    return (
        f"{text}, {share:.1%} of the full model's, at {point.cost / full.cost:.0%} of its {noun} "
        f"({part})"
    )


def _against(front: Front, reference: Placed, choice: Placed) -> str:
    better = front.goodness(choice) - front.goodness(reference)
    error = math.hypot(choice.error or 0.0, reference.error or 0.0)
    name, rival = reference.result.name, model_name(choice)
    scale, unit = (100, " points") if is_accuracy(front.axes.quality) else (1, "")
    size = f"{abs(scale * better):.2g}{unit}"
    size += f" ± {scale * error:.2g}" if error else ""
    if abs(better) <= error:
        said = f"and {rival} differ by less than these items can tell ({size})"
    elif better > 0:
        said = f"is worse than {rival} by {size}"
    else:
        said = f"is better than {rival} by {size}"
    beaten = front.beaten_by(reference)
    also = f"; it beats {_names(beaten)} on the front" if beaten else ""
    return f"{name} ({_quality(front, reference)}) {said}{also}."


def _quality(front: Front, point: Placed) -> str:
    name = title_of(front.axes.quality).lower()
    percent = " %" if is_accuracy(front.axes.quality) else ""
    return f"{name} {quality_text(front, point)}{percent}"


def _names(points: Sequence[Placed]) -> str:
    return ", ".join(model_name(point) for point in points)
