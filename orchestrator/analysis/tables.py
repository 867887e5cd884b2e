"""The front as rows: for the terminal, for Markdown, for CSV, JSON and MLflow's table.

One list of columns serves all. People read rounded numbers with their errors, cheapest first;
machines get every number in full under its tracked name. The terminal's table drops columns from
the least telling on until it fits, and shortens long schedules by counting repetitions
(`3*4,1*20`), which is also how they are typed.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table

from orchestrator.analysis.pareto import Front, Placed
from orchestrator.analysis.style import is_accuracy, title_of

LONGEST_PLAIN_SCHEDULE = 16
SHOWN_COSTS = (
    "cost/evaluations",
    "cost/relative_flops",
    "cost/kv_bytes_per_token",
    "cost/decode_ms_per_token",
)


@dataclass(frozen=True)
class Column:
    """One column as people read it."""

    title: str
    """What stands above it."""
    cell: Callable[[Front, Placed], str]
    """Text of a cell; empty where there is nothing to say."""
    priority: int = 0
    """Columns of the highest numbers go first when room is short; 0 stays."""
    justify: Literal["left", "right"] = "right"


def columns_for(front: Front) -> list[Column]:
    """Return the columns of a front's table: what the models are, cost, quality, verdict."""
    quality = front.axes.quality
    columns = [
        Column("schedule", lambda _, p: model_name(p), justify="left"),
        Column("threshold", lambda _, p: _threshold(p), 6),
        Column("evals", lambda _, p: _number(p, "cost/evaluations", "g")),
        Column("FLOPs", lambda _, p: _percent(p.result.value("cost/relative_flops"), 0), 4),
        Column("KV/token", lambda _, p: _bytes(p.result.value("cost/kv_bytes_per_token")), 7),
        Column("ms/token", lambda _, p: _number(p, "cost/decode_ms_per_token", ".2f"), 3),
        Column(_short_title(quality), lambda f, p: quality_text(f, p)),
        Column("bits/byte", lambda _, p: _number(p, "quality/bits_per_byte", ".3f"), 5),
        Column("of full", lambda f, p: _percent(f.share(p), 1), 2),
        Column("front", lambda f, p: verdict(f, p), justify="left"),
    ]
    if quality == "quality/bits_per_byte":
        columns = [column for column in columns if column.priority != 5]
    cost = front.axes.cost
    if cost not in SHOWN_COSTS:
        columns.insert(2, Column(_short_title(cost), lambda _, p: _number(p, cost, ".4g")))
    return [c for c in columns if not c.priority or any(c.cell(front, p) for p in front.placed)]


def terminal_table(front: Front, *, width: int, title: str = "") -> Table:
    """Return the table of a front for a terminal, cheapest first; dim rows are dominated.

    Args:
        front: What to show.
        width: Columns of the terminal.
        title: Stands above the table.
    """
    columns = columns_for(front)
    while _width_of(front, columns) > width and any(column.priority for column in columns):
        columns.remove(max(columns, key=lambda column: column.priority))
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_justify = "left"
    for number, column in enumerate(columns):
        # Where even that is too wide, only the names are cut.
        least = None if number == 0 else _cells_of(front, column)
        table.add_column(column.title, justify=column.justify, no_wrap=True, min_width=least)
    for point in front.placed:
        table.add_row(*(column.cell(front, point) for column in columns), style=_style(point))
    return table


def markdown_table(front: Front) -> str:
    """Return the table of a front in Markdown; members of the front are bold."""
    columns = columns_for(front)
    lines = [
        "| " + " | ".join(column.title for column in columns) + " |",
        "|" + "|".join(" ---: " if c.justify == "right" else " --- " for c in columns) + "|",
    ]
    for point in front.placed:
        cells = [column.cell(front, point) for column in columns]
        if point.on_front:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def full_rows(front: Front) -> list[dict[str, Any]]:
    """Return every number of every result, one mapping a row, all with the same names.

    Placed results come first, cheapest first; those without a place follow. Missing numbers are
    None, so that the rows are strict JSON.
    """
    results = [(p.result, p) for p in front.placed] + [(r, None) for r in front.unplaced]
    metrics = sorted({name for result, _ in results for name in result.metrics()})
    rows = []
    for result, point in results:
        row: dict[str, Any] = {
            "name": result.name,
            "role": result.role,
            "method": result.method,
            "schedule": result.schedule_text,
            "threshold": result.threshold_text,
            "on_front": bool(point and point.on_front),
            "verdict": verdict(front, point) if point else "not measured",
            "share_of_full": _rounded(front.share(point)) if point else None,
        }
        row |= {name: _rounded(result.value(name)) for name in metrics}
        row |= {"key": result.key, "checkpoint": result.checkpoint, "run_id": result.run_id}
        rows.append(row)
    return rows


def csv_text(front: Front) -> str:
    """Return `full_rows` as CSV with a header."""
    rows = full_rows(front)
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def json_text(front: Front) -> str:
    """Return axes, picks, hypervolume with its box, and every result, as strict JSON."""
    picks = {"best": front.best, "knee": front.knee, "cheapest": front.cheapest}
    area = front.box
    return json.dumps(
        {
            "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
            "hypervolume": front.hypervolume,
            "hypervolume_box": area
            and {"cost": area.cost, "quality": [area.quality, area.full_quality]},
            "picks": {name: point and point.result.key for name, point in picks.items()},
            "front": [point.result.key for point in front.members],
            "results": [
                {**row, **{"details": result.to_dict()}}
                for row, result in zip(
                    full_rows(front),
                    [*(p.result for p in front.placed), *front.unplaced],
                    strict=True,
                )
            ],
        },
        indent=2,
        allow_nan=False,
    )


def model_name(point: Placed) -> str:
    """Return what a row is called: a label of its own, or the schedule."""
    result = point.result
    is_named = result.label and result.label != result.schedule_text
    return result.label if is_named else short_schedule(result.schedule) or result.name


def short_schedule(schedule: Sequence[int] | None) -> str:
    """Return a schedule as it is typed; a long one with repetitions counted: `3*4,1*20`."""
    plain = ",".join(str(r) for r in schedule or ())
    if len(plain) <= LONGEST_PLAIN_SCHEDULE:
        return plain
    runs = [(r, len(list(same))) for r, same in groupby(schedule or ())]
    return ",".join(f"{r}*{count}" if count > 1 else str(r) for r, count in runs)


def quality_text(front: Front, point: Placed) -> str:
    """Return a quality with its standard error, an accuracy in percent: `44.4 ± 1.2`."""
    percent = is_accuracy(front.axes.quality)
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    text = f"{scale * point.quality:.{digits}f}"
    return text if not point.error else f"{text} ± {scale * point.error:.{digits}f}"


def verdict(front: Front, point: Placed) -> str:
    """Return what the front says about a model: a pick, on the front, dominated, or its role."""
    if not point.is_candidate:
        beaten = len(front.beaten_by(point))
        return f"beats {beaten} ●" if beaten else ""
    if not point.on_front:
        return ""
    picks = [("knee", front.knee), ("best", front.best), ("cheapest", front.cheapest)]
    names = [name for name, pick in picks if pick is point]
    return " ".join(["●", *names])


def _short_title(name: str) -> str:
    short = {"quality/accuracy": "accuracy %", "quality/bits_per_byte": "bits/byte"}
    short |= {"quality/validation_loss": "loss", "cost/flops_per_token": "FLOPs/token"}
    return short.get(name, title_of(name))


def _number(point: Placed, name: str, form: str) -> str:
    value = point.result.value(name)
    return "" if value is None else f"{value:{form}}"


def _threshold(point: Placed) -> str:
    """Return the largest threshold that gives the schedule: what one would type to get it."""
    text = point.result.threshold_text
    return text if text.startswith(">") else text.removeprefix("<=").rpartition(" to ")[2]


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}%"


def _bytes(count: float | None) -> str:
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1024 or unit == "MB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def _rounded(value: float | None) -> float | None:
    # Twelve digits keep every measured number and drop the noise of binary fractions.
    return None if value is None or not math.isfinite(value) else float(f"{value:.12g}")


def _style(point: Placed) -> str:
    if not point.is_candidate:
        return "cyan"
    if point.on_front:
        return "bold"
    return "" if point.result.role == "teacher" else "dim"


def _width_of(front: Front, columns: Sequence[Column]) -> int:
    """Return the terminal cells that the table takes: two behind each column, one before all."""
    return sum(_cells_of(front, column) + 2 for column in columns) + 1


def _cells_of(front: Front, column: Column) -> int:
    texts = [column.title, *(column.cell(front, point) for point in front.placed)]
    return max(cell_len(text) for text in texts)
