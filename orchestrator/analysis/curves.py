"""Losses of a sweep's trials while they were trained, read from their journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.analysis.page import Curve
from orchestrator.analysis.pareto import Front
from orchestrator.analysis.results import SweepResults
from orchestrator.analysis.texts import full_name
from orchestrator.journal import read_journal

VALIDATION_METRIC = "validation/loss"


def curves_of(sweep: SweepResults, front: Front) -> Mapping[str, Sequence[Curve]]:
    """Return the validation losses of the trials while they were trained, cheapest trial first."""
    known = {result.key for result in sweep.results}
    series = []
    for point in front.placed:
        folder = sweep.journal_of(point.result) if point.result.key in known else None
        if point.result.role != "trial" or folder is None:
            continue
        records, _ = read_journal(folder)
        # A run that was interrupted repeats some steps; the last record of a step counts.
        points = {
            record["step"]: float(record["values"][VALIDATION_METRIC])
            for record in records
            if record.get("kind") == "metrics" and VALIDATION_METRIC in record["values"]
        }
        if len(points) > 1:
            series.append((full_name(front, point), sorted(points.items())))
    return {"Validation loss while training": series} if series else {}
