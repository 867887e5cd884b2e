"""The depth curve: a model's quality when every layer makes 0, 1, 2, ... corrections.

The weights are the same at each point, and nothing is trained. `evaluate --depth-curve` measures
the points and stores them beside the weights; the report of a sweep shows those of its teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from altair import Axis, Chart, InlineData, Scale, X, Y, layer

from orchestrator.records.evaluation import DepthCurve
from orchestrator.records.trial import Trial
from orchestrator.reporting.charts import BLUE, GRAY, HEIGHT, WIDTH, Spec, chart_spec
from orchestrator.reporting.front import is_accuracy, metric_title
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.terminal.render import format_with_error, shortest_schedule
from orchestrator.workspace.errors import UserError

DEPTH_CURVE = "depth-curve"
"""Name of the file beside the weights, and of the picture."""
DEPTH_TITLE = "Quality by corrections at inference"


def teacher_depth(results: Iterable[Trial], notes: list[str]) -> Section | None:
    """Return the section of a sweep's teacher; None if its curve was not measured.

    A sentence on a damaged file is added to the notes.
    """
    checkpoints = [result.checkpoint for result in results if result.role == "teacher"]
    for checkpoint in filter(None, checkpoints):
        path = Path(checkpoint) / f"{DEPTH_CURVE}.json"
        try:
            curve = DepthCurve.read(path, remedy="`evaluate --depth-curve` measures it again")
        except UserError as error:
            notes.append(f"{error}.")
        else:
            return depth_section(curve) if curve else None
    return None


def depth_section(curve: DepthCurve) -> Section:
    """Return the section of a report: the chart and a table of the points."""
    name, trained = shortest_schedule(curve.trained), set(curve.trained)
    columns = [Column("corrections"), Column("NFE")]
    columns += [Column(metric_title(f"quality/{quality}")) for quality in curve.qualities]
    rows = []
    for point in curve.points:
        cells = [f"{point.corrections}", f"{point.evaluations}"]
        for quality in curve.qualities:
            value, error = point.measured(quality)
            is_percent = is_accuracy(quality)
            text = format_with_error(value, error, is_percent=is_percent)
            cells.append(text + ("%" if is_percent else ""))
        rows.append(TableRow(cells, kind="full" if trained == {point.corrections} else ""))
    return Section(
        title=DEPTH_TITLE,
        sentences=[
            "The same weights, without further training, when every layer makes as many "
            f"corrections; trained with {name}. Tasks: {', '.join(curve.tasks)}. Bars: one "
            "standard error."
        ],
        chart=depth_chart(curve) if curve.qualities else None,
        picture=DEPTH_CURVE if curve.qualities else "",
        tables=[Table(columns, rows)],
        data={"depth_curve": curve.model_dump(mode="json")},
    )


def depth_chart(curve: DepthCurve) -> Spec:
    """Return the chart of the first of the qualities against the corrections of every layer."""
    quality = curve.qualities[0]
    scale, unit = (100, " (%)") if is_accuracy(quality) else (1, "")
    values: list[dict[str, float]] = []
    for point in curve.points:
        value, error = (scale * (number or 0.0) for number in point.measured(quality))
        ends = {"value": value, "low": value - error, "high": value + error}
        values.append({"r": point.corrections, **ends})
    last = curve.points[-1].corrections
    axis = Axis(values=[*range(last + 1)], format="d", grid=False)
    domain = Scale(domain=[-0.2, last + 0.2], nice=False)
    x = X("r:Q", title="Corrections of every layer", axis=axis, scale=domain)
    title = metric_title(f"quality/{quality}") + unit
    y = Y("value:Q", title=title, scale=Scale(zero=False))
    chart = Chart(InlineData(values=values)).encode(x=x)
    layers = [
        chart.mark_line(color=BLUE, strokeWidth=1.8).encode(y=y),
        chart.mark_rule(color=BLUE, clip=False).encode(y=Y("low:Q"), y2="high:Q"),
        chart.mark_point(color=BLUE, filled=True, size=70, opacity=1, clip=False).encode(y=y),
    ]
    if len(set(curve.trained)) == 1:
        trained = Chart(InlineData(values=[{"r": curve.trained[0], "name": "trained"}]))
        rule = trained.mark_rule(color=GRAY, strokeDash=[4, 4]).encode(x=x)
        text = trained.mark_text(color=GRAY, align="left", dx=6, y=HEIGHT * 3 // 4 - 10)
        layers = [rule, text.encode(x=x, text="name:N"), *layers]
    whole = layer(*layers).properties(width=WIDTH, height=HEIGHT * 3 // 4)
    return chart_spec(whole, title=DEPTH_TITLE)
