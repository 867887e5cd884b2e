"""The experiment as the pipelines use it: open, find runs by their keys, links, chart views."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.records.measurement import Measurement, TrackedModel
from orchestrator.tracking.chart_view import VIEW_TAG_PREFIX, ChartView
from orchestrator.tracking.delivery import Delivery, Warn
from orchestrator.tracking.links import Links
from orchestrator.tracking.store import FAILURES, RunIdentity
from orchestrator.tracking.tracked_run import TrackedRun, metric_points
from orchestrator.workspace.errors import UserError, first_line, is_disk_full
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace

VIEW_TAG = "iiet.chart_view"
REPORT_TAG = "iiet.report"


@dataclass(frozen=True)
class TrackedSweep:
    """A sweep's run, for links to it."""

    name: str
    run_id: str
    view: str | None
    """Key of its chart view; None before its first report."""
    report: str | None
    """Path of the report's page among its artifacts; None before its first report."""


@dataclass(frozen=True, kw_only=True)
class NestedRun:
    """A run in a sweep's run, with all that is known of it."""

    key: str
    kind: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    journal_folder: Path | None = None
    """Folder of the journal whose new metrics are copied."""
    dataset: tuple[str, str, Mapping[str, Any]] | None = None
    """Name, digest and profile, as `TrackedRun.log_dataset` takes them."""
    status: str = "FINISHED"
    """RUNNING, FINISHED, FAILED or KILLED."""
    started_ms: int | None = None
    """When it started, in ms; now when unset."""
    ended_ms: int | None = None
    """When it ended, if it has; now when unset."""
    model: TrackedModel | None = None
    """What was made or measured."""


class Tracking:
    """One experiment. Only `TrackedRun.finish` and what returns something wait for the store."""

    def __init__(
        self, workspace: Workspace, *, warn: Warn | None = None, loggers: Collection[str] = ()
    ) -> None:
        """Name the store; `open_tracking` also connects. Arguments as those of `Delivery`."""
        self._delivery = Delivery(workspace, warn=warn, loggers=loggers)
        self.store, self.outbox = self._delivery.store, self._delivery.outbox

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; None if the store does not respond."""
        if not self._delivery.is_paused:
            try:
                self.store.connect()
            except FAILURES as error:
                self._delivery.pause(error)
        return self.store.experiment_id

    def run(
        self,
        key: str,
        *,
        name: str,
        kind: str,
        parent: TrackedRun | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        started_ms: int | None = None,
    ) -> TrackedRun:
        """Find the run of this `RunIdentity`, or create it; there is never a second one.

        A killed or failed run is set to running again; a finished one stays finished. Existing
        parameters keep their values; tags are replaced. `started_ms` is the start of a new run, in
        ms; now when unset.
        """
        run = self.handle(key, name=name, kind=kind, parent=parent, started_ms=started_ms)
        texts = {name: str(value) for name, value in (params or {}).items()}
        run.write("update", params=texts, tags=dict(tags or {}), status="RUNNING")
        return run

    def handle(
        self,
        key: str,
        *,
        name: str,
        kind: str,
        parent: TrackedRun | None = None,
        started_ms: int | None = None,
    ) -> TrackedRun:
        """Return a run like `run`, but ask the store for it only when something is written."""
        within = parent.identity if parent else None
        identity = RunIdentity(key=key, kind=kind, name=name, parent=within, started_ms=started_ms)
        return TrackedRun(self._delivery, identity)

    def log_nested(self, runs: Sequence[NestedRun], *, parent: TrackedRun) -> list[TrackedRun]:
        """Log runs nested in `parent`; they are found together, by one search."""
        tracked, records = [], []
        for run in runs:
            own = self.handle(
                run.key, name=run.name, kind=run.kind, parent=parent, started_ms=run.started_ms
            )
            tracked.append(own)
            arguments = {
                "params": dict(run.params),
                "tags": dict(run.tags),
                "points": metric_points(run.metrics),
                "time_ms": run.ended_ms or now_ms(),
                "journal": run.journal_folder,
                "status": run.status,
            }
            records.append(own.record("update", arguments))
            if run.dataset:
                records.append(own.dataset_record(*run.dataset))
            if run.model:
                records.append(own.model_record(run.model))
        self._delivery.write(*records)
        return tracked

    def log_measurement(self, measured: Measurement, *, wait: bool = True) -> None:
        """Log a measurement; what its run already holds is not sent again.

        Args:
            wait: As in `TrackedRun.finish`.
        """
        run = self.run(
            measured.key,
            name=measured.name,
            kind=measured.kind,
            params=measured.params,
            started_ms=measured.ended_ms,
        )
        if measured.dataset:
            run.log_dataset(*measured.dataset, context="evaluation")
        run.log_points(measured.points, time_ms=measured.ended_ms)
        if measured.model:
            run.log_model(measured.model)
        for file in map(Path, measured.files):
            if file.is_file():
                run.log_artifact(file, measured.kind)
        run.finish(ended_ms=measured.ended_ms, wait=wait)

    def save_view(self, view: ChartView) -> None:
        """Save a chart view in the experiment, so that links can open it."""
        tag = {"tag": VIEW_TAG_PREFIX + view.key, "value": view.tag_value()}
        self._delivery.write({"operation": "tag the experiment", **tag})

    def links(self, base_url: str, **pages: str | None) -> Links:
        """Return links to MLflow's pages; `pages` as `Links.of` takes them."""
        return Links.of(base_url, self.experiment_id, **pages)

    def sweeps(self, limit: int) -> list[TrackedSweep]:
        """Return the newest sweeps in the store; none while it does not respond."""
        try:
            runs = self.store.newest("sweep", limit)
        except FAILURES as error:
            self._delivery.pause(error)
            return []
        return [
            TrackedSweep(
                name=run.info.run_name or "",
                run_id=run.info.run_id,
                view=run.data.tags.get(VIEW_TAG),
                report=run.data.tags.get(REPORT_TAG),
            )
            for run in runs
        ]

    @property
    def is_store_down(self) -> bool:
        """Whether the store failed a moment ago."""
        return self._delivery.is_paused

    def wait(self) -> None:
        """Wait until the store has everything, as long as it responds."""
        self._delivery.wait()

    def sync(self) -> int:
        """Deliver the outbox; return how many operations were delivered, or refused for good."""
        return self._delivery.sync()


def open_tracking(
    workspace: Workspace, *, warn: Warn | None = None, loggers: Collection[str] = ()
) -> Tracking:
    """Open the workspace's store; create its database and experiment if they are missing.

    Call it once before workers start. A server is connected to by the first operation; one that
    does not respond is no error: see `Tracking`.

    Raises:
        UserError: If the address is not one of MLflow's, or the local store is damaged.
    """
    tracking = Tracking(workspace, warn=warn, loggers=loggers)
    if tracking.store.is_remote:
        return tracking
    uri = tracking.store.public_uri
    valid = "set MLFLOW_TRACKING_URI to sqlite:///FILE or an http:// address"
    try:
        tracking.store.connect()
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLflow's store {uri} needs the module {error.name}; install it, or {valid}"
        ) from None
    except FAILURES as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"cannot open MLflow's store {uri}: {first_line(error)[:200]}; "
            f"move the file away, or {valid}"
        ) from None
    return tracking
