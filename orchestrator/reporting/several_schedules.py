"""Sections of a report on weights under several schedules.

Elastic weights stand against separate students, schedule by schedule. Both answered the same items,
so their difference has a paired interval; where single items are missing, it stands alone.

The depth curve is a model's quality when every layer makes 0, 1, 2, ... corrections. The weights
are the same at each point, and nothing is trained. `evaluate --depth-curve` measures the points and
stores them beside the weights; the report of a sweep shows those of its teachers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from orchestrator.records.evaluation import DepthCurve
from orchestrator.records.trial import LOSS, Trial
from orchestrator.reporting.charts import DEPTH_TITLE, depth_chart
from orchestrator.reporting.front import Front, is_accuracy, metric_title
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.statistics import INTERVAL_LEVEL, Interval
from orchestrator.reporting.tables import difference_text
from orchestrator.terminal.render import format_with_error, shortest_schedule
from orchestrator.workspace.errors import UserError

ELASTIC_TITLE = "Elastic weights against separate students"
DEPTH_CURVE = "depth-curve"
"""Name of the file beside the weights, and of the picture."""


def elastic_section(front: Front) -> Section | None:
    """Return the section; None if no schedule was trained both ways."""
    own = [r for r in front.trials if r.role == "trial" and r.parent and r.schedule is not None]
    elastic = {r.schedule: r for r in own if r.is_elastic}
    # The controls are not students that a teacher has taught.
    students = {r.schedule: r for r in own if r.job and r.job.teacher_folder and not r.is_elastic}
    shared = [schedule for schedule in elastic if schedule in students]
    if not shared:
        return None
    quality = front.axes.quality
    name, is_percent = metric_title(quality).lower(), is_accuracy(quality)
    scores = front.paired and front.paired.quality(quality)
    places = front.paired.places if front.paired else {}
    rows, data = [], []
    for schedule in sorted(shared, key=lambda s: (sum(s or ()), s), reverse=True):
        pair = (elastic[schedule], students[schedule])
        (first, second), losses = ([m.value(n) for m in pair] for n in (quality, LOSS))
        interval, difference = None, ""
        if scores and all(model.key in places for model in pair):
            interval = scores.difference(*(places[model.key] for model in pair))
        if interval:
            difference = difference_text(interval, is_percent=is_percent)
        elif first is not None and second is not None:
            alone = Interval(first - second, first - second, first - second)
            difference = difference_text(alone, is_percent=is_percent).partition(" ")[0]
        texts = [_quality_text(q, None, is_percent) for q in (first, second)]
        cells = (
            *(pair[0].schedule_text, f"{sum(pair[0].model.evaluations_per_layer())}"),
            *(*texts, difference, *("" if loss is None else f"{loss:.4f}" for loss in losses)),
        )
        rows.append(TableRow(cells))
        data.append(
            {
                "schedule": list(schedule or ()),
                "elastic": first,
                "student": second,
                "difference": interval and interval.value,
                "interval": interval and [interval.low, interval.high],
                "elastic_loss": losses[0],
                "student_loss": losses[1],
            }
        )

    trained = [seed for seeds in front.table["seeds"] for seed in seeds]
    trained = [r for r in trained if r.job and r.role == "trial" and r.schedule in shared]
    spent = [
        [r.numbers.get("train/flops", 0.0) for r in trained if r.is_elastic == is_elastic]
        for is_elastic in (True, False)
    ]
    notes, flops = [], None
    if all(of_kind and all(of_kind) for of_kind in spent):
        flops = [sum(of_kind) for of_kind in spent]
        notes.append(
            f"Training took {flops[0]:.3g} FLOPs for the elastic weights, "
            f"{flops[0] / flops[1]:.0%} of the {flops[1]:.3g} for the separate students. "
            "Outputs of the teacher that were stored for all students are not counted."
        )
    columns = (
        *(Column("schedule", is_text=True), Column("NFE"), Column("elastic"), Column("separate")),
        *(Column(f"difference in {name}"), Column("elastic loss", 1), Column("separate loss", 2)),
    )
    return Section(
        title=ELASTIC_TITLE,
        sentences=[
            f"Quality is {name}; the difference is that of the elastic weights minus that of the "
            f"student of the same schedule, with the range of {INTERVAL_LEVEL:.0%} of draws of the "
            "items that both answered. Losses are in nats per token of the validation text."
        ],
        tables=[Table(columns, rows)],
        notes=notes,
        data={"elastic": {"quality": quality, "schedules": data, "training_flops": flops}},
    )


def teacher_depths(results: Iterable[Trial], notes: list[str]) -> list[Section]:
    """Return a section for each teacher of a sweep whose depth curve was measured.

    A sentence on each damaged file is added to the notes.
    """
    sections: list[Section] = []
    curves: dict[str, DepthCurve] = {}
    for result in results:
        if result.role != "teacher" or not result.checkpoint:
            continue
        path = Path(result.checkpoint) / f"{DEPTH_CURVE}.json"
        try:
            curve = DepthCurve.read(path, remedy="`evaluate --depth-curve` measures it again")
        except UserError as error:
            notes.append(f"{error}.")
            continue
        if curve:
            curves[result.label] = curve
            section, number = depth_section(curve), len(curves)
            picture = f"{section.picture}-{number}" if number > 1 else section.picture
            title = f"{DEPTH_TITLE}: {result.label}"
            sections.append(replace(section, title=title, picture=section.picture and picture))
    if sections:
        data = {label: curve.model_dump(mode="json") for label, curve in curves.items()}
        sections[0] = replace(sections[0], data={"depth_curves": data})
    return sections


def depth_section(curve: DepthCurve) -> Section:
    """Return the section on a depth curve: the chart and a table of the points."""
    columns = [Column("corrections"), Column("NFE")]
    columns += [Column(metric_title(f"quality/{quality}")) for quality in curve.qualities]
    rows = []
    for point in curve.points:
        qualities = [(*point.measured(name), is_accuracy(name)) for name in curve.qualities]
        cells = (
            f"{point.corrections}",
            f"{point.evaluations}",
            *(_quality_text(*q) for q in qualities),
        )
        is_trained = set(curve.trained) == {point.corrections}
        rows.append(TableRow(cells, kind="full" if is_trained else ""))
    return Section(
        title=DEPTH_TITLE,
        sentences=[
            "The same weights, without further training, when every layer makes as many "
            f"corrections; trained with {shortest_schedule(curve.trained)}. Tasks: "
            f"{', '.join(curve.tasks)}. Bars: one standard error."
        ],
        chart=depth_chart(curve) if curve.qualities else None,
        picture=DEPTH_CURVE if curve.qualities else "",
        tables=[Table(columns, rows)],
    )


def _quality_text(value: float | None, error: float | None, is_percent: bool) -> str:
    if value is None:
        return ""
    return format_with_error(value, error, is_percent=is_percent) + ("%" if is_percent else "")
