"""Runs as the pipelines use them: open by key, write, finish; a dead server costs one warning.

A write is attempted at once; if that fails, it goes to the outbox. Each attempt at a dead server
blocks for seconds, so after a failure there are no attempts for a while, longer each time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.records.trial import Trial
from orchestrator.tracking.chart_view import VIEW_TAG_PREFIX, ChartView
from orchestrator.tracking.links import Links
from orchestrator.tracking.operations import OPERATIONS
from orchestrator.tracking.outbox import Outbox, Record
from orchestrator.tracking.store import FAILURES, RunIdentity, Store, is_refusal
from orchestrator.workspace.errors import Interrupted, UserError, first_line
from orchestrator.workspace.folders import Workspace

NOTE_TAG = "mlflow.note.content"
VIEW_TAG = "iiet.chart_view"
FIRST_PAUSE_SECONDS = 30.0
MAX_PAUSE_SECONDS = 600.0

Warn = Callable[[str], None]


@dataclass(frozen=True)
class TrackedSweep:
    """A sweep's run, for links to it."""

    name: str
    run_id: str
    view: str | None
    """Key of its chart view; None before its first report."""


class Tracking:
    """One experiment, and an outbox of what could not be written to it yet."""

    def __init__(self, workspace: Workspace, *, warn: Warn | None = None) -> None:
        """Name store and outbox; `open_tracking` also connects.

        Args:
            warn: Called once when the store stops responding, and for values that it refuses
                (default: a log message).
        """
        self.store = Store(workspace)
        self.outbox = Outbox(workspace.root)
        self._warn = warn or logging.getLogger(__name__).warning
        self._pause_seconds = self._paused_until = 0.0
        self._has_lost = False

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; None while the store does not respond."""
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
    ) -> TrackedRun:
        """Find the run of this `RunIdentity`, or create it; there is never a second one.

        A killed or failed run is set to running again; a finished one stays finished. Existing
        parameters keep their values; tags are replaced.
        """
        run = TrackedRun(
            self,
            RunIdentity(key=key, kind=kind, name=name, parent=parent.identity if parent else None),
        )
        texts = {name: str(value) for name, value in (params or {}).items()}
        run.write("describe", params=texts, tags=dict(tags or {}))
        return run

    def log_trial(
        self,
        result: Trial,
        *,
        parent: TrackedRun,
        sweep: str,
        journal_folder: Path | None = None,
    ) -> TrackedRun:
        """Log a finished trial, teacher or baseline as a nested run, with its role as kind.

        Args:
            parent: The run of the sweep.
            sweep: The sweep's name, by which the chart view filters.
        """
        run = self.run(
            result.key,
            name=result.name,
            kind=result.role,
            parent=parent,
            params=result.params(),
            tags={"iiet.sweep": sweep, "iiet.method": result.method},
        )
        if journal_folder is not None:
            run.log_journal(journal_folder)
        run.log_metrics(result.metrics())
        run.finish()
        return run

    def save_view(self, view: ChartView) -> None:
        """Save a chart view in the experiment, so that links can open it."""
        self.write({"operation": "view", "key": view.key, "value": view.tag_value()})

    def links(self, base_url: str, *, run_id: str | None = None, view: str | None = None) -> Links:
        """Return links to MLflow's pages; see `Links`."""
        return Links.of(base_url, self.experiment_id, run_id=run_id, view=view)

    def sweeps(self, limit: int) -> list[TrackedSweep]:
        """Return the newest sweeps in the store; none while it does not respond."""
        try:
            runs = self.store.newest("sweep", limit)
        except FAILURES as error:
            self.pause(error)
            return []
        return [
            TrackedSweep(run.info.run_name or "", run.info.run_id, run.data.tags.get(VIEW_TAG))
            for run in runs
        ]

    def sync(self) -> int:
        """Deliver the outbox; return how many operations were delivered, or refused for good."""
        self._paused_until = 0.0
        return self.outbox.deliver(self.attempt)

    def write(self, record: Record) -> None:
        """Perform an operation now, or put it into the outbox."""
        if self.attempt(record):
            return
        try:
            self.outbox.add(record)
        except OSError as error:
            if not self._has_lost:
                self._warn(
                    f"cannot store records for MLflow in {self.outbox.path} ({error}); training "
                    "continues, and running the same command again sends them"
                )
            self._has_lost = True

    def attempt(self, record: Record) -> bool:
        """Perform an operation; return False if it should be tried again later."""
        if self.is_paused:
            return False
        try:
            client = self.store.connect()
            if record["operation"] == "view":
                tag = VIEW_TAG_PREFIX + record["key"]
                client.set_experiment_tag(str(self.experiment_id), tag, record["value"])
            else:
                run_id = self.store.run_id(RunIdentity.model_validate(record["run"]))
                OPERATIONS[record["operation"]](client, run_id, **record["arguments"])
        except FAILURES as error:
            if is_refusal(error):
                self._warn(f"MLflow refused {record['operation']}: {first_line(error)[:200]}")
                return True
            self.pause(error)
            return False
        self._pause_seconds = 0.0
        return True

    @property
    def is_paused(self) -> bool:
        """Whether the store failed a moment ago, so that there are no attempts for now."""
        return time.monotonic() < self._paused_until

    def pause(self, error: Exception) -> None:
        """Make no attempts for a while; warn the first time."""
        if not self._pause_seconds:
            self._warn(
                f"MLflow at {self.store.public_uri} does not respond ({first_line(error)[:200]}); "
                "training continues, and `iiet-orch sync` delivers the missing records later"
            )
        longer = max(2 * self._pause_seconds, FIRST_PAUSE_SECONDS)
        self._pause_seconds = min(longer, MAX_PAUSE_SECONDS)
        self._paused_until = time.monotonic() + self._pause_seconds


class TrackedRun:
    """One run. No method raises if the store fails."""

    def __init__(self, tracking: Tracking, identity: RunIdentity) -> None:
        """Name a run; `Tracking.run` also creates it."""
        self.identity = identity
        self._tracking = tracking
        self._run_id: str | None = None

    @property
    def run_id(self) -> str | None:
        """The run's id; None while the store does not respond."""
        if self._run_id is None and not self._tracking.is_paused:
            try:
                self._run_id = self._tracking.store.run_id(self.identity)
            except FAILURES as error:
                self._tracking.pause(error)
        return self._run_id

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; existing ones are replaced."""
        self.write("describe", params={}, tags=dict(tags))

    def set_note(self, markdown: str) -> None:
        """Set the description at the top of the run's page."""
        self.set_tags({NOTE_TAG: markdown})

    def log_journal(self, folder: Path) -> None:
        """Copy the journal's new metrics; records already in the run are not copied again."""
        self.write("mirror", folder=str(folder))

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Set metrics at a step."""
        numbers = {name: float(value) for name, value in values.items()}
        self.write("metrics", values=numbers, step=step, time_ms=_now_ms())

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or the files of a folder, in a folder of the run; replace existing ones."""
        self.write("artifact", path=str(path), folder=folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as a table, `NAME.json`, with the first row's names as columns."""
        columns = list(rows[0]) if rows else []
        data = [[row.get(column) for column in columns] for row in rows]
        self.write("table", columns=columns, data=data, name=name)

    def log_dataset(self, name: str, digest: str, profile: Mapping[str, Any]) -> None:
        """Log the data that the run read; `digest` is a hash, `profile` its origin and sizes."""
        self.write("dataset", name=name, digest=digest, profile=json.dumps(dict(profile)))

    def register(self, model: str, folder: Path, *, key: str, alias: str, note: str = "") -> None:
        """Store an exported folder with the run, as a version of a registered model.

        Args:
            model: Name of the registered model; created if it is missing.
            key: Content key of the model; the same key in the same run is the same version.
            alias: Moves to this version.
        """
        self.write("register", model=model, key=key, folder=str(folder), alias=alias, note=note)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; an unchanged status keeps its end time."""
        self.write("finish", status=status, time_ms=_now_ms())

    def write(self, operation: str, **arguments: Any) -> None:
        """Perform one of `OPERATIONS` on this run, now or later."""
        run = self.identity.model_dump()
        self._tracking.write({"operation": operation, "run": run, "arguments": arguments})


def status_after(error: BaseException | None) -> str:
    """Return a run's final status: KILLED after an interruption, FAILED, or FINISHED."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def open_tracking(workspace: Workspace, *, warn: Warn | None = None) -> Tracking:
    """Connect to the workspace's store; create its database and experiment if they are missing.

    Call it once before workers start. A server that does not respond is no error: see `Tracking`.

    Raises:
        UserError: If the address is not one of MLflow's, or the local store is damaged.
    """
    tracking = Tracking(workspace, warn=warn)
    uri = tracking.store.public_uri
    valid = "set MLFLOW_TRACKING_URI to sqlite:///FILE or an http:// address"
    try:
        tracking.store.connect()
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLflow's store {uri} needs the module {error.name}; install it, or {valid}"
        ) from None
    except FAILURES as error:
        if not tracking.store.is_remote:
            raise UserError(
                f"cannot open MLflow's store {uri}: {first_line(error)[:200]}; "
                f"move the file away, or {valid}"
            ) from None
        tracking.pause(error)
    return tracking


def _now_ms() -> int:
    return int(time.time() * 1000)
