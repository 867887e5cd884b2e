"""The Pareto front of trial results: which models no other one beats on cost and quality together.

Beside a teacher, baselines are placed but do not compete: the front tells which schedule to take,
and `members_beaten_by` whether that was worth it. Without a teacher all models compete.
Non-domination and hypervolume are moocore's. `reporting.confidence` fills in `Confidence`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import moocore
import numpy as np

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import Trial, teacher_or_costliest
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.results import result_table
from orchestrator.reporting.statistics import Confidence, ConfidenceBasis

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_SHOWN = 200
"""Most models in tables, charts and bootstraps; `front.csv` and `front.json` contain all."""


@dataclass(frozen=True)
class FrontPoint:
    """A result with its cost, quality and place."""

    result: Trial
    cost: float
    quality: float
    error: float | None
    """Standard error of the quality; None if it was not measured."""
    on_front: bool = False
    """Whether no other candidate is as good in both and better in one."""
    confidence: Confidence | None = None
    """How certain the place is; None without values of single items."""
    is_candidate: bool = True
    """Whether the result competes for the front; baselines beside a teacher do not."""

    @property
    def is_baseline(self) -> bool:
        """Whether the model is there to compare with, and no schedule of the teacher."""
        return self.result.role == "baseline"

    @property
    def kind(self) -> str:
        """How tables show the row: `baseline`, `member`, `full` or `dominated`."""
        if not self.is_candidate:
            return "baseline"
        if self.on_front:
            return "member"
        return "full" if self.result.role == "teacher" else "dominated"


@dataclass(frozen=True)
class HypervolumeBox:
    """The hypervolume is a share of this box; one corner is the full model."""

    cost: float
    """The full model's cost; the other corner costs nothing."""
    quality: float
    """The other corner's quality: 0 for an accuracy, the worst measured for a loss."""
    full_quality: float


@dataclass(frozen=True, eq=False)
class Front:
    """Models placed on two axes, cheapest first."""

    axes: FrontAxes
    table: DataFrame
    """All models, from `result_table`; those of several sweeps have a column `sweep`."""
    points: tuple[FrontPoint, ...]
    """Every model that has both metrics."""
    basis: ConfidenceBasis | None = None
    """What the confidences are computed from; None if there are none."""

    @cached_property
    def sweep_of(self) -> dict[str, str]:
        """Key of a model -> its sweep; empty if all are from one sweep."""
        return dict(self.table["sweep"]) if "sweep" in self.table else {}

    @cached_property
    def unmeasured(self) -> tuple[Trial, ...]:
        """The models that lack one of both metrics."""
        placed = {point.result.key for point in self.points}
        return tuple(trial for key, trial in self.table["trial"].items() if key not in placed)

    @cached_property
    def results(self) -> tuple[Trial, ...]:
        """All models: the placed ones, cheapest first, then the unmeasured ones."""
        return (*(point.result for point in self.points), *self.unmeasured)

    @cached_property
    def shown(self) -> tuple[FrontPoint, ...]:
        """The points that tables, charts and bootstraps contain, in the front's order.

        All of up to `MAX_SHOWN` points. Otherwise the members of the front, the full model and the
        baselines, and of the others those that lack least quality to the best member of at most
        their cost: pages of ten thousand rows cannot be read, and a bootstrap over that many models
        needs gigabytes.
        """
        if len(self.points) <= MAX_SHOWN:
            return self.points
        always = {
            p.result.key for p in self.points if p.on_front or not p.is_candidate or p is self.full
        }
        costs = [member.cost for member in self.members]

        def shortfall(point: FrontPoint) -> float:
            cheaper = self.members[: bisect_right(costs, point.cost)]
            return self.goodness(cheaper[-1]) - self.goodness(point)

        others = sorted((p for p in self.points if p.result.key not in always), key=shortfall)
        nearest = {point.result.key for point in others[: max(0, MAX_SHOWN - len(always))]}
        return tuple(point for point in self.points if point.result.key in always | nearest)

    def seeds_of(self, point: FrontPoint) -> tuple[Trial, ...]:
        """Return the trials that a point's numbers are the means of."""
        seeds: tuple[Trial, ...] = self.table["seeds"][point.result.key]
        return seeds

    @cached_property
    def shown_seeds(self) -> list[Trial]:
        """The trials that the shown points stand for, in the table's order."""
        keys = {point.result.key for point in self.shown}
        return [seed for key, seeds in self.table["seeds"].items() if key in keys for seed in seeds]

    @cached_property
    def members(self) -> tuple[FrontPoint, ...]:
        """The points on the front, cheapest first; equal ones are all members."""
        return tuple(point for point in self.points if point.on_front)

    @cached_property
    def full(self) -> FrontPoint | None:
        """The model to compare with: the teacher, else the costliest but for baselines."""
        return teacher_or_costliest(
            self.points, role=lambda p: p.result.role, cost=lambda p: p.cost
        )

    @cached_property
    def best(self) -> FrontPoint | None:
        """The member of highest quality; of equal ones the cheapest."""
        return max(self.members, key=lambda p: (self.goodness(p), -p.cost), default=None)

    @cached_property
    def cheapest(self) -> FrontPoint | None:
        """The member of lowest cost; of equal ones the best."""
        return min(self.members, key=lambda p: (p.cost, -self.goodness(p)), default=None)

    @cached_property
    def knee(self) -> FrontPoint | None:
        """The member farthest above the chord from cheapest to best; None if none lies above it.

        Both axes are scaled to one.
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

    @cached_property
    def picks(self) -> dict[str, FrontPoint]:
        """Knee, best and cheapest by name; without those that do not exist."""
        found = {"knee": self.knee, "best": self.best, "cheapest": self.cheapest}
        return {name: point for name, point in found.items() if point is not None}

    @cached_property
    def by_sweep(self) -> dict[str, Front]:
        """The front of each sweep alone, by its name; empty if there is only one sweep."""
        if not self.sweep_of:
            return {}
        parts = self.table.groupby("sweep", sort=False)
        return {str(name): find_front(part, self.axes) for name, part in parts}

    @cached_property
    def hypervolume_box(self) -> HypervolumeBox | None:
        """The box that the hypervolume is a share of; None without a full model."""
        full = self.full
        if full is None:
            return None
        worst = 0.0 if self.axes.higher_is_better else max(p.quality for p in self.points)
        return HypervolumeBox(full.cost, worst, full.quality)

    @cached_property
    def hypervolume(self) -> float | None:
        """Share of the box that the front dominates; over 1 if it beats the full model.

        None if the box is empty, or no candidate is placed.
        """
        box = self.hypervolume_box
        if not self.members or box is None or box.cost <= 0 or box.full_quality == box.quality:
            return None
        sign = -1.0 if self.axes.higher_is_better else 1.0
        points = np.array([[point.cost, sign * point.quality] for point in self.members])
        area = float(moocore.hypervolume(points, ref=[box.cost, sign * box.quality]))
        return area / (box.cost * abs(box.full_quality - box.quality))

    def with_table(self, table: DataFrame) -> Front:
        """Return the same front with another table of the same models."""
        points = (replace(p, result=table["trial"][p.result.key]) for p in self.points)
        return replace(self, table=table, points=tuple(points))

    def goodness(self, point: FrontPoint) -> float:
        """Return the quality with a sign such that higher is better."""
        return point.quality if self.axes.higher_is_better else -point.quality

    def share(self, point: FrontPoint) -> float | None:
        """Return the share of the full model's quality that a model keeps, 1.0 for all of it.

        For a loss: the full model's loss over this model's.
        """
        full = self.full
        if full is None:
            return None
        part, whole = point.quality, full.quality
        if not self.axes.higher_is_better:
            part, whole = whole, part
        return part / whole if whole else None

    def cheapest_keeping(self, share: float) -> FrontPoint | None:
        """Return the cheapest member that keeps this share of the full model's quality."""
        kept = [point for point in self.members if (self.share(point) or 0.0) >= share]
        return min(kept, key=lambda point: point.cost, default=None)

    def members_beaten_by(self, baseline: FrontPoint) -> tuple[FrontPoint, ...]:
        """Return the members that are no better and no cheaper than a baseline, and worse in one.

        Unlike domination among candidates, this takes no member off the front.
        """
        return tuple(
            point
            for point in self.members
            if baseline.cost <= point.cost
            and self.goodness(baseline) >= self.goodness(point)
            and (baseline.cost, baseline.quality) != (point.cost, point.quality)
        )


def find_front(table: DataFrame, axes: FrontAxes | None = None) -> Front:
    """Place models on two axes, NFE and accuracy by default, and find those that none beats.

    Args:
        table: Trials, teacher and baselines, from `result_table`.
        axes: Cost and quality.
    """
    axes = axes or FrontAxes()
    has_teacher = bool((table["role"] == "teacher").any())
    columns = ["trial", axes.cost, axes.quality, axes.error]
    placed = table.reindex(columns=columns).dropna(subset=columns[1:3])
    points = []
    for result, cost, quality, error in placed.itertuples(index=False, name=None):
        points.append(
            FrontPoint(
                result,
                float(cost),
                float(quality),
                None if math.isnan(error) else float(error),
                is_candidate=not has_teacher or result.role != "baseline",
            )
        )
    candidates = [point for point in points if point.is_candidate]
    if candidates:
        values = np.array([[point.cost, point.quality] for point in candidates])
        maximise = [False, axes.higher_is_better]
        on_front = iter(moocore.is_nondominated(values, maximise=maximise, keep_weakly=True))
        points = [replace(p, on_front=p.is_candidate and bool(next(on_front))) for p in points]
    sign = 1.0 if axes.higher_is_better else -1.0
    points.sort(key=lambda point: (point.cost, sign * point.quality, point.result.key))
    return Front(axes, table, tuple(points))


def shown_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, or of many the seeds of those models that tables show."""
    return (
        list(trials) if len(trials) <= MAX_SHOWN else find_front(result_table(trials)).shown_seeds
    )


def left_out_notes(front: Front) -> list[str]:
    """Return the sentence on models that tables and pages leave out; none if all are shown."""
    num_shown, num_all = len(front.shown), len(front.points)
    if num_shown == num_all:
        return []
    return [
        f"Of {num_all:,} models, tables show the {num_shown:,} on the front and nearest to it, and "
        "only these have confidences; `front.csv` has all."
    ]


def evaluations(
    front: Front, items: Mapping[str, EvaluationResult]
) -> dict[str, list[EvaluationResult]]:
    """Return the evaluations of each model's seeds; without models that lack one of them."""
    return {
        str(key): [items[seed.key] for seed in seeds]
        for key, seeds in front.table["seeds"].items()
        if all(seed.key in items for seed in seeds)
    }
