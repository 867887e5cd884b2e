"""What a front says, in sentences: what to take, what it costs, and whether it beats the baselines.

The sentences claim no more than the numbers carry. There is one rule for all differences: one is
called better or worse where the 95% interval of their difference does not hold zero. Where models
answered the same items, the interval is that of the draws, and each claim has its confidence. Where
values of single items are missing, it is 1.96 standard errors of separate measurements, which are
larger: the sentences err on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from orchestrator.reporting.bootstrap import INTERVAL_LEVEL
from orchestrator.reporting.front_axes import is_accuracy, metric_title
from orchestrator.reporting.front_text import confidence_text, cost_text, full_name, quality_text
from orchestrator.reporting.pareto import KEPT_SHARE, Front, FrontPoint
from orchestrator.terminal.formatting import join_names

COST_NOUNS = {
    "cost/evaluations": "evaluations",
    "cost/relative_evaluations": "evaluations",
    "cost/flops_per_token": "FLOPs",
    "cost/relative_flops": "FLOPs",
    "cost/kv_bytes_per_token": "key/value cache",
    "cost/decode_ms_per_token": "decoding time",
}
_KEPT = f"{KEPT_SHARE:.0%} of the full model's quality"
SURE = 0.95
"""The confidence from which on a model is called a safe choice."""


def findings(front: Front) -> list[str]:
    """Return what the front says, the most useful sentence first."""
    full = front.full
    if full is None:
        return ["No trial has been measured on both axes yet."]
    kept = front.cheapest_keeping(KEPT_SHARE)
    if kept is full:
        kept = None
    sentences = _about_keeping(front, kept)
    if front.knee is not None and front.knee is not kept:
        sentences.append(f"Knee: {describe_point(front, front.knee)}.")
    if front.best is not None and front.best not in (kept, front.knee, full):
        sentences.append(f"Best: {describe_point(front, front.best)}.")
    choice = kept or full
    baselines = [point for point in front.points if point.is_baseline and point is not choice]
    sentences += [_against(front, baseline, choice) for baseline in baselines]
    if front.unmeasured:
        names = join_names([result.name for result in front.unmeasured])
        sentences.append(f"Not on the picture, for lack of a measurement: {names}.")
    return [*sentences, *_about_basis(front)]


def _about_keeping(front: Front, kept: FrontPoint | None) -> list[str]:
    """Say which cheaper model keeps the quality, how surely, and which one does so surely."""
    likely = {
        point.result.key: point.confidence.keeps
        for point in front.points
        if point.is_candidate and point.confidence and point.confidence.keeps is not None
    }
    full = front.full
    assert full is not None, "only a front with a model has sentences"
    cheaper = [p for p in front.points if p.result.key in likely and p.cost < full.cost]
    if kept is not None:
        sentences = [f"Cheapest that keeps {_KEPT}: {describe_point(front, kept)}."]
    else:
        sentences = [f"No model that is cheaper than the full one keeps {_KEPT}."]
        likeliest = max(cheaper, key=lambda point: likely[point.result.key], default=None)
        if likeliest is not None:
            sentences.append(f"Likeliest to keep it: {describe_point(front, likeliest)}.")
    if likely and not (kept is not None and likely.get(kept.result.key, 0.0) >= SURE):
        safe = [point for point in cheaper if likely[point.result.key] >= SURE]
        if safe:
            choice = min(safe, key=lambda point: point.cost)
            sentences.append(f"Cheapest that surely keeps it: {describe_point(front, choice)}.")
        elif kept is not None:
            sentences.append(
                f"No model that is cheaper than the full one keeps {_KEPT} with a "
                f"confidence of {SURE} or more."
            )
    return sentences


def _about_basis(front: Front) -> list[str]:
    basis = front.basis
    if basis is None or not any(p.confidence and p.confidence.overall for p in front.points):
        return []
    left_out = f"; {basis.num_left_out:,} that only some answered are left out"
    with_seeds = any(point.result.train.get("seeds", 1) > 1 for point in front.points)
    seeds = (
        "It covers the seeds of models that have several, and no"
        if with_seeds
        else "It does not cover"
    )
    return [
        f"A confidence is the share of {basis.num_resamples:,} draws, with replacement, of the "
        f"{basis.num_items:,} items that all models answered in which the claim holds"
        f"{left_out if basis.num_left_out else ''}. {seeds} other trainings."
    ]


def describe_point(front: Front, point: FrontPoint, *, kept_share: float = KEPT_SHARE) -> str:
    """Return one clause on a model: what it is, how good, at what cost, how surely.

    Args:
        front: Where it stands.
        point: The model.
        kept_share: The share that the confidences of the front relate to.
    """
    full = front.full
    share = front.share(point)
    text = f"{full_name(front, point)} with {_quality(front, point)}"
    if full is not None and share is not None and full.cost:
        part = f"{cost_text(point.cost)} of {cost_text(full.cost)}"
        noun = COST_NOUNS.get(front.axes.cost, metric_title(front.axes.cost))
        text += (
            f", {share:.1%} of the full model's, at {point.cost / full.cost:.0%} of its {noun} "
            f"({part})"
        )
    return text + _how_sure(front, point, kept_share)


def _how_sure(front: Front, point: FrontPoint, kept_share: float) -> str:
    sure = point.confidence
    if sure is None or point is front.full:
        return ""
    claims = []
    if sure.keeps is not None:
        claims.append(
            f"keeps {100 * kept_share:.4g}% with confidence {confidence_text(sure.keeps)}"
        )
    if sure.on_front is not None:
        claims.append(f"is on the front with confidence {confidence_text(sure.on_front)}")
    return f"; it {' and '.join(claims)}" if claims else ""


def _against(front: Front, baseline: FrontPoint, choice: FrontPoint) -> str:
    better, size, is_told = _difference(front, baseline, choice)
    rival = full_name(front, choice)
    if not is_told:
        said = f"and {rival} differ by less than these items can tell ({size})"
    elif better > 0:
        said = f"is worse than {rival} by {size}"
    else:
        said = f"is better than {rival} by {size}"
    beaten = front.members_beaten_by(baseline)
    also = f"; it beats {_names(front, beaten)} on the front" if beaten else ""
    return f"{full_name(front, baseline)} ({_quality(front, baseline)}) {said}{also}."


def _difference(front: Front, baseline: FrontPoint, choice: FrontPoint) -> tuple[float, str, bool]:
    """Return how much better the choice is, that as text with its error, and whether it is told
    apart from nothing.
    """
    scale, unit = (100, " points") if is_accuracy(front.axes.quality) else (1, "")
    sign = 1 if front.axes.higher_is_better else -1
    sure = choice.confidence
    paired = sure.overall.against.get(full_name(front, baseline)) if sure and sure.overall else None
    if paired is not None:
        bounds = sorted(sign * scale * bound for bound in (paired.low, paired.high))
        better = sign * paired.value
        if better < 0:
            bounds = [-bound for bound in reversed(bounds)]
        digits = 1 if unit else 3
        value = f"{abs(scale * better):.{digits}f}{unit}"
        limits = (
            f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f} in {INTERVAL_LEVEL:.0%} of the draws"
        )
        return better, f"{value}, {limits}", paired.excludes_zero
    better = front.goodness(choice) - front.goodness(baseline)
    error = math.hypot(choice.error or 0.0, baseline.error or 0.0)
    size = f"{abs(scale * better):.2g}{unit}"
    if not error:
        return better, size, better != 0
    reach = NormalDist().inv_cdf((1 + INTERVAL_LEVEL) / 2) * error
    low, high = (scale * (abs(better) + side * reach) for side in (-1, 1))
    size += f", {low:.2g} to {high:.2g} at {INTERVAL_LEVEL:.0%}, unpaired"
    return better, size, abs(better) > reach


def _quality(front: Front, point: FrontPoint) -> str:
    name = metric_title(front.axes.quality).lower()
    percent = " %" if is_accuracy(front.axes.quality) else ""
    return f"{name} {quality_text(front, point)}{percent}"


def _names(front: Front, points: Sequence[FrontPoint]) -> str:
    return join_names([full_name(front, point) for point in points])
