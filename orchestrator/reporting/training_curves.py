"""Training losses of a sweep's models, and its hypervolume over time, read from journals.

The full model and the baselines have their own chart, because they start from random weights and
would flatten the students' curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.reporting.front import Front
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC, read_journal

Curve = tuple[str, Sequence[tuple[int, float]]]
"""A name and its points: step and value."""
HYPERVOLUME_BY_TRIALS = "sweep/hypervolume"
"""Metric whose step is the number of finished models."""
HYPERVOLUME_BY_GFLOPS = "sweep/hypervolume_by_gflops"
"""Metric whose step is the training so far in 1e9 FLOPs, rounded."""
STUDENT_CHARTS = {
    "Validation loss while training": VALIDATION_METRIC,
    "Divergence from the teacher (KL) while training": "train/kl",
    "Loss while training": "train/loss",
}
"""Title -> metric; the report shows the first chart that has a curve. Short trainings are validated
too rarely for the first one."""
BASELINE_CHART = "Validation loss of full model and baselines"
ACCURACY_CHARTS = (
    "Validation accuracy while training",
    "Validation accuracy of full model and baselines",
)
"""Titles for the students, and for the others; only where data have answers."""
HISTORY_CHARTS = {
    "Hypervolume against trials finished": HYPERVOLUME_BY_TRIALS,
    "Hypervolume against training in GFLOPs": HYPERVOLUME_BY_GFLOPS,
}
"""Title -> metric; the horizontal axis is named after the word `against`."""
MAX_CURVE_POINTS = 400
"""A page cannot show more."""


def read_training_curves(sweep: StoredSweep, front: Front) -> Mapping[str, Sequence[Curve]]:
    """Return the losses during training by chart title, cheapest model first, a curve per seed."""
    students: list[tuple[str, Path]] = []
    others: list[tuple[str, Path]] = []
    own = {result.key for result in sweep.results}
    rows = front.shown
    if len(rows) < len(front.rows):  # Of so many, a chart shows those that matter.
        rows = [row for row in rows if row["on_front"] or row["role"] != "trial"]
    for row in rows:
        seeds = [seed for seed in row["seeds"] if seed.key in own]
        for result in seeds:
            name = row["label"] + (f", seed {result.seed}" if len(seeds) > 1 else "")
            if folder := sweep.journal_of(result):
                (students if result.role == "trial" else others).append((name, folder))
    charts: dict[str, Sequence[Curve]] = {}
    for title, metric in STUDENT_CHARTS.items():
        if curves := _read_curves(students, metric):
            charts[title] = curves
            break
    if curves := _read_curves(others, VALIDATION_METRIC):
        charts[BASELINE_CHART] = curves
    for title, runs in zip(ACCURACY_CHARTS, (students, others), strict=True):
        if curves := _read_curves(runs, ACCURACY_METRIC):
            charts[title] = curves
    return charts


def read_history_curves(folder: Path) -> Mapping[str, Sequence[Curve]]:
    """Return the hypervolume while the sweep ran, by chart title; see `history_folder`."""
    charts = {title: _read_curves([("front", folder)], m) for title, m in HISTORY_CHARTS.items()}
    return {title: curves for title, curves in charts.items() if curves}


def history_folder(sweep_folder: Path, plan_key: str) -> Path:
    """Return the folder of a sweep's hypervolume journal; each plan of a sweep has its own."""
    return sweep_folder / "history" / plan_key


def _read_curves(journals: Sequence[tuple[str, Path]], metric: str) -> list[Curve]:
    curves = [(name, _read_points(folder, metric)) for name, folder in journals]
    return [(name, points) for name, points in curves if len(points) > 1]


def _read_points(folder: Path, metric: str) -> list[tuple[int, float]]:
    records, _ = read_journal(folder)
    # A resumed run repeats some steps; the last record of a step counts.
    points = {
        record["step"]: float(record["values"][metric])
        for record in records
        if record.get("kind") == "metrics" and metric in record["values"]
    }
    every = -(-len(points) // MAX_CURVE_POINTS)
    return sorted(points.items())[:: max(every, 1)]
