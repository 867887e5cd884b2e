"""Confidence of a front: the place of each model when the items are drawn again.

Costs are exact, so only quality is uncertain. The draws cover the seeds of models that were trained
with several; they do not cover other trainings of the rest, nor other texts to take items from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.bootstrap import NUM_RESAMPLES, Interval, Scores, front_shares
from orchestrator.reporting.front_text import full_name
from orchestrator.reporting.paired_bootstrap import match_items, resample_scores
from orchestrator.reporting.pareto import (
    KEPT_SHARE,
    Confidence,
    ConfidenceBasis,
    Front,
    FrontPoint,
    PairedComparison,
)

KEEPS_METRIC = f"paired/confidence_keeps_{100 * KEPT_SHARE:.0f}"
ON_FRONT_METRIC = "paired/confidence_on_front"
SHARE_METRIC = "paired/share_of_full"
SUMMARY_METRICS = (SHARE_METRIC, KEEPS_METRIC, ON_FRONT_METRIC)
"""Numbers that a model's run has as metrics; its differences to others are rows of a table."""


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
    points = [point for point in front.shown if point.result.key in evaluations]
    seeds = {p.result.key: evaluations[p.result.key] for p in points}
    matched = match_items(
        {key: [e] if isinstance(e, EvaluationResult) else e for key, e in seeds.items()}
    )
    full = front.full
    if matched is None or full is None or len(points) < 2:
        return front
    draws = resample_scores(matched, num_resamples=num_resamples, seed=seed)
    basis = ConfidenceBasis(
        full_name(front, full),
        matched.metrics,
        num_items=matched.num_items,
        num_left_out=matched.num_left_out,
        num_resamples=num_resamples,
    )
    quality = draws.quality(front.axes.quality)
    estimator = _ConfidenceEstimator(front, points, draws.tasks, quality, kept_share)
    found = {point.result.key: estimator.confidence(n) for n, point in enumerate(points)}
    placed = (replace(p, confidence=found.get(p.result.key)) for p in front.points)
    return replace(front, points=tuple(placed), basis=basis)


def confidence_metrics(point: FrontPoint) -> dict[str, float]:
    """Return a point's confidence as flat metrics under `paired/`.

    `paired/vs_OTHER` with `_low` and `_high` is the difference on the front's quality,
    `paired/TASK/vs_OTHER` that on a task; `paired/share_of_full` relates to the full model.
    """
    confidence = point.confidence
    if confidence is None:
        return {}
    metrics: dict[str, float] = {}
    tasks = ((f"{name}/", comparison) for name, comparison in confidence.tasks.items())
    for prefix, comparison in [("", confidence.overall), *tasks]:
        if comparison is not None:
            for other, difference in comparison.against.items():
                metrics |= _interval_metrics(difference_metric(other, prefix), difference)
    if confidence.share is not None:
        metrics |= _interval_metrics(SHARE_METRIC, confidence.share)
    if confidence.keeps is not None:
        metrics[KEEPS_METRIC] = confidence.keeps
    if confidence.on_front is not None:
        metrics[ON_FRONT_METRIC] = confidence.on_front
    return metrics


def interval_rows(front: Front) -> list[dict[str, str | float]]:
    """Return one row for each difference of two models, on the front's quality and each task."""
    rows: list[dict[str, str | float]] = []
    for point in front.points:
        if point.confidence is None:
            continue
        overall = {front.axes.quality: point.confidence.overall}
        for measured, comparison in {**overall, **point.confidence.tasks}.items():
            for other, interval in comparison.against.items() if comparison else ():
                rows.append(
                    {
                        "model": full_name(front, point),
                        "against": other,
                        "measured": measured,
                        "difference": interval.value,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    return rows


def difference_metric(other: str, prefix: str = "") -> str:
    """Return the tracked name of the difference to a model; MLflow takes no spaces or signs."""
    return f"paired/{prefix}vs_{re.sub('[^0-9A-Za-z]+', '_', other).strip('_')}"


def _interval_metrics(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


@dataclass
class _ConfidenceEstimator:
    """Computes confidences from the draws; models go by their number among the points."""

    front: Front
    points: Sequence[FrontPoint]
    tasks: Mapping[str, Scores]
    quality: Scores | None
    kept_share: float

    def __post_init__(self) -> None:
        full = self.front.full
        self.full = next((n for n, point in enumerate(self.points) if point is full), None)
        others = [n for n, p in enumerate(self.points) if n == self.full or p.is_baseline]
        others.sort(key=lambda n: n != self.full)  # the full model first
        self.others = {full_name(self.front, self.points[n]): n for n in others}
        self.on_front = self._on_front()

    def confidence(self, number: int) -> Confidence:
        share, keeps = self._share(number)
        return Confidence(
            overall=None if self.quality is None else self._compare(self.quality, number),
            tasks={name: self._compare(scores, number) for name, scores in self.tasks.items()},
            share=share,
            keeps=keeps,
            on_front=self.on_front.get(number),
        )

    def _compare(self, scores: Scores, number: int) -> PairedComparison:
        others = {name: other for name, other in self.others.items() if other != number}
        against = {name: scores.difference(number, other) for name, other in others.items()}
        return PairedComparison(scores.interval(number), against)

    def _share(self, number: int) -> tuple[Interval | None, float | None]:
        if self.quality is None or self.full is None:
            return None, None
        # For a loss, the full model's over this one's, as in `Front.share`.
        pair = (number, self.full)
        ratio = self.quality.ratio(*(pair if self.front.axes.higher_is_better else pair[::-1]))
        if ratio is None:
            return None, None
        share, drawn = ratio
        return share, float((drawn >= self.kept_share).mean())

    def _on_front(self) -> dict[int, float]:
        candidates = [number for number, point in enumerate(self.points) if point.is_candidate]
        num_candidates = sum(point.is_candidate for point in self.front.shown)
        if self.quality is None or not candidates or len(candidates) < num_candidates:
            return {}  # A candidate without draws could beat the others.
        drawn = self.quality.drawn[:, candidates]
        costs = np.array([self.points[number].cost for number in candidates])
        shares = front_shares(costs, drawn if self.front.axes.higher_is_better else -drawn)
        return dict(zip(candidates, map(float, shares), strict=True))
