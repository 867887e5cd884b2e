"""Confidence of a front: the place of each model when the items are drawn again.

Costs are exact, so only quality is uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.front_tables import full_name
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.statistics import (
    KEPT_SHARE,
    NUM_RESAMPLES,
    Confidence,
    ConfidenceBasis,
    PairedComparison,
    Scores,
    front_shares,
    pair_scores,
)


def with_confidence(
    front: Front,
    evaluations: Mapping[str, EvaluationResult | Sequence[EvaluationResult]],
    *,
    kept_share: float = KEPT_SHARE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Front:
    """Return the front with the confidence of each place.

    Without two models that answered the same items, return the front as it is. Models that
    `Front.shown` leaves out get no confidence, and are not drawn against the others.

    Args:
        front: Placed results.
        evaluations: Key of a result -> its evaluations, one for each seed. Results without
            evaluations get no confidence.
        kept_share: The share of the full model's quality that `Confidence.keeps` is about.
        num_resamples: Number of draws.
        seed: Random seed of the draws.
    """
    shown, full = front.shown, front.full
    seeds = {p.result.key: evaluations.get(p.result.key, ()) for p in shown}
    known = {
        key: [found] if isinstance(found, EvaluationResult) else found
        for key, found in seeds.items()
        if found
    }
    if full is None or len(known) < 2:
        return front
    paired = pair_scores(known, num_resamples=num_resamples, seed=seed)
    if paired is None:
        return front
    scores, higher_is_better = paired.quality(front.axes.quality), front.axes.higher_is_better
    number_of = {key: number for number, key in enumerate(known)}
    others = sorted((p for p in shown if p is full or p.is_baseline), key=lambda p: p is not full)
    compared_with = {
        full_name(front, point): number_of[point.result.key]
        for point in others
        if point.result.key in number_of
    }

    # Without draws of all candidates none is sure to be on the front: the others could beat it.
    on_front: dict[str, float] = {}
    costs = {point.result.key: point.cost for point in shown if point.is_candidate}
    if scores is not None and costs and costs.keys() <= known.keys():
        drawn = scores.drawn[:, [number_of[key] for key in costs]]
        goodness = drawn if higher_is_better else -drawn
        shares = front_shares(np.array(list(costs.values())), goodness)
        on_front = dict(zip(costs, map(float, shares), strict=True))

    def compare(scores: Scores, number: int) -> PairedComparison:
        against = {n: scores.difference(number, o) for n, o in compared_with.items() if o != number}
        return PairedComparison(scores.interval(number), against)

    found: dict[str, Confidence] = {}
    for key, number in number_of.items():
        share = keeps = None
        if scores is not None and full.result.key in number_of:
            # For a loss, the full model's over this one's, as in `Front.share`.
            pair = (number, number_of[full.result.key])
            if ratio := scores.ratio(*(pair if higher_is_better else pair[::-1])):
                share, keeps = ratio[0], float((ratio[1] >= kept_share).mean())
        found[key] = Confidence(
            overall=None if scores is None else compare(scores, number),
            tasks={name: compare(of_task, number) for name, of_task in paired.scores.items()},
            share=share,
            keeps=keeps,
            on_front=on_front.get(key),
        )
    basis = ConfidenceBasis(
        full_name(front, full),
        paired.metrics,
        num_items=paired.num_items,
        num_left_out=sum(paired.left_out.values()),
        num_resamples=num_resamples,
    )
    placed = (replace(p, confidence=found.get(p.result.key)) for p in front.points)
    return replace(front, points=tuple(placed), basis=basis)


def interval_rows(front: Front) -> list[dict[str, str | float]]:
    """Return one row for each difference of two models, on the front's quality and each task."""
    return [
        {
            "model": full_name(front, point),
            "against": other,
            "measured": measured,
            "difference": interval.value,
            "low": interval.low,
            "high": interval.high,
        }
        for point in front.points
        if point.confidence is not None
        for measured, comparison in (
            (front.axes.quality, point.confidence.overall),
            *point.confidence.tasks.items(),
        )
        if comparison is not None
        for other, interval in comparison.against.items()
    ]
