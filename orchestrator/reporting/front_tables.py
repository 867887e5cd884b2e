"""A front as text, tables and data: for the terminal, Markdown, HTML, CSV and strict JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.records.trial import Trial
from orchestrator.reporting.front_axes import COSTS, is_accuracy, metric_title
from orchestrator.reporting.pareto import Front, FrontPoint
from orchestrator.reporting.results import DESCRIBING_COLUMNS
from orchestrator.reporting.sections import Column, Row, Table
from orchestrator.reporting.statistics import (
    INTERVAL_LEVEL,
    KEPT_SHARE,
    Interval,
    PairedComparison,
)
from orchestrator.terminal.render import (
    format_bytes,
    format_parameters,
    format_schedule,
    format_with_error,
    scale_and_digits,
)
from orchestrator.workspace.layout import portable_path, workspace_root

if TYPE_CHECKING:
    from pandas import DataFrame

NOTABLE_SIZE_RATIO = 1.1
"""The mix of a method adds less than this to a model; otherwise a column shows parameters."""
SHORT_TITLES = {
    "quality/accuracy": "accuracy %",
    "quality/bits_per_byte": "bits/byte",
    "quality/validation_loss": "loss",
    "cost/flops_per_token": "FLOPs/token",
}
TASK_TABLES_NOTE = (
    f"Each score has its {INTERVAL_LEVEL:.0%} interval over the draws, and so has each difference "
    "over the same items; differences of an accuracy are in points. An interval without zero is a "
    "difference that these items can resolve."
)


def model_name(point: FrontPoint) -> str:
    """Return a model's label, or its schedule where the label says no more."""
    result = point.result
    if result.label and result.label != result.schedule_text:
        return result.label
    return format_schedule(result.schedule) or result.name


def full_name(front: Front, point: FrontPoint) -> str:
    """Return a model's name; with its sweep if another model on the front has the same name."""
    name = model_name(point)
    is_shared = front.sweep_of and sum(model_name(other) == name for other in front.points) > 1
    return f"{name} ({front.sweep_of[point.result.key]})" if is_shared else name


def quality_text(front: Front, point: FrontPoint) -> str:
    """Return a quality with its standard error, an accuracy in percent: `44.4 ± 1.2`."""
    return format_with_error(point.quality, point.error, is_percent=is_accuracy(front.axes.quality))


def difference_text(interval: Interval, *, is_percent: bool) -> str:
    """Return a difference with its interval: `-0.9 (-2.1 to +0.3)`, shares in points."""
    scale, digits = scale_and_digits(interval.value, is_percent=is_percent)

    def signed(number: float) -> str:
        text = f"{scale * number:+.{digits}f}"
        return text[1:] if float(text) == 0 else text

    return f"{signed(interval.value)} ({signed(interval.low)} to {signed(interval.high)})"


def range_text(interval: Interval, *, is_percent: bool) -> str:
    """Return the bounds of an interval: `31.2 to 36.1`."""
    scale, digits = scale_and_digits(interval.value, is_percent=is_percent)
    return f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"


def cost_text(cost: float) -> str:
    """Return a cost with four digits, or all digits if it is in the thousands or millions."""
    return f"{cost:,.0f}" if 1000 <= cost < 1e7 else f"{cost:.4g}"


def confidence_text(share: float | None) -> str:
    """Return a confidence with two digits; never 0 or 1, which no number of draws can show."""
    if share is None:
        return ""
    if share > 0.99:
        return ">0.99"
    return "<0.01" if share < 0.01 else f"{share:.2f}"


def verdict(front: Front, point: FrontPoint) -> str:
    """Return a point's place: on the front, with its picks, or what a baseline beats."""
    if not point.is_candidate:
        num_beaten = len(front.members_beaten_by(point))
        return f"beats {num_beaten} ●" if num_beaten else ""
    if not point.on_front:
        return ""
    return " ".join(["●", *(name for name, pick in front.picks.items() if pick is point)])


def hypervolume_text(front: Front) -> str:
    """Return the hypervolume and the box that it is a share of; empty if there is none."""
    volume, box = front.hypervolume, front.hypervolume_box
    if volume is None or box is None:
        return ""
    quality, cost = metric_title(front.axes.quality).lower(), metric_title(front.axes.cost)
    is_percent = is_accuracy(front.axes.quality)
    unit = "%" if is_percent else ""
    low, high = (
        format_with_error(number, None, is_percent=is_percent) + unit
        for number in (box.quality, box.full_quality)
    )
    # Abbreviations such as FLOPs keep their capitals.
    cost = cost if cost[:2].isupper() else cost[0].lower() + cost[1:]
    return (
        f"hypervolume {volume:.3f}, as a share of the box from 0 to {cost_text(box.cost)} "
        f"({cost}) and from {quality} {low} to the full model's {high}"
    )


def models_table(front: Front, title: str = "") -> Table:
    """Return the table of the shown models: schedule, costs, qualities, confidences, place.

    The columns of the front's axes are never dropped, and empty ones are left out.
    """
    quality, cost = front.axes.quality, front.axes.cost
    full = front.basis.full if front.basis else "full"
    is_percent = is_accuracy(quality)

    def number(name: str, form: str) -> Callable[[FrontPoint], str]:
        return lambda p: "" if (value := p.result.value(name)) is None else f"{value:{form}}"

    def share(name: str, digits: int) -> Callable[[FrontPoint], str]:
        return number(name, f".{digits}%")

    def threshold(point: FrontPoint) -> str:
        # The largest threshold that gives the schedule, which a user would type.
        text = point.result.threshold_text
        return text if text.startswith(">") else text.removeprefix("<=").rpartition(" to ")[2]

    def kept(point: FrontPoint) -> str:
        kept = front.share(point)
        return "" if kept is None else f"{kept:.1%}"

    def difference(point: FrontPoint) -> str:
        overall = point.confidence and point.confidence.overall
        interval = overall.against.get(full) if overall else None
        return difference_text(interval, is_percent=is_percent) if interval else ""

    def keeps(point: FrontPoint) -> str:
        is_known = point is not front.full and point.confidence is not None
        return confidence_text(point.confidence.keeps) if is_known and point.confidence else ""

    def kv_bytes(point: FrontPoint) -> str:
        count = point.result.value(COSTS["kv"])
        return "" if count is None else format_bytes(count)

    flops = "cost/relative_flops"
    costs: dict[str, tuple[Column, Callable[[FrontPoint], str]]] = {
        COSTS["evaluations"]: (Column("NFE"), number(COSTS["evaluations"], "g")),
        flops: (Column("FLOPs", 4), share(flops, 0)),
        COSTS["kv"]: (Column("KV/token", 7), kv_bytes),
        COSTS["ms"]: (Column("ms/token", 3), number(COSTS["ms"], ".2f")),
    }
    if cost in costs:
        column, cell = costs[cost]
        costs[cost] = (replace(column, priority=0), cell)
    else:
        own = Column(SHORT_TITLES.get(cost, metric_title(cost)))
        costs = {cost: (own, number(cost, ".4g")), **costs}

    sizes: list[tuple[Column, Callable[[FrontPoint], str]]] = []
    if len({point.result.model.num_layers for point in front.points}) > 1:
        sizes.append((Column("layers", 4), lambda p: str(p.result.model.num_layers)))
    parameters = "cost/num_parameters"
    counts = [count for p in front.points if (count := p.result.value(parameters))]
    if counts and max(counts) >= NOTABLE_SIZE_RATIO * min(counts):
        sizes.append(
            (
                Column("parameters", 4),
                lambda p: format_parameters(p.result.value(parameters) or 0.0),
            )
        )
    bits = "quality/bits_per_byte"
    columns: list[tuple[Column, Callable[[FrontPoint], str]]] = [
        (Column("schedule", is_text=True), model_name),
        *([(Column("sweep", is_text=True), _sweep_of(front))] if front.sweep_of else []),
        (Column("threshold", 6), threshold),
        *costs.values(),
        *sizes,
        (Column(SHORT_TITLES.get(quality, metric_title(quality))), partial(quality_text, front)),
        *([(Column("bits/byte", 5), number(bits, ".3f"))] if quality != bits else []),
        (Column("of full", 2), kept),
        (Column(f"vs {full}", 8), difference),
        (Column(f"P({KEPT_SHARE:.0%})", 9), keeps),
        (Column("P(front)", 10), _on_front),
        (Column("accepted", 12), share("decoding/acceptance", 0)),
        (Column("exact ms", 11), number("decoding/exact_ms_per_token", ".2f")),
        (Column("front", is_text=True), partial(verdict, front)),
    ]
    cells = [[cell(point) for point in front.shown] for _, cell in columns]
    shown = [n for n, (column, _) in enumerate(columns) if not column.priority or any(cells[n])]
    rows = tuple(
        Row(
            tuple(cells[n][number] for n in shown),
            kind=point.kind,
            key=point.result.key,
            schedule=point.result.schedule,
        )
        for number, point in enumerate(front.shown)
    )
    return Table(tuple(columns[n][0] for n in shown), rows, title)


def _sweep_of(front: Front) -> Callable[[FrontPoint], str]:
    return lambda point: front.sweep_of[point.result.key]


def _on_front(point: FrontPoint) -> str:
    return confidence_text(point.confidence.on_front) if point.confidence else ""


def task_tables(front: Front) -> list[Table]:
    """Return the table of the average, then of every task; none without values of single items."""
    if front.basis is None:
        return []
    quality, metrics = front.axes.quality, front.basis.metrics
    overall = {p.result.key: p.confidence.overall for p in front.points if p.confidence}
    tables = [_task_table(front, metric_title(quality), overall, is_percent=is_accuracy(quality))]
    if len(metrics) > 1 or not tables[0].rows:
        for task, metric in metrics.items():
            title = task if task == metric else f"{task} ({metric})"
            scores = {p.result.key: p.confidence.tasks[task] for p in front.points if p.confidence}
            tables.append(_task_table(front, title, scores, is_percent="bits" not in metric))
    return [table for table in tables if table.rows]


def _task_table(
    front: Front,
    title: str,
    comparisons: Mapping[str, PairedComparison | None],
    *,
    is_percent: bool,
) -> Table:
    found = [(p, one) for p in front.points if (one := comparisons.get(p.result.key))]
    others = list(dict.fromkeys(name for _, one in found for name in one.against))
    # The full model first; its own row comes without it.
    others.sort(key=lambda name: front.basis is not None and name != front.basis.full)
    score = "score %" if is_percent else "score"
    heads = (score, f"{INTERVAL_LEVEL:.0%} interval", *(f"vs {name}" for name in others))
    rows = []
    for point, one in found:
        differences = [
            difference_text(one.against[name], is_percent=is_percent) if name in one.against else ""
            for name in others
        ]
        own = format_with_error(one.own.value, None, is_percent=is_percent)
        cells = (full_name(front, point), own, range_text(one.own, is_percent=is_percent))
        rows.append(Row((*cells, *differences), kind=point.kind, key=point.result.key))
    columns = (Column("model", is_text=True), *(Column(head) for head in heads))
    return Table(columns, tuple(rows), title)


def model_table(front: Front, folder: Path | None = None) -> DataFrame:
    """Return the front's table with the place and the confidence of each model.

    The placed models come first, cheapest first. Numbers are rounded to twelve digits, which keep
    every measured one and drop the noise of binary fractions. For files in a `folder`, paths in its
    workspace are relative.
    """
    from pandas import DataFrame

    points = {point.result.key: point for point in front.points}
    known = {key: p.confidence.metrics() for key, p in points.items() if p.confidence}
    paired = [known.get(trial.key, {}) for trial in front.results]
    names = sorted({name for metrics in paired for name in metrics})
    table = front.table.loc[[trial.key for trial in front.results]]
    measured = [name for name in table.columns if "/" in name]
    places = {
        "on_front": [t.key in points and points[t.key].on_front for t in front.results],
        "verdict": [
            verdict(front, points[t.key]) if t.key in points else "not measured"
            for t in front.results
        ],
        "share_of_full": [
            front.share(points[t.key]) if t.key in points else None for t in front.results
        ],
    }
    sweep = ["sweep"] if "sweep" in table else []
    table = table.join(DataFrame(places, index=table.index))
    table = table.join(DataFrame(paired, index=table.index, columns=names))
    numbers = ["share_of_full", *measured, *names]
    table[numbers] = table[numbers].astype(float).map(_rounded)
    if root := folder and workspace_root(folder):
        table["checkpoint"] = [
            portable_path(path, root) if isinstance(path, str) else None
            for path in table["checkpoint"]
        ]
    described = ["name", *sweep, *DESCRIBING_COLUMNS[1:], *places]
    return table[[*described, *measured, *names, "key", "checkpoint", "run_id"]]


def model_rows(front: Front, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of `model_table`; missing numbers are None, as strict JSON asks."""
    table = model_table(front, folder).astype(object)
    rows: list[dict[str, Any]] = table.where(table.notna(), None).to_dict("records")
    return rows


def front_values(front: Front, folder: Path | None = None) -> dict[str, Any]:
    """Return axes, picks, hypervolume with its box, and every result, as values of strict JSON.

    Paths are absolute; for files in a `folder`, those in its workspace are relative.
    """
    picks = {"best": front.best, "knee": front.knee, "cheapest": front.cheapest}
    box = front.hypervolume_box
    results = []
    for row, trial in zip(model_rows(front, folder), front.results, strict=True):
        shown = Trial.model_validate(trial.stored_at(folder)) if folder else trial
        details = shown.model_dump(mode="json", exclude={"job", "suite"})
        results.append({**row, "details": details})
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "hypervolume": front.hypervolume,
        "hypervolume_box": box and {"cost": box.cost, "quality": [box.quality, box.full_quality]},
        "picks": {name: point and point.result.key for name, point in picks.items()},
        "front": [point.result.key for point in front.members],
        "confidence_basis": front.basis and asdict(front.basis),
        "results": results,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.12g}") if math.isfinite(value) else math.nan
