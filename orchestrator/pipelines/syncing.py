"""Publish a workspace in MLflow: every run and every registered model that its files describe.

Only what the store lacks is sent, so this may be repeated. In an empty store it makes all runs
again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from orchestrator.pipelines.context import open_context
from orchestrator.records.tracked_run import RegisteredModel, TrackedRun
from orchestrator.records.training_state import is_in_use
from orchestrator.records.trial import SweepTrials
from orchestrator.reporting.output import Result
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import recorded_times
from orchestrator.workspace.layout import PLAN_FILE, Workspace

MAX_NAMED = 20


class SyncResult(Result):
    """What was published in MLflow."""

    trainings: tuple[str, ...]
    """Folders of pretrainings that were published."""
    sweeps: tuple[str, ...]
    """Names of sweeps that were published, with their trials."""
    students: tuple[str, ...]
    """Folders of students that `distill` has made."""
    measurements: tuple[str, ...]
    """Evaluations, benchmarks and influence tables that were published."""
    models: tuple[str, ...]
    """Registered models that were published, as NAME@ALIAS."""

    def shown(self) -> Iterator[str]:
        yield (
            f"{format_count(len(self.trainings), 'pretraining')}, "
            f"{format_count(len(self.sweeps), 'sweep')}, "
            f"{format_count(len(self.students), 'student')} of `distill`, "
            f"{format_count(len(self.measurements), 'measurement')} and "
            f"{format_count(len(self.models), 'registered model')}"
        )


def sync(
    *,
    workspace: Workspace | Path | str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> SyncResult:
    """Publish all runs and registered models of a workspace.

    Running work is left to its own process. A damaged file is noted and left out.

    Args:
        replace: Delete the workspace's own store first.

    Raises:
        UserError: If MLflow does not know the store's address, a local store is damaged, or it came
            with a copied workspace; then the error names what replacing it would lose.
    """
    context = open_context(workspace, progress)
    space = context.workspace
    progress = context.progress
    if replace:
        if space.tracking_uri != f"sqlite:///{space.database}":
            raise UserError("--replace is for the workspace's own store; unset MLFLOW_TRACKING_URI")
        space.database.unlink(missing_ok=True)
        shutil.rmtree(space.artifacts, ignore_errors=True)
    tracking = context.tracking
    if tracking.open_experiment() is None and tracking.copied:
        added = tracking.added_by_people()
        lost = ", ".join(added[:MAX_NAMED]) or "no note, tag or alias of a person"
        lost += " and more" if len(added) > MAX_NAMED else ""
        raise UserError(f"{tracking.copied}: {lost}")

    runs: list[TrackedRun] = []
    files_of_trials = sorted(space.tracked.glob("*/*-*.json"))
    for path in sorted(space.tracked.glob("*.json")) + files_of_trials:
        if path.parent.name == "registered":
            continue
        try:
            run = TrackedRun.read(path)
        except UserError as error:
            progress.note(f"{path.stem} is not published: {error}")
            continue
        if run and (run.folder is None or Path(run.folder).is_dir()):
            runs.append(_as_left(run))
    # Running work, and the sweeps of running trials.
    locked = {run.identity for run in runs if run.folder and is_in_use(Path(run.folder))}
    locked |= {("sweep", parent, None) for _, _, parent in locked if parent}
    runs = [run for run in runs if run.identity not in locked]
    published: dict[str, list[str]] = {}
    progress.start("sync", len(runs))
    for number, (run, is_shown) in enumerate(zip(runs, tracking.show_in_mlflow(runs), strict=True)):
        progress.advance(number, run.name)
        if is_shown:
            name = Path(run.folder).name if run.folder else f"{run.kind}-{run.key}"
            published.setdefault(run.kind, []).append(name)

    models = []
    for path in sorted(space.tracked.glob("registered/*.json")):
        try:
            model = RegisteredModel.read(path)
        except UserError as error:
            progress.note(f"{path.stem} is not published: {error}")
            continue
        has_folder = model and Path(model.folder).is_dir()
        if model and has_folder and tracking.register(model, moves_alias=False):
            models.append(path.stem)
    progress.finish(format_count(len(runs), "run"))
    measurements: list[str] = []
    for kind in ("evaluation", "benchmark", "influence"):
        measurements += published.get(kind, ())
    return SyncResult(
        trainings=tuple(published.get("pretrain", ())),
        sweeps=tuple(published.get("sweep", ())),
        students=tuple(published.get("distill", ())),
        measurements=tuple(measurements),
        models=tuple(models),
    )


def _as_left(run: TrackedRun) -> TrackedRun:
    """Return a run as its process has left it: an unfinished run without a process was killed."""
    if run.status == "RUNNING":
        times = recorded_times(Path(run.journal)) if run.journal else None
        run = run.model_copy(update={"status": "KILLED", "ended_ms": times and times[1]})
    if run.kind == "sweep" and run.folder:
        with suppress(UserError):  # Its plan is damaged.
            plan = SweepTrials.read(Path(run.folder) / PLAN_FILE)
            if plan and plan.key != run.key:  # The files belong to another sweep of this name.
                return run.model_copy(update={"files": {}})
    return run
