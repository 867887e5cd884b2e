"""Losses of a sweep's models while they were trained, read from their journals.

Students are shown by their validation loss; where they were validated too seldom for a curve, by
their divergence from the teacher, else by the loss they were trained with. Full model and
references have a chart of their own: they start from nothing and would flatten all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.analysis.page import Curve
from orchestrator.analysis.pareto import Front, Placed
from orchestrator.analysis.results import SweepResults
from orchestrator.analysis.texts import full_name
from orchestrator.journal import read_journal

VALIDATION_METRIC = "validation/loss"
STUDENT_CHARTS = {
    "Validation loss while training": VALIDATION_METRIC,
    "Divergence from the teacher (KL) while training": "train/kl",
    "Loss while training": "train/loss",
}
"""Title and metric; the first that there is a curve for."""
REFERENCE_CHART = "Validation loss of full model and references"
MOST_POINTS = 400
"""Of one curve; more than a page can show."""


def curves_of(sweep: SweepResults, front: Front) -> Mapping[str, Sequence[Curve]]:
    """Return the losses while the models were trained, by title of the chart, cheapest first."""
    known = {result.key for result in sweep.results}
    own = [
        (point, folder)
        for point in front.placed
        if point.result.key in known and (folder := sweep.journal_of(point.result))
    ]
    trials = [pair for pair in own if pair[0].result.role == "trial"]
    others = [pair for pair in own if pair[0].result.role != "trial"]
    charts: dict[str, Sequence[Curve]] = {}
    for title, metric in STUDENT_CHARTS.items():
        if series := _series(front, trials, metric):
            charts[title] = series
            break
    if series := _series(front, others, VALIDATION_METRIC):
        charts[REFERENCE_CHART] = series
    return charts


def _series(front: Front, models: Sequence[tuple[Placed, Path]], metric: str) -> list[Curve]:
    found = [(full_name(front, point), _points(folder, metric)) for point, folder in models]
    return [(name, points) for name, points in found if len(points) > 1]


def _points(folder: Path, metric: str) -> list[tuple[int, float]]:
    records, _ = read_journal(folder)
    # A run that was interrupted repeats some steps; the last record of a step counts.
    points = {
        record["step"]: float(record["values"][metric])
        for record in records
        if record.get("kind") == "metrics" and metric in record["values"]
    }
    every = -(-len(points) // MOST_POINTS)
    return sorted(points.items())[:: max(every, 1)]
