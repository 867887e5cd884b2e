"""The front of a sweep in MLflow while the sweep runs: picture, note and chart view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.reporting.charts import save_chart
from orchestrator.reporting.mlflow_report import ARTIFACT_FOLDER, front_chart_view, run_note
from orchestrator.reporting.pareto import Front
from orchestrator.reporting.report import SweepReport
from orchestrator.reporting.training_curves import STUDENT_CHARTS
from orchestrator.tracking import NOTE_TAG, VIEW_TAG, view_tag

BEATEN_NOTE = "Models that another one beats are left out until the end."


def front_so_far(front: Front, *, name: str, notes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Draw a front, and return what it changes of its sweep's run, for `TrackedRun.changed`.

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
    pictures = save_chart(report.front_chart(), folder / "front", kinds=("svg",))
    view = front_chart_view(report)
    return {
        "files": {ARTIFACT_FOLDER: [str(path) for path in pictures]},
        "views": dict([view_tag(view)]),
        "tags": {NOTE_TAG: run_note(report), VIEW_TAG: view.key},
    }
