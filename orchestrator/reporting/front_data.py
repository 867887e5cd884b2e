"""The front as data for other programs: all metrics of all results as rows, CSV and strict JSON."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from typing import Any

from orchestrator.reporting.elastic_section import ElasticSection
from orchestrator.reporting.front_text import verdict
from orchestrator.reporting.pareto import Front


def front_rows(front: Front) -> list[dict[str, Any]]:
    """Return all metrics of every result, in the order of `Front.results`.

    All rows have the same names. Missing numbers are None, as strict JSON asks.
    """
    points = {point.result.key: point for point in front.points}
    paired = {key: p.confidence.metrics() for key, p in points.items() if p.confidence}
    names = sorted({name for result in front.results for name in result.metrics()})
    names += sorted({name for metrics in paired.values() for name in metrics})
    rows = []
    for result in front.results:
        point = points.get(result.key)
        row: dict[str, Any] = {
            "name": result.name,
            **({"sweep": front.sweep_of[result.key]} if front.sweep_of else {}),
            "role": result.role,
            "method": result.method,
            "num_layers": result.model.num_layers,
            "schedule": result.schedule_text,
            "threshold": result.threshold_text,
            "on_front": bool(point and point.on_front),
            "verdict": verdict(front, point) if point else "not measured",
            "share_of_full": _rounded(front.share(point)) if point else None,
        }
        metrics = {**result.metrics(), **paired.get(result.key, {})}
        row |= {name: _rounded(metrics.get(name)) for name in names}
        row |= {"key": result.key, "checkpoint": result.checkpoint, "run_id": result.run_id}
        rows.append(row)
    return rows


def front_csv(front: Front) -> str:
    """Return `front_rows` as CSV with a header."""
    rows = front_rows(front)
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def front_values(front: Front, elastic: ElasticSection | None = None) -> dict[str, Any]:
    """Return axes, picks, hypervolume with its box, and every result, as values of strict JSON.

    With `elastic`, also elastic weights against separate students.
    """
    picks = {"best": front.best, "knee": front.knee, "cheapest": front.cheapest}
    box = front.hypervolume_box
    box_json = box and {"cost": box.cost, "quality": [box.quality, box.full_quality]}
    return {
        "axes": {"cost": front.axes.cost, "quality": front.axes.quality},
        "hypervolume": front.hypervolume,
        "hypervolume_box": box_json,
        "picks": {name: point and point.result.key for name, point in picks.items()},
        "front": [point.result.key for point in front.members],
        "confidence_basis": front.basis and asdict(front.basis),
        **({"elastic": elastic.to_dict()} if elastic else {}),
        "results": [
            {**row, "details": result.model_dump(mode="json", exclude={"job", "suite"})}
            for row, result in zip(front_rows(front), front.results, strict=True)
        ],
    }


def _rounded(value: float | None) -> float | None:
    # Twelve digits keep every measured number and drop the noise of binary fractions.
    return None if value is None or not math.isfinite(value) else float(f"{value:.12g}")
