"""Findings of a front in sentences: which model to take, its cost, and whether it beats baselines.

A model is called better or worse only where the 95% interval of the difference excludes zero. The
interval is that of the draws; without values of single items it is 1.96 standard errors of separate
measurements, which is wider, so the sentences err on the careful side.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from orchestrator.reporting.front_axes import is_accuracy, metric_title
from orchestrator.reporting.front_tables import confidence_text, cost_text, full_name, quality_text
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.reporting.pick_rules import draft_sentences
from orchestrator.reporting.statistics import INTERVAL_LEVEL, KEPT_SHARE
from orchestrator.terminal.render import join_names

COST_NOUNS = {
    "cost/evaluations": "NFE",
    "cost/relative_evaluations": "NFE",
    "cost/flops_per_token": "FLOPs",
    "cost/relative_flops": "FLOPs",
    "cost/kv_bytes_per_token": "key/value cache",
    "cost/decode_ms_per_token": "decoding time",
}
_KEPT = f"{KEPT_SHARE:.0%} of the full model's quality"
HIGH_CONFIDENCE = 0.95


def findings(front: Front) -> list[str]:
    """Return what the front says, the most useful sentence first."""
    full = front.full
    if full is None:
        return [f"No trial has been measured in {front.axes.in_words} yet."]
    kept = front.cheapest_keeping(KEPT_SHARE)
    if kept is full:
        kept = None
    sentences = _about_keeping(front, full, kept)
    if front.knee is not None and front.knee is not kept:
        sentences.append(f"The knee of the front is {describe_point(front, front.knee)}.")
    if front.best is not None and front.best not in (kept, front.knee, full):
        sentences.append(f"The best model is {describe_point(front, front.best)}.")
    choice = kept or full
    baselines = [point for point in front.points if point.is_baseline and point is not choice]
    for baseline in baselines:
        peer = _peer(front, baseline)
        sentences.append(
            _comparison(front, baseline, peer, ", the schedule of the nearest cost,")
            if peer
            else _comparison(front, baseline, choice)
        )
    sentences += _about_random_start(front)
    sentences += draft_sentences(front.results)
    if front.unmeasured:
        names = join_names([result.name for result in front.unmeasured])
        sentences.append(f"Models that lack a measurement are not on the front: {names}.")
    return [*sentences, *_about_confidence(front)]


def describe_point(front: Front, point: FrontPoint, *, kept_share: float = KEPT_SHARE) -> str:
    """Return one clause on a model: its name, quality, cost and confidence.

    `kept_share` is the share that the confidences of the front relate to.
    """
    full, share = front.full, front.share(point)
    text = f"{full_name(front, point)} with {_quality(front, point)}"
    if full is not None and share is not None and full.cost:
        noun = COST_NOUNS.get(front.axes.cost, metric_title(front.axes.cost))
        text += (
            f", {share:.1%} of the full model's, at {point.cost / full.cost:.0%} of its {noun} "
            f"({cost_text(point.cost)} of {cost_text(full.cost)})"
        )
    confidence = point.confidence
    if confidence is None or point is full:
        return text
    claims = {
        f"keeps {100 * kept_share:.4g}%": confidence.keeps,
        "is on the front": confidence.on_front,
    }
    certain = [
        f"{claim} with confidence {confidence_text(number)}"
        for claim, number in claims.items()
        if number is not None
    ]
    return f"{text}; it {' and '.join(certain)}" if certain else text


def _about_keeping(front: Front, full: FrontPoint, kept: FrontPoint | None) -> list[str]:
    keeps = {
        point.result.key: point.confidence.keeps
        for point in front.points
        if point.is_candidate and point.confidence and point.confidence.keeps is not None
    }
    cheaper = [p for p in front.points if p.result.key in keeps and p.cost < full.cost]
    if kept is not None:
        sentences = [f"The cheapest model that keeps {_KEPT} is {describe_point(front, kept)}."]
    else:
        sentences = [f"No cheaper model keeps {_KEPT}."]
        likeliest = max(cheaper, key=lambda point: keeps[point.result.key], default=None)
        if likeliest is not None:
            likely = describe_point(front, likeliest)
            sentences.append(f"The model that most likely keeps it is {likely}.")
    if keeps and not (kept is not None and keeps.get(kept.result.key, 0.0) >= HIGH_CONFIDENCE):
        confident = [point for point in cheaper if keeps[point.result.key] >= HIGH_CONFIDENCE]
        at_least = f"with a confidence of {HIGH_CONFIDENCE} or more"
        if confident:
            cheapest = describe_point(front, min(confident, key=lambda point: point.cost))
            sentences.append(f"The cheapest model that keeps it {at_least} is {cheapest}.")
        elif kept is not None:
            sentences.append(f"No cheaper model keeps {_KEPT} {at_least}.")
    return sentences


def _about_confidence(front: Front) -> list[str]:
    basis = front.basis
    if basis is None or not any(p.confidence and p.confidence.overall for p in front.points):
        return []
    left_out = f"; {basis.num_left_out:,} items that only some answered are left out"
    covered = (
        "It covers the seeds of models that have several, but no other trainings."
        if any("train/seeds" in point.result.numbers for point in front.points)
        else "It does not cover other trainings."
    )
    return [
        f"A confidence is the share of {basis.num_resamples:,} draws in which the claim holds. "
        f"Each draw samples {basis.num_items:,} of the {basis.num_items:,} items that all models "
        f"answered, with replacement{left_out if basis.num_left_out else ''}. {covered}"
    ]


def _peer(front: Front, baseline: FrontPoint) -> FrontPoint | None:
    """Return the schedule of nearest cost to a distilled baseline, which is made to match it."""
    if not baseline.result.is_distilled_baseline:
        return None
    return min(
        (point for point in front.points if point.result.role == "trial"),
        key=lambda point: (abs(point.cost - baseline.cost), -front.goodness(point)),
        default=None,
    )


def _about_random_start(front: Front) -> list[str]:
    """Say on how many tokens distilled baselines trained that did not start from the teacher."""
    fresh = [
        result.numbers.get("train/tokens", 0)
        for result in (point.result for point in front.points)
        if result.is_distilled_baseline and result.job and not result.job.initial_folder
    ]
    if not fresh or front.full is None:
        return []
    seen = front.full.result.numbers.get("train/tokens")
    of_teacher = f"{seen:,.0f} tokens" if seen else "all tokens"
    return [
        f"The distilled vanilla models started from random weights and trained on "
        f"{max(fresh):,.0f} tokens; the students' weights also saw {of_teacher} of the teacher's "
        "training. sweep.distilled_vanilla_steps gives those models more steps."
    ]


def _comparison(front: Front, baseline: FrontPoint, choice: FrontPoint, about: str = "") -> str:
    """Compare a baseline with a model; `about` says more of the model."""
    better, size, is_significant = _difference(front, baseline, choice)
    other = full_name(front, choice) + about
    if not is_significant:
        claim = f"and {other} differ by less than these items can resolve ({size})"
    else:
        claim = f"is {'worse' if better > 0 else 'better'} than {other} by {size}"
    beaten = [full_name(front, point) for point in front.members_beaten_by(baseline)]
    also = f"; it beats {join_names(beaten)} on the front" if beaten else ""
    return f"{full_name(front, baseline)} ({_quality(front, baseline)}) {claim}{also}."


def _difference(front: Front, baseline: FrontPoint, choice: FrontPoint) -> tuple[float, str, bool]:
    """Return how much better the choice is, its text, and whether the interval excludes zero."""
    scale, unit = (100, " points") if is_accuracy(front.axes.quality) else (1, "")
    sign = 1 if front.axes.higher_is_better else -1
    overall = choice.confidence.overall if choice.confidence else None
    paired = overall.against.get(full_name(front, baseline)) if overall else None
    if paired is not None:
        better = sign * paired.value
        # The size is positive, so the interval of a worse choice is turned around.
        side = sign if better >= 0 else -sign
        low, high = sorted(side * scale * bound for bound in (paired.low, paired.high))
        digits = 1 if unit else 3
        size = (
            f"{abs(scale * better):.{digits}f}{unit}, {low:.{digits}f} to {high:.{digits}f} in "
            f"{INTERVAL_LEVEL:.0%} of the draws"
        )
        return better, size, paired.excludes_zero
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
    percent = "%" if is_accuracy(front.axes.quality) else ""
    return f"{name} {quality_text(front, point)}{percent}"
