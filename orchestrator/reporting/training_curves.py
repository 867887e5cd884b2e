"""Losses of a sweep's models while they were trained, and its front over time, from journals.

Students are shown by their validation loss; where they were validated too seldom for a curve, by
their divergence from the teacher, else by the loss they were trained with. Full model and
baselines have a chart of their own: they start from nothing and would flatten all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.reporting.front_text import full_name
from orchestrator.reporting.html_page import Curve
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.seed_averages import average_seeds
from orchestrator.reporting.sweep_results import SweepResults
from orchestrator.workspace.journal import read_journal

HYPERVOLUME_BY_TRIALS = "sweep/hypervolume"
"""Metric whose step is the number of models finished."""
HYPERVOLUME_BY_GFLOPS = "sweep/hypervolume_by_gflops"
"""Metric whose step is the training so far in 1e9 FLOPs, rounded."""
VALIDATION_METRIC = "validation/loss"
STUDENT_CHARTS = {
    "Validation loss while training": VALIDATION_METRIC,
    "Divergence from the teacher (KL) while training": "train/kl",
    "Loss while training": "train/loss",
}
"""Title and metric; the first that there is a curve for."""
BASELINE_CHART = "Validation loss of full model and baselines"
HISTORY_CHARTS = {
    "Hypervolume against trials finished": HYPERVOLUME_BY_TRIALS,
    "Hypervolume against training in GFLOPs": HYPERVOLUME_BY_GFLOPS,
}
"""Title and metric; what stands behind `against` names the horizontal axis."""
MOST_POINTS = 400
"""Of one curve; more than a page can show."""


def read_training_curves(sweep: SweepResults, front: Front) -> Mapping[str, Sequence[Curve]]:
    """Return the losses while the models were trained, by title of the chart, cheapest first; each
    seed of a model has a curve of its own."""
    trials: list[tuple[str, Path]] = []
    others: list[tuple[str, Path]] = []
    members = average_seeds(sweep.results).keys_of_seeds
    results = {result.key: result for result in sweep.results}
    for point in front.points:
        seeds = members.get(point.result.key, ())
        for result in (results[key] for key in seeds):
            name = full_name(front, point)
            if len(seeds) > 1:
                name += f", seed {result.seed}"
            if folder := sweep.journal_of(result):
                (trials if result.role == "trial" else others).append((name, folder))
    charts: dict[str, Sequence[Curve]] = {}
    for title, metric in STUDENT_CHARTS.items():
        if series := _series(trials, metric):
            charts[title] = series
            break
    if series := _series(others, VALIDATION_METRIC):
        charts[BASELINE_CHART] = series
    return charts


def read_history_curves(folder: Path) -> Mapping[str, Sequence[Curve]]:
    """Return how the front grew while its sweep ran, by title of the chart.

    Args:
        folder: Of the journal; see `orchestrator.sweeping.front_history.history_folder`.
    """
    charts = {title: _points(folder, metric) for title, metric in HISTORY_CHARTS.items()}
    return {title: [("front", points)] for title, points in charts.items() if len(points) > 1}


def _series(models: Sequence[tuple[str, Path]], metric: str) -> list[Curve]:
    found = [(name, _points(folder, metric)) for name, folder in models]
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


def history_folder(sweep_folder: Path, plan_key: str) -> Path:
    """Return where the journal lies; another plan under the same name has another one."""
    return sweep_folder / "history" / plan_key
