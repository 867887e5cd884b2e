"""Runs as the stages use them: open by key, write, finish; a silent store costs a warning and
nothing else.

Every write is first a record (operation, run, plain arguments). It is attempted at once; what fails
goes to the outbox. After a failure the store is left alone for a while, longer each time, because
each attempt at a dead server blocks for seconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.records.trial import TrialResult
from orchestrator.tracking.identity import RunIdentity
from orchestrator.tracking.links import VIEW_TAG_PREFIX, ChartView, Links
from orchestrator.tracking.outbox import Outbox, Record
from orchestrator.tracking.store import FAILURES, Store, first_line, is_refusal
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.folders import Workspace

NOTE_TAG = "mlflow.note.content"
VIEW_TAG = "iiet.chart_view"
FIRST_PAUSE_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 600.0

Warn = Callable[[str], None]


@dataclass(frozen=True)
class TrackedSweep:
    """A sweep's run, as far as links need it."""

    name: str
    """The sweep's name."""
    run_id: str
    """Id of its run."""
    view: str | None
    """Key of its chart view; None before its first report."""


class Tracking:
    """One experiment, and what could not be written to it yet."""

    def __init__(self, workspace: Workspace, *, warn: Warn | None = None) -> None:
        """Name store and outbox; `open_tracking` also connects.

        Args:
            workspace: Gives the store's address, the artifact folder and the outbox.
            warn: Called once when the store stops answering, and for content that it refuses.
        """
        self.store = Store(workspace)
        self.outbox = Outbox(workspace.root)
        self._warn = warn or logging.getLogger(__name__).warning
        self._pause_seconds = self._paused_until = 0.0
        self._has_lost = False

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; None as long as the store does not answer."""
        return self.store.experiment_id

    def run(
        self,
        key: str,
        *,
        name: str,
        kind: str,
        parent: TrackedRun | RunIdentity | str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Find the run with this key, kind and parent, or create it; there is never a second one.

        A run that was killed or failed is running again afterwards; a finished one stays finished.

        Args:
            key: Content key, or a sweep's name.
            name: Shown by the user interface.
            kind: Becomes the tag `iiet.kind`.
            parent: The run it is nested in.
            params: Parameters; one that the run has already keeps its value.
            tags: Further tags.
        """
        origin = parent.identity if isinstance(parent, TrackedRun) else parent
        run = TrackedRun(self, RunIdentity(key, kind, name, origin))
        run.describe(params=params, tags=tags)
        return run

    def log_trial(
        self,
        result: TrialResult,
        *,
        parent: TrackedRun | RunIdentity | str,
        sweep: str,
        journal_folder: Path | None = None,
    ) -> TrackedRun:
        """Track a finished trial as a nested run: parameters, metrics, and its journal's losses.

        Args:
            result: The trial; a teacher or a baseline is nested in the same way, under its role as
                kind.
            parent: The sweep's run.
            sweep: The sweep's name, by which the chart view filters.
            journal_folder: Folder with the journal of its training.
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
        """Save a chart view in the experiment, so that a link opens it."""
        self.write({"operation": "view", "key": view.key, "value": view.tag_value()})

    def links(self, base_url: str, *, run_id: str | None = None, view: str | None = None) -> Links:
        """Return links into MLflow's pages; those whose target is not known are None."""
        return Links.of(base_url, self.experiment_id, run_id=run_id, view=view)

    def sweeps(self, limit: int) -> list[TrackedSweep]:
        """Return the newest sweeps that the store holds; none while it does not answer."""
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
        """Deliver what waits in the outbox.

        Returns:
            How many operations are done with; what the store did not take stays in the outbox.
        """
        self._paused_until = 0.0
        return self.outbox.drain(self.attempt)

    def write(self, record: Record) -> None:
        """Do an operation now, or keep it for later; where the disk is full, say so once."""
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
        """Do an operation; True when it need not be tried again: it is done, or refused for
        good."""
        if self.is_paused:
            return False
        try:
            if record["operation"] == "view":
                self.store.tag_experiment(VIEW_TAG_PREFIX + record["key"], record["value"])
            else:
                run_id = self.store.run_id(RunIdentity.from_dict(record["run"]))
                self.store.perform(record["operation"], run_id, record["arguments"])
        except FAILURES as error:
            if is_refusal(error):
                self._warn(f"MLflow refused {record['operation']}: {first_line(error)}")
                return True
            self.pause(error)
            return False
        self._pause_seconds = 0.0
        return True

    @property
    def is_paused(self) -> bool:
        """Whether the store failed a moment ago and is left alone for now."""
        return time.monotonic() < self._paused_until

    def pause(self, error: Exception) -> None:
        """Leave the store alone for a while; the first time, say so."""
        if not self._pause_seconds:
            self._warn(
                f"MLflow at {self.store.public_uri} does not respond ({first_line(error)}); "
                "training continues, and `iiet-orch sync` delivers the missing records later"
            )
        longer = max(2 * self._pause_seconds, FIRST_PAUSE_SECONDS)
        self._pause_seconds = min(longer, LONGEST_PAUSE_SECONDS)
        self._paused_until = time.monotonic() + self._pause_seconds


class TrackedRun:
    """One run. Every method returns, whatever the store does."""

    def __init__(self, tracking: Tracking, identity: RunIdentity) -> None:
        """Name a run; `Tracking.run` also makes it."""
        self.identity = identity
        self._tracking = tracking
        self._run_id: str | None = None

    @property
    def run_id(self) -> str | None:
        """The run's id; None as long as the store does not answer."""
        if self._run_id is None and not self._tracking.is_paused:
            try:
                self._run_id = self._tracking.store.run_id(self.identity)
            except FAILURES as error:
                self._tracking.pause(error)
        return self._run_id

    def describe(
        self, *, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        """Set what describes the run, made if it is missing: parameters once and for all, tags
        anew."""
        texts = {name: str(value) for name, value in (params or {}).items()}
        self._write("describe", params=texts, tags=dict(tags or {}))

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Set parameters; MLflow never changes one, so the first value of a name stays."""
        self.describe(params=values)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or change tags."""
        self.describe(tags=tags)

    def set_note(self, markdown: str) -> None:
        """Set the description that the run's page shows first."""
        self.describe(tags={NOTE_TAG: markdown})

    def log_journal(self, folder: Path) -> None:
        """Copy what is new in the folder's journal into the run; repeating it changes nothing."""
        self._write("mirror", folder=str(folder))

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Set metrics at a step."""
        numbers = {name: float(value) for name, value in values.items()}
        self._write("metrics", values=numbers, step=step, time_ms=_now())

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or all that a folder holds, in a folder of the run; it replaces its
        namesake."""
        self._write("artifact", path=str(path), folder=folder)

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Store rows as the sortable table that MLflow's pages show; it replaces its namesake.

        Args:
            rows: One mapping a row; the first row's names are the columns.
            name: Path inside the run, ending in `.json`.
        """
        columns = list(rows[0]) if rows else []
        data = [[row.get(column) for column in columns] for row in rows]
        self._write("table", columns=columns, data=data, name=name)

    def log_dataset(self, name: str, digest: str, profile: Mapping[str, Any]) -> None:
        """Name the data that the run read.

        Args:
            name: Shown by the user interface.
            digest: Hash of the content.
            profile: Sizes and the like.
        """
        self._write("dataset", name=name, digest=digest, profile=json.dumps(dict(profile)))

    def register(self, model: str, folder: Path, *, key: str, alias: str, note: str = "") -> None:
        """Store a model folder with the run, as a version of a registered model.

        Args:
            model: Name of the registered model, made if it is missing.
            folder: What `export` wrote.
            key: Content key of the model; the same key in the same run is the same version.
            alias: Points at this version from now on.
            note: The version's description.
        """
        self._write("register", model=model, key=key, folder=str(folder), alias=alias, note=note)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; one that has ended so keeps its end time."""
        self._write("finish", status=status, time_ms=_now())

    def _write(self, operation: str, **arguments: Any) -> None:
        run = self.identity.to_dict()
        self._tracking.write({"operation": operation, "run": run, "arguments": arguments})


def status_after(error: BaseException | None) -> str:
    """Return the status of a run whose work ended so: KILLED by the user, FAILED, or FINISHED."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def open_tracking(workspace: Workspace, *, warn: Warn | None = None) -> Tracking:
    """Connect to the workspace's store, and make database and experiment if they are missing.

    Call it once before workers start. A server that does not answer is no error: see `Tracking`.

    Args:
        workspace: Gives the store; `MLFLOW_TRACKING_URI` overrides it.
        warn: Called once when the store stops answering, and for content that it refuses.

    Raises:
        UserError: If MLflow does not know such an address, or the local store is damaged.
    """
    tracking = Tracking(workspace, warn=warn)
    try:
        tracking.store.connect()
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLflow's store {tracking.store.public_uri} needs the module {error.name}; "
            "install it, or set MLFLOW_TRACKING_URI to sqlite:///FILE or an http:// address"
        ) from None
    except FAILURES as error:
        if not tracking.store.is_remote:
            raise UserError(
                f"cannot open MLflow's store {tracking.store.public_uri}: {first_line(error)}; "
                "move the file away, or set MLFLOW_TRACKING_URI to sqlite:///FILE or an http:// "
                "address"
            ) from None
        tracking.pause(error)
    return tracking


def _now() -> int:
    return int(time.time() * 1000)
