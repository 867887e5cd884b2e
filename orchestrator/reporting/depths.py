"""The depth curve of a sweep of kind `depth`: weights stay, and quality changes with the depth.

The points are the models of the sweep's front: one that was trained here under several iteration
schedules, or a looped model of another project at several depths. Nothing was trained between them.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.models.labels import unique_labels
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import DepthPoint, depth_chart
from orchestrator.reporting.front import Front, Row, known
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.tables import cost_text, quality_text
from orchestrator.terminal.render import shortest_schedule

DEPTHS_TITLE = "Quality by depth"
DEPTH_CURVE = "depth-curve"
"""Name of the picture."""


def depth_section(front: Front) -> Section | None:
    """Return the section on a sweep's depth curves; None if no model has two depths."""
    rows_of: dict[str, list[Row]] = {}
    for row in front.rows:  # The cheapest first.
        rows_of.setdefault(str(row["checkpoint"]), []).append(row)
    rows_of = {checkpoint: rows for checkpoint, rows in rows_of.items() if len(rows) > 1}
    if not rows_of:
        return None
    points: list[DepthPoint] = []
    cells: list[TableRow] = []
    names = unique_labels([(Path(checkpoint), "") for checkpoint in rows_of])
    for name, rows in zip(names, rows_of.values(), strict=True):
        for row in rows:
            depth = _depth_text(row["trial"])
            points.append(
                DepthPoint(
                    model=name,
                    depth=depth,
                    cost=row["cost"],
                    quality=row["quality"],
                    error=known(row, "error") or 0.0,
                )
            )
            cells.append(TableRow((name, depth, cost_text(row["cost"]), quality_text(front, row))))
    quality = front.axes.quality_metric
    unit = " %" if quality.is_percent else ""
    columns = (
        Column("model", is_text=True),
        Column("depth", is_text=True),
        Column(front.axes.cost_metric.title),
        Column(f"{quality.title}{unit}"),
    )
    return Section(
        title=DEPTHS_TITLE,
        sentences=[
            "The same weights, without further training, at each depth: corrections per layer of "
            "a model that was trained here, loops of another. Bars: one standard error."
        ],
        chart=depth_chart(points, front.axes),
        picture=DEPTH_CURVE,
        tables=[Table(columns, cells)],
    )


def _depth_text(trial: Trial) -> str:
    if trial.architecture:
        return trial.architecture.depth
    return shortest_schedule(tuple(trial.model.corrections))
