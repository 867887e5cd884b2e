"""How sure a front is: every place, share and difference when the items are drawn again.

In: a front, and the stored evaluations of its results with one value per item. Out: the same front
with a `Confidence` at each point. Costs are exact, so all that is unsure is quality. Where a model
was trained with several seeds, the draws hold them too; else they do not hold another training, and
never the text that the items were taken from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.bootstrap import NUM_RESAMPLES, Interval, Scores, front_shares
from orchestrator.reporting.front_text import full_name
from orchestrator.reporting.paired_bootstrap import ResampledScores, match_items, resample_scores
from orchestrator.reporting.pareto import (
    KEPT_SHARE,
    Confidence,
    ConfidenceBasis,
    Front,
    FrontPoint,
    PairedComparison,
)

CONFIDENCES = (
    f"paired/confidence_keeps_{100 * KEPT_SHARE:.0f}",
    "paired/confidence_on_front",
)
"""Tracked names of the two confidences."""


def with_confidence(
    front: Front,
    evaluations: Mapping[str, EvaluationResult | Sequence[EvaluationResult]],
    *,
    kept_share: float = KEPT_SHARE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Front:
    """Return the front with the confidence of each place.

    Args:
        front: FrontPoint results.
        evaluations: Key of a result to what it was measured by, several where it stands for
            several seeds; those that lack stay without.
        kept_share: The share of the full model's quality that `keeps` asks for.
        num_resamples: ResampledScores of the items.
        seed: The same seed gives the same draws.

    Returns:
        The front itself if no two of its models answered the same items.
    """
    points = [point for point in front.points if point.result.key in evaluations]
    matched = match_items({p.result.key: _runs(evaluations[p.result.key]) for p in points})
    full = front.full
    if matched is None or full is None or len(points) < 2:
        return front
    draws = resample_scores(matched, num_resamples=num_resamples, seed=seed)
    sure = _Sureness(front, points, draws, kept_share)
    basis = ConfidenceBasis(
        full=full_name(front, full),
        metrics=matched.metrics,
        num_items=matched.num_items,
        num_left_out=matched.num_left_out,
        num_resamples=num_resamples,
    )
    found = {point.result.key: sure.of(number) for number, point in enumerate(points)}
    placed = (replace(p, confidence=found.get(p.result.key)) for p in front.points)
    return replace(front, points=tuple(placed), basis=basis)


def _runs(
    found: EvaluationResult | Sequence[EvaluationResult],
) -> Sequence[EvaluationResult]:
    return [found] if isinstance(found, EvaluationResult) else found


def confidence_metrics(point: FrontPoint) -> dict[str, float]:
    """Return a point's confidence as flat numbers under `paired/`.

    `paired/vs_RIVAL` with `_low` and `_high` is the difference on the front's quality,
    `paired/TASK/vs_RIVAL` that of a task; `paired/share` relates to the full model.
    """
    sure = point.confidence
    if sure is None:
        return {}
    numbers: dict[str, float] = {}
    for prefix, compared in [("", sure.overall), *((f"{n}/", c) for n, c in sure.tasks.items())]:
        if compared is not None:
            for rival, difference in compared.against.items():
                numbers |= _bounds(difference_metric(rival, prefix), difference)
    if sure.share is not None:
        numbers |= _bounds("paired/share_of_full", sure.share)
    if sure.keeps is not None:
        numbers[CONFIDENCES[0]] = sure.keeps
    if sure.on_front is not None:
        numbers[CONFIDENCES[1]] = sure.on_front
    return numbers


def difference_metric(rival: str, prefix: str = "") -> str:
    """Return the tracked name of the difference to a rival; MLflow takes no spaces or signs."""
    return f"paired/{prefix}vs_{re.sub('[^0-9A-Za-z]+', '_', rival).strip('_')}"


class _Sureness:
    """Reads confidences off the draws; models go by their number among the points."""

    def __init__(
        self, front: Front, points: Sequence[FrontPoint], draws: ResampledScores, kept_share: float
    ) -> None:
        self._kept_share = kept_share
        self._higher = front.axes.higher_is_better
        self._tasks = draws.tasks
        self._quality = draws.quality(front.axes.quality)
        full = front.full
        self._full = next((n for n, point in enumerate(points) if point is full), None)
        rivals = [n for n, p in enumerate(points) if n == self._full or p.is_baseline]
        # The full model first: it is what everything is compared with.
        rivals.sort(key=lambda n: n != self._full)
        self._rivals = {full_name(front, points[n]): n for n in rivals}
        self._on_front = self._front_shares(front, points)

    def of(self, number: int) -> Confidence:
        share, keeps = self._share(number)
        return Confidence(
            overall=None if self._quality is None else self._compared(self._quality, number),
            tasks={name: self._compared(scores, number) for name, scores in self._tasks.items()},
            share=share,
            keeps=keeps,
            on_front=self._on_front.get(number),
        )

    def _compared(self, scores: Scores, number: int) -> PairedComparison:
        others = {name: rival for name, rival in self._rivals.items() if rival != number}
        return PairedComparison(
            own=scores.interval(number),
            against={name: scores.difference(number, rival) for name, rival in others.items()},
        )

    def _share(self, number: int) -> tuple[Interval | None, float | None]:
        if self._quality is None or self._full is None:
            return None, None
        # Of a loss, the full model's over this one's, as `Front.share` has it.
        pair = (number, self._full) if self._higher else (self._full, number)
        ratio = self._quality.ratio(*pair)
        if ratio is None:
            return None, None
        share, drawn = ratio
        return share, float((drawn >= self._kept_share).mean())

    def _front_shares(self, front: Front, points: Sequence[FrontPoint]) -> dict[int, float]:
        """Return the candidates' shares by number; none if a candidate could not be drawn."""
        candidates = [number for number, point in enumerate(points) if point.is_candidate]
        num_all = sum(point.is_candidate for point in front.points)
        if self._quality is None or not candidates or len(candidates) < num_all:
            return {}
        drawn = self._quality.drawn[:, candidates]
        costs = np.array([points[number].cost for number in candidates])
        shares = front_shares(costs, drawn if self._higher else -drawn)
        return dict(zip(candidates, map(float, shares), strict=True))


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
