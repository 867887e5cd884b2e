"""Tracking as the pipelines use it: publish runs, find what is stored, links, chart views.

A run is first written as a file of the workspace, then published in the background, so training
never waits. A server that does not answer costs one warning; when it is back, or by `ui --sync`, it
gets what the files say then. MLflow's fluent API and Ray's callback would raise errors into
training, block for minutes, and create a second run for every resumed trial.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.records.tracked_run import (
    NOTE_TAG,
    REPORT_TAG,
    RUN_ID,
    VIEW_TAG,
    RegisteredModel,
    TrackedRun,
    tag_filter,
)
from orchestrator.tracking import models
from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import (
    FAILURES,
    KEY_TAG,
    KIND_TAG,
    MAX_RUNS_FOUND,
    MAX_TAG_CHARACTERS,
    PARENT_TAG,
    ROOT_TAG,
    CopiedStoreError,
    Store,
    is_refusal,
)
from orchestrator.workspace.errors import UserError, first_line, is_disk_full
from orchestrator.workspace.layout import Workspace

SECONDS_BETWEEN_COPIES = 4.0

Place = tuple[str, str, str | None]


class Publisher:
    """Calls a function with runs, in order, in a background thread."""

    def __init__(self, publish: Callable[[Sequence[TrackedRun]], Iterable[bool]]) -> None:
        """Use `publish`, which yields after each run whether it need not be tried again."""
        self._publish = publish
        self._waiting: dict[Place, TrackedRun] = {}
        self._running: dict[Place, TrackedRun] = {}
        self._has_new = self._is_busy = False
        self._num_published = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, *runs: TrackedRun) -> None:
        """Publish runs soon, the run of a sweep before those of its trials; returns at once."""
        with self._changed:
            for run in runs:
                self._running.pop(run.place, None)
                self._waiting[run.place] = run
                if run.status == "RUNNING":
                    self._running[run.place] = run
            self._has_new = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float, *, in_all: bool = False) -> bool:
        """Return whether everything that was put was tried.

        Args:
            seconds: Longest wait for something to be published.
            in_all: Whether this is the longest wait for all of it.

        Raises:
            BaseException: What `publish` raised.
        """
        is_over, num_before = False, -1
        while not is_over and num_before < self._num_published:
            num_before = self._num_published
            with self._changed:
                is_over = self._changed.wait_for(
                    lambda: not (self._has_new or self._is_busy), seconds
                )
            if in_all:
                break
        with self._changed:
            error, self._error = self._error, None
        if error:
            raise error
        return is_over

    def _work(self) -> None:
        copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_new, max(0, copy_at - time.monotonic()))
                batch, self._waiting = self._waiting, {}
                if time.monotonic() >= copy_at:
                    batch = {**self._running, **batch}
                    copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
                self._has_new, self._is_busy = False, True
            left: dict[Place, TrackedRun] = {}
            try:
                runs = list(batch.values())
                for run, is_done in zip(runs, self._publish(runs), strict=True):
                    self._num_published += is_done
                    if not is_done:
                        left[run.place] = run
            except BaseException as error:
                self._error = error
            with self._changed:
                self._waiting = {**left, **self._waiting}
                self._is_busy = self._has_new
                self._changed.notify_all()
                if not (self._waiting or self._running):
                    self._thread = None
                    return


FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 30.0, 600.0
MAX_WAIT_SECONDS, SHORT_WAIT_SECONDS = 60.0, 2.0
OWN_PREFIXES = ("iiet.", "mlflow.")

Warn = Callable[[str], None]


class Tracking:
    """One experiment. Only `wait` and what returns something wait for the store."""

    def __init__(self, workspace: Workspace, *, warn: Warn | None = None) -> None:
        """Name the store; `open_tracking` also connects.

        Args:
            warn: Called once when the store stops responding, and for what it refuses (default: a
                log message).
        """
        self.store, self._workspace = Store(workspace), workspace
        self._warn = warn or logging.getLogger(__name__).warning
        self._publisher = Publisher(self.publish_now)
        self._pause_seconds = self._paused_until = 0.0
        self._has_lost = False
        self.copied: CopiedStoreError | None = None
        """Why the workspace's database shows nothing new, if it was copied."""

    def publish(self, *runs: TrackedRun) -> None:
        """Store runs in the workspace, and show them soon; returns at once."""
        try:
            for run in runs if self._workspace.is_writable else ():
                run.write(run.path(self._workspace))
        except OSError as error:
            if not self._has_lost:
                self._warn(
                    f"cannot store what MLflow shows in {self._workspace.tracked} ({error}); the "
                    "work continues, and running the same command again stores it"
                )
            self._has_lost = True
        if self.copied and not self._pause_seconds:
            self._pause_seconds = MAX_PAUSE_SECONDS
            self._warn(str(self.copied))
        self._publisher.put(*runs)

    def withdraw(self, kind: str, key: str) -> None:
        """Show a run no more, if the workspace holds one: another run shows the same."""
        if run := self.stored(kind, key):
            run.path(self._workspace).unlink(missing_ok=True)
            self._publisher.put(run.changed(status="WITHDRAWN"))

    def stored(self, kind: str, key: str, parent: str | None = None) -> TrackedRun | None:
        """Return a run as the workspace holds it; None if it holds none, or a damaged one."""
        return TrackedRun.stored(self._workspace, kind, key, parent)

    def publish_now(self, runs: Sequence[TrackedRun]) -> Iterator[bool]:
        """Show runs in MLflow; yields after each whether it is shown, or refused for good."""
        if not self.is_store_down:
            try:
                self.store.prepare(runs)  # All with one search.
            except FAILURES as error:
                if not is_refusal(error):  # Else each run reports it.
                    self.pause(error)
        for run in runs:
            yield self._show(run)

    def _show(self, run: TrackedRun) -> bool:
        if self.is_store_down:
            return False
        try:
            try:
                self.store.publish(run, models.log_model)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                self.store.forget(run)  # It may have been changed or deleted by others.
                self.store.publish(run, models.log_model)
        except FAILURES as error:
            self.store.forget(run)
            if not is_refusal(error):
                self.pause(error)
                return False
            self._warn(f"MLflow refused {run.kind} {run.name}: {first_line(error)[:200]}")
        self._pause_seconds = 0.0
        return True

    def register(self, model: RegisteredModel, *, moves_alias: bool = True) -> bool:
        """Store an exported model as a version of a registered one; its run is published before.

        Returns whether the store has it now.

        `moves_alias` says whether an alias that another version has moves to this one.
        """
        if moves_alias:
            model.write(model.path(self._workspace))
        self.wait()
        if self.is_store_down or (run := self.store.known(model.run)) is None:
            return False
        try:
            with self.store.lock():
                models.register(self.store.connect(), run, model, moves_alias=moves_alias)
        except FAILURES as error:
            if not is_refusal(error):
                self.pause(error)
                return False
            self._warn(f"MLflow refused {model.name}@{model.alias}: {first_line(error)[:200]}")
            return False
        return True

    def wait(self, *, briefly: bool = False) -> None:
        """Wait until the store has everything, as long as it responds; or for two seconds."""
        # It did not respond last time?
        is_short, is_over = briefly or self._pause_seconds > 0, False
        try:
            seconds = SHORT_WAIT_SECONDS if is_short else MAX_WAIT_SECONDS
            is_over = self._publisher.wait(seconds, in_all=briefly)
        finally:
            if not is_over:  # Also after Ctrl-C.
                self.pause(TimeoutError("no answer yet"))

    def run_id(self, run: TrackedRun) -> str | None:
        """Return MLflow's id of a published run; None if the store does not respond."""
        self.wait()
        known = self.store.known(run.place)
        return known.id if known else None

    @property
    def is_store_down(self) -> bool:
        """Whether the store failed a moment ago, so that there are no attempts for now."""
        return time.monotonic() < self._paused_until

    def pause(self, error: Exception) -> None:
        """Make no attempts for a while; warn the first time."""
        if isinstance(error, CopiedStoreError):
            self.copied, self._paused_until = error, math.inf  # Publishing says so.
            return
        if not self._pause_seconds:
            self._warn(
                f"MLflow at {self.store.public_uri} does not respond ({first_line(error)[:200]}); "
                "training continues, and `iiet-orch ui --sync` publishes what is missing later"
            )
        longer = max(2 * self._pause_seconds, FIRST_PAUSE_SECONDS)
        self._pause_seconds = min(longer, MAX_PAUSE_SECONDS)
        self._paused_until = time.monotonic() + self._pause_seconds

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; None if the store does not respond."""
        if not self.is_store_down:
            try:
                self.store.connect()
            except FAILURES as error:
                self.pause(error)
        return self.store.experiment_id

    def links(self, base_url: str, overview: ChartView, max_sweeps: int) -> list[str]:
        """Return links to all runs and, for each new sweep, to its charts, table, report and run.

        The `overview` of all runs is saved first, because a link cannot choose columns. There are
        none while the store does not respond.
        """
        try:
            client, experiment_id = self.store.connect(), str(self.store.experiment_id)
            client.set_experiment_tag(experiment_id, *overview.tag)
            sweeps = client.search_runs(
                [experiment_id],
                tag_filter({KIND_TAG: "sweep"}),
                max_results=max_sweeps,
                order_by=["attributes.start_time DESC"],
            )
        except FAILURES as error:
            self.pause(error)
            return []
        runs = f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs"
        # A plain address would show neither losses nor nested runs.
        training = "workflowType=machine_learning"
        charts = f"{runs}?{training}&compareRunsMode={{}}&viewStateShareKey={{}}"
        lines = [f"training runs: {charts.format('TABLE', overview.key)}"]
        for run in sweeps:
            view, report = run.data.tags.get(VIEW_TAG), run.data.tags.get(REPORT_TAG)
            own = f"{runs}/{run.info.run_id}"
            pages = {
                "charts": charts.format("CHART", view) if view else "",
                "table": charts.format("TABLE", view) if view else "",
                "report": f"{own}/artifacts/{report}?{training}" if report else "",
                "run": f"{own}?{training}",
            }
            for page, link in pages.items():
                if link:
                    lines.append(f"sweep {run.info.run_name}, {page + ':':<7} {link}")
        return lines

    def added_by_people(self) -> list[str]:
        """Name what the store holds and no file of the workspace says: it would be lost."""
        client = MlflowClient(self.store.uri)
        experiment = client.get_experiment_by_name(self.store.experiment_name)
        found: list[str] = []
        ids = [experiment.experiment_id] if experiment else []
        for run in client.search_runs(ids, max_results=MAX_RUNS_FOUND):
            tags = run.data.tags
            parent = tags.get(ROOT_TAG) if PARENT_TAG in tags else None
            own = self.stored(tags.get(KIND_TAG, ""), tags.get(KEY_TAG, ""), parent)
            note = own.tags.get(NOTE_TAG, "").replace(RUN_ID, run.info.run_id) if own else ""
            if tags.get(NOTE_TAG, "") != note[:MAX_TAG_CHARACTERS]:
                found.append(f"the note of {run.info.run_name}")
            foreign = [name for name in tags if not name.startswith(OWN_PREFIXES)]
            found += [f"the tag {name} of {run.info.run_name}" for name in foreign]
        for model in client.search_registered_models():
            picked = {path.stem for path in self._workspace.tracked.glob("registered/*.json")}
            names = {f"{model.name}@{alias}" for alias in model.aliases}
            found += [f"the alias {name}" for name in sorted(names - picked)]
        return found


def open_tracking(workspace: Workspace, *, warn: Warn | None = None) -> Tracking:
    """Open the workspace's store; create its database and experiment if they are missing.

    Call it once before workers start. A server is connected to when the first run is published; one
    that does not respond is no error: see `Tracking`.

    Raises:
        UserError: If the address is not one of MLflow's, or the local store is damaged.
    """
    tracking = Tracking(workspace, warn=warn)
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
    except CopiedStoreError as error:
        tracking.pause(error)
    except FAILURES as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"cannot open MLflow's store {uri}: {first_line(error)[:200]}; "
            f"move the file away, or {valid}"
        ) from None
    return tracking
