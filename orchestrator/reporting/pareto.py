"""The front: which models no other one beats on cost and quality together, and which to take.

In: trial results and the names of two of their numbers. Out: every result placed, told on the front
or off it, with its picks: best, cheapest, the knee, the cheapest that keeps a share of the full
model's quality. Beside a teacher and its students, baselines trained from scratch are placed but
do not push trials off the front, so that it answers "which schedule", and `beaten_by` answers "and
was it worth it". Without a teacher all were trained from scratch, and vanilla competes like any
other: there the front answers "which method".

The hypervolume is a share of a stated box: from the full model's cost down to no cost, and from the
reference quality (0 for an accuracy, the worst measured for a loss) to the full model's quality.
For an accuracy that is the share of it that the front keeps, averaged over all cost budgets.
Non-domination and hypervolume are moocore's.

How sure a place is stands beside it, where models answered the same items: `Confidence` is filled
in by `analysis.confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import moocore
import numpy as np

from orchestrator.records.trial import TrialResult, teacher_or_costliest
from orchestrator.reporting.bootstrap import Interval
from orchestrator.reporting.front_axes import FrontAxes

KEPT_SHARE = 0.99
"""The share of the full model's quality that is worth calling kept."""


@dataclass(frozen=True)
class PairedComparison:
    """One quality of a model over the items that all models answered."""

    own: Interval
    """The quality itself."""
    against: Mapping[str, Interval]
    """Name of the full model or of a baseline -> this model's quality minus that one's."""


@dataclass(frozen=True)
class Confidence:
    """How sure a model's place is, when its items are drawn again."""

    overall: PairedComparison | None
    """On the front's quality; None if that has no values by item."""
    tasks: Mapping[str, PairedComparison]
    """On each task."""
    share: Interval | None
    """Share of the full model's quality that is kept."""
    keeps: float | None
    """In which share of the draws at least `KEPT_SHARE` is kept."""
    on_front: float | None
    """In which share of the draws the model is on the front; None for baselines."""


@dataclass(frozen=True)
class ConfidenceBasis:
    """What confidences rest on."""

    full: str
    """Name of the model that shares relate to."""
    metrics: Mapping[str, str]
    """Task -> the metric that is compared."""
    num_items: int
    """Items that all models answered."""
    num_left_out: int
    """Items that only some of them answered."""
    num_resamples: int
    """Draws."""


@dataclass(frozen=True)
class FrontPoint:
    """A result with its place."""

    result: TrialResult
    cost: float
    quality: float
    error: float | None
    """Standard error of the quality; None if it was not measured."""
    on_front: bool
    """Whether no other candidate is as good in both and better in one."""
    confidence: Confidence | None = None
    """How sure that is; None where no values of single items are at hand."""
    is_candidate: bool = True
    """Whether the result competes for the front; beside a teacher, baselines do not."""

    @property
    def is_baseline(self) -> bool:
        """Whether the others are to be compared with it: a method without corrections."""
        return self.result.role == "baseline"


@dataclass(frozen=True)
class HypervolumeBox:
    """What the hypervolume is a share of."""

    cost: float
    """The reference cost: the full model's."""
    quality: float
    """The reference quality."""
    full_quality: float
    """The full model's quality, opposite the reference."""


@dataclass(frozen=True)
class Front:
    """Results placed on two axes, cheapest first."""

    axes: FrontAxes
    points: tuple[FrontPoint, ...]
    """Every result that has both numbers."""
    unmeasured: tuple[TrialResult, ...] = ()
    """Results that lack one of them."""
    sweep_of: Mapping[str, str] = field(default_factory=dict)
    """Key of a result -> the sweep it is from, where several share the front."""
    basis: ConfidenceBasis | None = None
    """What the confidences rest on; None if there are none."""

    @property
    def members(self) -> tuple[FrontPoint, ...]:
        """Those on the front, cheapest first; of equal ones, all."""
        return tuple(point for point in self.points if point.on_front)

    @property
    def full(self) -> FrontPoint | None:
        """The model to compare with: the teacher, else the costliest but for baselines."""
        return teacher_or_costliest(
            self.points, role=lambda p: p.result.role, cost=lambda p: p.cost
        )

    @property
    def best(self) -> FrontPoint | None:
        """The member of highest quality; of equal ones the cheapest."""
        return max(self.members, key=lambda p: (self.goodness(p), -p.cost), default=None)

    @property
    def cheapest(self) -> FrontPoint | None:
        """The member of lowest cost; of equal ones the best."""
        return min(self.members, key=lambda p: (p.cost, -self.goodness(p)), default=None)

    @property
    def knee(self) -> FrontPoint | None:
        """The member farthest above the chord from cheapest to best, both axes scaled to one.

        Returns:
            None if no member lies above the chord.
        """
        cheapest, best = self.cheapest, self.best
        if cheapest is None or best is None or cheapest.cost == best.cost:
            return None
        width = best.cost - cheapest.cost
        height = self.goodness(best) - self.goodness(cheapest)
        if height <= 0:
            return None

        def above_chord(point: FrontPoint) -> float:
            gain = (self.goodness(point) - self.goodness(cheapest)) / height
            return (gain - (point.cost - cheapest.cost) / width) / math.sqrt(2)

        knee = max(self.members, key=above_chord)
        return knee if above_chord(knee) > 1e-12 else None

    @property
    def by_sweep(self) -> dict[str, Front]:
        """The front of each sweep by itself, by its name; empty where there is only one."""
        results = [*(point.result for point in self.points), *self.unmeasured]
        return {
            name: find_front([r for r in results if self.sweep_of[r.key] == name], self.axes)
            for name in dict.fromkeys(self.sweep_of.values())
        }

    def with_results(self, results: Mapping[str, TrialResult]) -> Front:
        """Return the same front with other values of its results, by key, where there are any."""
        placed = (replace(p, result=results.get(p.result.key, p.result)) for p in self.points)
        unmeasured = (results.get(result.key, result) for result in self.unmeasured)
        return replace(self, points=tuple(placed), unmeasured=tuple(unmeasured))

    def goodness(self, point: FrontPoint) -> float:
        """Return the quality so that more is better."""
        return point.quality if self.axes.higher_is_better else -point.quality

    def share(self, point: FrontPoint) -> float | None:
        """Return the share of the full model's quality that a model keeps, 1.0 for all of it.

        For a loss it is the full model's loss over this one's.
        """
        full = self.full
        if full is None:
            return None
        part, whole = (point.quality, full.quality)
        if not self.axes.higher_is_better:
            part, whole = whole, part
        return part / whole if whole else None

    def cheapest_keeping(self, share: float) -> FrontPoint | None:
        """Return the cheapest member that keeps this share of the full model's quality, if any."""
        kept = [point for point in self.members if (self.share(point) or 0.0) >= share]
        return min(kept, key=lambda point: point.cost, default=None)

    def members_beaten_by(self, baseline: FrontPoint) -> tuple[FrontPoint, ...]:
        """Return the members that a baseline beats: no better, no cheaper, and worse in one."""
        return tuple(
            point
            for point in self.members
            if baseline.cost <= point.cost
            and self.goodness(baseline) >= self.goodness(point)
            and (baseline.cost, baseline.quality) != (point.cost, point.quality)
        )

    @property
    def hypervolume_box(self) -> HypervolumeBox | None:
        """The box that the hypervolume is a share of."""
        full = self.full
        if full is None:
            return None
        worst = 0.0
        if not self.axes.higher_is_better:
            worst = max(point.quality for point in self.points)
        return HypervolumeBox(full.cost, worst, full.quality)

    @property
    def hypervolume(self) -> float | None:
        """The share of the box that the front dominates; over 1 where it beats the full model.

        Returns:
            None if the box is empty.
        """
        box = self.hypervolume_box
        if box is None or box.cost <= 0 or box.full_quality == box.quality:
            return None
        sign = -1.0 if self.axes.higher_is_better else 1.0
        points = np.array([[point.cost, sign * point.quality] for point in self.members])
        area = float(moocore.hypervolume(points, ref=[box.cost, sign * box.quality]))
        return area / (box.cost * abs(box.full_quality - box.quality))


def find_front(
    results: Sequence[TrialResult],
    axes: FrontAxes | None = None,
    *,
    sweep_of: Mapping[str, str] | None = None,
) -> Front:
    """Place results on two axes and find those that no other candidate beats.

    Args:
        results: Trials, teacher and baselines, in any order.
        axes: Which two numbers; evaluations and accuracy when unset.
        sweep_of: Key of a result -> the sweep it is from, where several share the front.
    """
    axes = axes or FrontAxes()
    found: list[tuple[TrialResult, float, float]] = []
    unmeasured = []
    for result in results:
        cost, quality = result.value(axes.cost), result.value(axes.quality)
        if cost is None or quality is None:
            unmeasured.append(result)
        else:
            found.append((result, cost, quality))
    has_teacher = any(result.role == "teacher" for result in results)
    competing = [not has_teacher or result.role != "baseline" for result, _, _ in found]
    on_front = _not_dominated(found, axes, competing)
    placed = [
        FrontPoint(result, cost, quality, result.value(axes.error), member, is_candidate=candidate)
        for (result, cost, quality), member, candidate in zip(
            found, on_front, competing, strict=True
        )
    ]
    sign = 1.0 if axes.higher_is_better else -1.0
    placed.sort(key=lambda point: (point.cost, sign * point.quality, point.result.key))
    return Front(axes, tuple(placed), tuple(unmeasured), sweep_of or {})


def _not_dominated(
    found: Sequence[tuple[TrialResult, float, float]], axes: FrontAxes, competing: Sequence[bool]
) -> list[bool]:
    candidates = [i for i, competes in enumerate(competing) if competes]
    member = [False] * len(found)
    if candidates:
        points = np.array([found[i][1:] for i in candidates], dtype=float)
        kept = moocore.is_nondominated(
            points, maximise=[False, axes.higher_is_better], keep_weakly=True
        )
        for i, keep in zip(candidates, kept, strict=True):
            member[i] = bool(keep)
    return member
