"""The front as data for other programs: all metrics of all results as rows, CSV and strict JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestrator.reporting.elastic_section import ElasticSection
from orchestrator.reporting.front_text import verdict
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.results import DESCRIBING_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame


def model_table(front: Front) -> DataFrame:
    """Return the front's table with the place and the confidence of each model.

    The placed models come first, cheapest first. Numbers are rounded to twelve digits, which keep
    every measured one and drop the noise of binary fractions.
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
    described = ["name", *sweep, *DESCRIBING_COLUMNS[1:], *places]
    return table[[*described, *measured, *names, "key", "checkpoint", "run_id"]]


def model_rows(front: Front) -> list[dict[str, Any]]:
    """Return the rows of `model_table`; missing numbers are None, as strict JSON asks."""
    table = model_table(front).astype(object)
    rows: list[dict[str, Any]] = table.where(table.notna(), None).to_dict("records")
    return rows


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
            for row, result in zip(model_rows(front), front.results, strict=True)
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.12g}") if math.isfinite(value) else math.nan
