"""The section of a report on weights under several schedules.

The depth curve is a model's quality when every layer makes 0, 1, 2, ... corrections. The weights
are the same at each point, and nothing is trained. `evaluate --depth-curve` measures the points and
stores them beside the weights; the report of a sweep shows those of its teachers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from orchestrator.records.evaluation import DepthCurve
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import DEPTH_TITLE, depth_chart
from orchestrator.reporting.front import is_accuracy, metric_title
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.terminal.render import format_with_error, shortest_schedule

DEPTH_CURVE = "depth-curve"
"""Name of the file beside the weights, and of the picture."""


def teacher_depths(results: Iterable[Trial]) -> list[Section]:
    """Return a section for each teacher of a sweep whose depth curve was measured."""
    sections: list[Section] = []
    curves: dict[str, DepthCurve] = {}
    for result in results:
        if result.role != "teacher" or not result.checkpoint:
            continue
        path = Path(result.checkpoint) / f"{DEPTH_CURVE}.json"
        curve = DepthCurve.read(path)
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
