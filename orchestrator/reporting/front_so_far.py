"""The front of a sweep in MLflow while the sweep runs: picture, note and chart view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.reporting.charts import front_chart, save_chart
from orchestrator.reporting.mlflow_report import ARTIFACT_FOLDER, front_chart_view, run_note
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.report_content import SweepReport
from orchestrator.reporting.training_curves import STUDENT_CHARTS
from orchestrator.tracking import NOTE_TAG, VIEW_TAG, TrackedRun, Tracking

BEATEN_NOTE = "Models that another one beats are left out until the end."


def track_front_so_far(
    tracking: Tracking,
    run: TrackedRun,
    front: Front,
    *,
    name: str,
    notes: Sequence[str],
    folder: Path,
) -> None:
    """Log a front to the run of its sweep, in place of an earlier one; never wait for the store.

    Args:
        name: Name of the sweep.
        notes: Sentences that come first.
        folder: Folder of the picture, `front.svg`.
    """
    report = SweepReport(
        name=name,
        front=front,
        notes=[*notes, BEATEN_NOTE],
        curves=dict.fromkeys(STUDENT_CHARTS, ()),  # They are in the trials' runs.
    )
    chart = front_chart(front, title=report.title, mark_paper=report.mark_paper)
    for path in save_chart(chart, folder / "front", kinds=("svg",)):
        run.log_artifact(path, ARTIFACT_FOLDER)
    view = front_chart_view(report)
    tracking.save_view(view)
    run.set_tags({NOTE_TAG: run_note(report, run.known_id), VIEW_TAG: view.key})
