"""A front as text, tables and data: for the terminal, Markdown, HTML, CSV and strict JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from orchestrator.records.metrics import (
    BITS_PER_BYTE,
    CONFIDENCE_ON_FRONT,
    DECODE_MS,
    DECODE_MS_SPREAD,
    KV_BYTES,
    NFE,
    NUM_PARAMETERS,
    OVERHEAD_MS,
    OVERHEAD_NFE,
    OVERHEAD_NFE_SHARE,
    PAIRED,
    RELATIVE_FLOPS,
    metric_of,
)
from orchestrator.records.trial import SOURCE, Trial
from orchestrator.reporting.front import (
    MAX_TIME_SPREAD,
    Front,
    PlacedModel,
    relative_time_spread,
    retention_reference,
)
from orchestrator.reporting.retention import loss_text, lost_words, retention_verdict
from orchestrator.reporting.sections import Column, Table, TableRow
from orchestrator.reporting.statistics import (
    DEMANDED_SHARE,
    INTERVAL_LEVEL,
    Interval,
)
from orchestrator.terminal.render import format_with_error, scale_and_digits
from orchestrator.workspace.layout import portable_path, workspace_root

NOTABLE_SIZE_RATIO = 1.1
"""The mix of a method adds less than this to a model; otherwise a column shows parameters."""
COST_COLUMNS = {
    NFE: 0,
    RELATIVE_FLOPS: 4,
    KV_BYTES: 7,
    DECODE_MS: 3,
}
"""Costs with a column of their own, in this order -> priority of the column."""
OVERHEAD_COLUMNS = {OVERHEAD_NFE: 14, OVERHEAD_MS: 13, OVERHEAD_NFE_SHARE: 5}
"""Costs beyond vanilla -> priority of the column."""
BUSY_MARK = "*"
"""Stands behind a time per token that varied too much to decide anything."""
TASK_TABLES_NOTE = (
    f"Scores, and differences over the same items, have their {INTERVAL_LEVEL:.0%} intervals. "
    "Differences of an accuracy are in points. Each interval is of one comparison by itself: of "
    "twenty equal models, one has an interval without zero. Models that are tied, corrected for "
    "their number, are named above."
)


def quality_text(front: Front, model: PlacedModel) -> str:
    """Return a quality with its standard error, an accuracy in percent: `44.4 ± 1.2`."""
    is_percent = front.axes.quality_metric.is_percent
    return format_with_error(model.quality, model.error, is_percent=is_percent)


def difference_text(interval: Interval, *, is_percent: bool) -> str:
    """Return a difference with its interval: `-0.9 (-2.1 to +0.3)`, shares in points."""
    scale, digits = scale_and_digits(interval.value, is_percent=is_percent)

    def signed(number: float) -> str:
        text = f"{scale * number:+.{digits}f}"
        return text[1:] if float(text) == 0 else text

    return f"{signed(interval.value)} ({signed(interval.low)} to {signed(interval.high)})"


def cost_text(cost: float) -> str:
    """Return a cost with four digits, or all digits if it is in the thousands or millions."""
    return f"{cost:,.0f}" if 1000 <= cost < 1e7 else f"{cost:.4g}"


def confidence_text(share: float | None) -> str:
    """Return a confidence with two digits; never 0 or 1, which no measurement can show."""
    if share is None:
        return ""
    if share > 0.99:
        return ">0.99"
    return "<0.01" if share < 0.01 else f"{share:.2f}"


def row_kind(model: PlacedModel) -> str:
    """Return how tables show a model: `baseline`, `member`, `full` or `dominated`."""
    if not model.is_candidate:
        return "baseline"
    if model.on_front:
        return "member"
    return "full" if model.role == "teacher" else "dominated"


def models_table(front: Front, title: str = "", *, has_overhead: bool = False) -> Table:
    """Return the table of the shown models: schedule, costs, qualities, confidences, place.

    The columns of the front's axes are never dropped, and empty ones are left out.

    Args:
        front: The models.
        title: Title of the table.
        has_overhead: Show the costs beyond vanilla of the same shape, as the paper's claims do.
    """
    axes = front.axes
    is_percent = axes.quality_metric.is_percent
    full = front.basis.full if front.basis else "full"
    columns: list[tuple[Column, Callable[[PlacedModel], str | None]]] = []

    def add_number(priority: int, name: str) -> None:
        """Add a column of a metric, the time per token with its spread."""

        def cell(model: PlacedModel) -> str | None:
            number = model.number(name)
            if number is None:
                return None
            spread = model.number(DECODE_MS_SPREAD) if name == DECODE_MS else None
            if spread is None:
                return metric.format(number)
            mark = f" {BUSY_MARK}" if (relative_time_spread(model) or 0) > MAX_TIME_SPREAD else ""
            return f"{metric.format(number)} ± {metric.format(spread)}{mark}"

        metric = metric_of(name)
        is_axis = name in (axes.quality, axes.cost)
        columns.append((Column(metric.heading, 0 if is_axis else priority), cell))

    def threshold(model: PlacedModel) -> str:
        # The largest threshold that gives the schedule, which a user would type.
        text = model.trial.threshold_text
        return text if text.startswith(">") else text.removeprefix("<=").rpartition(" to ")[2]

    def share_of_full(model: PlacedModel) -> str | None:
        share = front.share_of_full(model)
        return None if share is None else f"{share:.1%}"

    def difference(model: PlacedModel) -> str | None:
        interval = front.intervals.get((model.key, axes.quality, full))
        return difference_text(interval, is_percent=is_percent) if interval else None

    def retention(model: PlacedModel) -> str:
        return retention_verdict(front.losses.get(model.key, ()))

    def lost(model: PlacedModel) -> str:
        return lost_words(front.losses.get(model.key, ()))

    def keeps(model: PlacedModel) -> str | None:
        return None if model is front.full else confidence_text(front.confidence_keeps(model))

    def is_on_front(model: PlacedModel) -> str:
        return confidence_text(model.number(CONFIDENCE_ON_FRONT))

    def left_out(model: PlacedModel) -> str:
        """Return the schedule that says which layers are left out, if the label says how many."""
        schedule = model.trial.teacher_schedule or ""
        return "" if schedule in model.label else schedule

    columns.append((Column("schedule", is_text=True), lambda model: model.label))
    columns.append((Column("left out (x)", 3, is_text=True), left_out))
    if front.sweeps:
        columns.append((Column("sweep", is_text=True), lambda model: model.sweep))
    columns.append((Column("threshold", 9), threshold))
    if axes.cost not in COST_COLUMNS:
        add_number(0, axes.cost)
    for name, priority in (COST_COLUMNS | (OVERHEAD_COLUMNS if has_overhead else {})).items():
        add_number(priority, name)
    if len({model.config.num_layers for model in front.placed}) > 1:
        columns.append((Column("layers", 4), lambda model: str(model.config.num_layers)))
    counts = [count for model in front.placed if (count := model.number(NUM_PARAMETERS))]
    if counts and max(counts) >= NOTABLE_SIZE_RATIO * min(counts):
        add_number(4, NUM_PARAMETERS)
    columns.append((Column(axes.quality_metric.heading), lambda model: quality_text(front, model)))
    if axes.quality != BITS_PER_BYTE:
        add_number(5, BITS_PER_BYTE)
    columns.append((Column(f"of {front.full.label if front.full else 'full'}", 2), share_of_full))
    columns.append((Column(f"vs {full} ({INTERVAL_LEVEL:.0%})", 6), difference))
    columns.append((Column("retention", 1, is_text=True), retention))
    reference = retention_reference(front)
    role = reference.role if reference else SOURCE
    heading = f"lost against {role} ({INTERVAL_LEVEL:.0%})"
    columns.append((Column(heading, 7, is_text=True), lost))
    columns.append((Column(f"P({DEMANDED_SHARE:.0%})", 8), keeps))
    columns.append((Column("P(front)", 10), is_on_front))
    columns.append((Column("front", is_text=True), front.verdict))

    cells = [(column, [cell(model) or "" for model in front.placed]) for column, cell in columns]
    shown = [(column, texts) for column, texts in cells if not column.priority or any(texts)]
    rows = [
        TableRow([texts[number] for _, texts in shown], kind=row_kind(model), key=model.key)
        for number, model in enumerate(front.placed)
    ]
    return Table([column for column, _ in shown], rows, title)


def task_tables(front: Front) -> list[Table]:
    """Return the table of the average, then of every task; none without values of single items."""
    if front.basis is None:
        return []
    metrics = front.basis.metrics
    quality = front.axes.quality_metric
    average = _task_table(front, quality.name, quality.title, is_percent=quality.is_percent)
    if len(metrics) == 1 and average.rows:
        return [average]
    tables = [average]
    for task, metric in metrics.items():
        title = task if task == metric else f"{task} ({metric})"
        tables.append(_task_table(front, task, title, is_percent="bits" not in metric))
    return [table for table in tables if table.rows]


def _task_table(front: Front, measured: str, title: str, *, is_percent: bool) -> Table:
    """Return scores, and their differences to other models, on a task or a quality."""
    full = front.basis.full if front.basis else ""
    compared_with = dict.fromkeys(
        other_label for _, name, other_label in front.intervals if name == measured and other_label
    )
    # The full model first; its own row comes without it.
    names = sorted(compared_with, key=lambda name: name != full)
    rows = []
    for model in front.placed:
        score = front.intervals.get((model.key, measured, ""))
        if score is None:
            continue
        scale, digits = scale_and_digits(score.value, is_percent=is_percent)
        cells = [
            model.label,
            format_with_error(score.value, None, is_percent=is_percent),
            f"{scale * score.low:.{digits}f} to {scale * score.high:.{digits}f}",
        ]
        for name in names:
            difference = front.intervals.get((model.key, measured, name))
            text = difference_text(difference, is_percent=is_percent) if difference else ""
            cells.append(text)
        rows.append(TableRow(cells, kind=row_kind(model), key=model.key))
    columns = [Column("model", is_text=True), Column("score %" if is_percent else "score")]
    columns += [Column(f"{INTERVAL_LEVEL:.0%} interval")]
    columns += [
        Column(f"vs {name} ({INTERVAL_LEVEL:.0%})", priority) for priority, name in enumerate(names)
    ]
    return Table(columns, rows, title)


def model_rows(front: Front, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return what files, JSON and tables of pandas have of each model: what describes it, its
    place, its numbers and its confidence. All have the same names; a missing number is None.

    Numbers are rounded to twelve digits, which keep every measured one and drop the noise of binary
    fractions. For files in a `folder`, paths in its workspace are relative.
    """
    root = workspace_root(folder) if folder else None
    names = {name for model in front.models for name in model.numbers}
    # What is known over the items that all models answered comes last.
    numbers = sorted(names, key=lambda name: (name.startswith(PAIRED), name))
    rows = []
    for model in front.models:
        trial = model.trial
        share = front.share_of_full(model) if isinstance(model, PlacedModel) else None
        described: dict[str, Any] = {"name": trial.name}
        if front.sweeps:
            described["sweep"] = model.sweep
        described |= {
            "role": trial.role,
            "method": trial.method,
            "num_layers": trial.model.num_layers,
            "schedule": trial.schedule_text,
            "threshold": trial.threshold_text,
            "on_front": isinstance(model, PlacedModel) and model.on_front,
            "verdict": front.verdict(model),
            "share_of_full": rounded(share),
        }
        if front.losses:
            described["retention"] = loss_text(front.losses.get(model.key, ()))
        checkpoint = trial.checkpoint
        if checkpoint and root:
            checkpoint = portable_path(checkpoint, root)
        rows.append(
            {
                **described,
                **{name: rounded(model.numbers.get(name)) for name in numbers},
                "key": model.key,
                "checkpoint": checkpoint,
                "run_id": trial.run_id,
            }
        )
    return rows


def models_csv(front: Front, folder: Path | None = None) -> str:
    """Return `model_rows` as CSV."""
    rows = model_rows(front, folder)
    text = StringIO()
    writer = csv.DictWriter(text, [*rows[0]] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def interval_rows(front: Front) -> list[dict[str, str | float]]:
    """Return one row for each difference of two models, on the front's quality and each task."""
    labels = {model.key: model.label for model in front.models}
    return [
        {
            "model": labels[key],
            "against": other_label,
            "measured": measured,
            "difference": interval.value,
            "low": interval.low,
            "high": interval.high,
        }
        for (key, measured, other_label), interval in front.intervals.items()
        if other_label
    ]


def front_values(front: Front, folder: Path | None = None) -> dict[str, Any]:
    """Return axes, picks and every result, as values of strict JSON.

    Paths are absolute; for files in a `folder`, paths in its workspace are relative.
    """
    results = []
    for row, model in zip(model_rows(front, folder), front.models, strict=True):
        trial = model.trial
        shown = Trial.model_validate(trial.stored_at(folder)) if folder else trial
        details = shown.model_dump(mode="json", exclude={"job", "suite"})
        results.append({**row, "details": details})
    picks = {name: front.picks.get(name) for name in ("best", "knee", "cheapest")}
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "picks": {name: pick and pick.key for name, pick in picks.items()},
        "front": [member.key for member in front.members],
        "confidence_basis": front.basis and asdict(front.basis),
        "retention": {
            key: [loss.to_json() for loss in losses] for key, losses in front.losses.items()
        },
        "results": results,
    }


def rounded(value: float | None) -> float | None:
    """Return a number with twelve digits; None if it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.12g}")
