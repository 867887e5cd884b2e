"""Section of a report: elastic weights against separate students, schedule by schedule.

Both answered the same items, so their difference has a paired interval. Where single items are
missing, the difference stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import Trial
from orchestrator.reporting.front import Front, FrontAxes, evaluations, is_accuracy, metric_title
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.statistics import INTERVAL_LEVEL, Interval, pair_scores

ELASTIC_TITLE = "Elastic weights against separate students"
LOSS = "quality/validation_loss"


@dataclass(frozen=True, kw_only=True)
class ElasticRow:
    """One schedule under elastic weights, and its separate student."""

    elastic: Trial
    student: Trial
    difference: Interval | None
    """Quality of the elastic weights minus that of the student."""


@dataclass(frozen=True, kw_only=True)
class ElasticSection:
    """Elastic weights and separate students, schedule by schedule."""

    rows: tuple[ElasticRow, ...]
    """Costliest schedule first."""
    axes: FrontAxes
    """Those of the front; its quality is compared."""
    flops: tuple[float, float] | None
    """Training FLOPs of the elastic weights and of all separate students together."""

    def section(self) -> Section:
        """Return the section of a report."""
        quality = self.axes.quality
        name = metric_title(quality).lower()
        columns = (
            *(Column("schedule", is_text=True), Column("NFE"), Column("elastic")),
            *(Column("separate"), Column(f"difference in {name}")),
            *(Column("elastic loss", 1), Column("separate loss", 2)),
        )
        notes, data = [], []
        if self.flops is not None:
            elastic, separate = self.flops
            notes.append(
                f"Training took {elastic:.3g} FLOPs for the elastic weights, "
                f"{elastic / separate:.0%} of the {separate:.3g} for the separate students. "
                "Outputs of the teacher that were stored for all students are not counted."
            )
        for row in self.rows:
            interval = row.difference
            data.append(
                {
                    "schedule": list(row.elastic.schedule or ()),
                    "elastic": row.elastic.value(quality),
                    "student": row.student.value(quality),
                    "difference": None if interval is None else interval.value,
                    "interval": None if interval is None else [interval.low, interval.high],
                    "elastic_loss": row.elastic.value(LOSS),
                    "student_loss": row.student.value(LOSS),
                }
            )
        values = {
            "quality": quality,
            "schedules": data,
            "training_flops": None if self.flops is None else list(self.flops),
        }
        explanation = (
            f"Quality is {name}; the difference is that of the elastic weights minus that of the "
            f"student of the same schedule, with the range of {INTERVAL_LEVEL:.0%} of draws of the "
            "items that both answered. Losses are in nats per token of the validation text."
        )
        table = Table(columns, tuple(TableRow(self._cells(row)) for row in self.rows))
        return Section(
            title=ELASTIC_TITLE,
            sentences=[explanation],
            tables=[table],
            notes=notes,
            data={"elastic": values},
        )

    def _cells(self, row: ElasticRow) -> tuple[str, ...]:
        scale, digits = (100, 1) if is_accuracy(self.axes.quality) else (1, 3)
        unit = "%" if scale == 100 else ""
        pair = (row.elastic, row.student)
        qualities = [model.value(self.axes.quality) for model in pair]
        losses = [model.value(LOSS) for model in pair]
        difference = ""
        if row.difference is not None:
            bounds = (row.difference.value, row.difference.low, row.difference.high)
            value, low, high = (f"{scale * bound:+.{digits}f}" for bound in bounds)
            difference = f"{value} ({low} to {high})"
        elif None not in qualities:
            elastic, student = (quality or 0.0 for quality in qualities)
            difference = f"{scale * (elastic - student):+.{digits}f}"
        return (
            row.elastic.schedule_text,
            f"{sum(row.elastic.model.evaluations_per_layer())}",
            *("" if q is None else f"{scale * q:.{digits}f}{unit}" for q in qualities),
            difference,
            *("" if loss is None else f"{loss:.4f}" for loss in losses),
        )


def elastic_section(front: Front, items: Mapping[str, EvaluationResult]) -> ElasticSection | None:
    """Return the section; None if no schedule was trained both ways.

    Args:
        front: The models with their seeds; its quality is compared.
        items: Key of a result -> its evaluation with the values of single items.
    """
    table, axes = front.table["trial"], front.axes
    own = [r for r in table if r.role == "trial" and r.parent and r.schedule is not None]
    elastic = {r.schedule: r for r in own if r.is_elastic}
    # The controls are not students that a teacher has taught.
    students = {r.schedule: r for r in own if r.job and r.job.teacher_folder and not r.is_elastic}
    shared = [schedule for schedule in elastic if schedule in students]
    if not shared:
        return None
    found = evaluations(front.table, items)
    rows = []
    for schedule in sorted(shared, key=lambda s: (sum(s or ()), s), reverse=True):
        pair = (elastic[schedule], students[schedule])
        keys = [model.key for model in pair]
        difference = None
        if all(key in found for key in keys):
            paired = pair_scores({key: found[key] for key in keys})
            quality = paired and paired.quality(axes.quality)
            difference = quality.difference(0, 1) if quality else None
        rows.append(ElasticRow(elastic=pair[0], student=pair[1], difference=difference))
    trained = [seed for seeds in front.table["seeds"] for seed in seeds]
    return ElasticSection(rows=tuple(rows), axes=axes, flops=_training_flops(trained, shared))


def _training_flops(
    results: Sequence[Trial], schedules: Sequence[tuple[int, ...] | None]
) -> tuple[float, float] | None:
    """Return the FLOPs of the elastic trainings, and of the students of some schedules."""
    trained = [r for r in results if r.job and r.role == "trial" and r.schedule in schedules]
    spent = [
        [r.numbers.get("train/flops", 0.0) for r in trained if r.is_elastic == is_elastic]
        for is_elastic in (True, False)
    ]
    if not all(map(all, spent)) or not all(spent):
        return None
    return sum(spent[0]), sum(spent[1])
