"""Confidence of a front: the place of each model when the items are drawn again.

Costs are exact, so only quality is uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.front_text import full_name
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.statistics import (
    KEPT_SHARE,
    NUM_RESAMPLES,
    ConfidenceBasis,
    confidences,
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
    others = sorted((p for p in shown if p is full or p.is_baseline), key=lambda p: p is not full)
    found = confidences(
        paired,
        list(known),
        front.axes.quality,
        higher_is_better=front.axes.higher_is_better,
        compared_with={p.result.key: full_name(front, p) for p in others},
        full=full.result.key,
        costs={p.result.key: p.cost for p in shown if p.is_candidate},
        kept_share=kept_share,
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
